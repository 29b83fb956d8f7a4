"""The device mesh and where each array lies on it.

Axes: `replica` holds copies of the state (across slices), `fsdp` shards the parameters and the
optimizer's state, rows of a batch lie over both; `model` is reserved for tensor parallelism. Only
placements are decided here, nothing is computed.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from schemas.errors import ConfigError
from schemas.runs import MeshConfig

AXES = ("replica", "fsdp", "model")
ROW_AXES = ("replica", "fsdp")

# Assumed: below this an all-gather's latency costs more than the bytes that sharding saves.
REPLICATED_ELEMENTS = 2**12
# Assumed: above this, 4 MiB of float32, a copy on every device is a mistake to be told about.
LARGE_ELEMENTS = 2**20


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all `devices` (default: all of this job's). Raises ConfigError."""
    devices = list(jax.devices() if devices is None else devices)
    if config.model != 1:
        raise ConfigError(
            f"mesh.model must be 1, as tensor parallelism is not supported yet, but it is "
            f"{config.model}; use mesh.fsdp."
        )
    fsdp = config.fsdp if config.fsdp != -1 else max(1, len(devices) // config.replica)
    if config.replica * fsdp != len(devices):
        raise ConfigError(
            f"The mesh must use every device, but replica {config.replica} x fsdp {config.fsdp} "
            f"does not make {len(devices)} devices; set mesh.fsdp to -1 or change mesh.replica."
        )
    shape = (config.replica, fsdp, 1)
    # make_mesh orders a pod's devices by its topology; it refuses lists of other lengths.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, ...]: rows over replica and fsdp."""
    return NamedSharding(mesh, P(ROW_AXES))


def check_batch(mesh: Mesh, batch_sequences: int, accumulate: int = 1) -> None:
    """Raise ConfigError unless each device gets as many rows of each micro-batch, at least one."""
    devices = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    parts = devices * accumulate
    if batch_sequences % parts:
        micro_batches = "" if accumulate == 1 else f" times {accumulate} micro-batches"
        raise ConfigError(
            f"batch_sequences must be a multiple of the {devices} devices of replica x fsdp"
            f"{micro_batches}, but it is {batch_sequences}; use "
            f"{-(-batch_sequences // parts) * parts}."
        )


def partition(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where one array of the parameters or of the optimizer's state lies.

    Sharded over fsdp on its largest dimension that divides; small arrays are replicated. Raises
    ConfigError for a large one of which no dimension divides.
    """
    parts = mesh.shape["fsdp"]
    size = math.prod(shape)
    if parts == 1 or size < REPLICATED_ELEMENTS:
        return P()
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    # Layer pairs are stacked on axis 0, which the scan slices: it must be whole on each device.
    first = 1 if "pairs" in names else 0
    dividing = [axis for axis in range(first, len(shape)) if shape[axis] % parts == 0]
    if dividing:
        chosen = max(dividing, key=lambda axis: shape[axis])
        return P(*[None] * chosen, "fsdp")
    if size >= LARGE_ELEMENTS:
        raise ConfigError(
            f"mesh.fsdp must divide a dimension of every large array, but {parts} divides none of "
            f"{'.'.join(names)} {shape}; use another mesh.fsdp or mesh.replica."
        )
    return P()


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a tree of arrays or of their shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path, tuple(np.shape(leaf)), mesh)), tree
    )


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, without its values."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
