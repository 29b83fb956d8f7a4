"""The device mesh and where each array lies on it.

Which axis cuts which array is the model's own knowledge (`gemma2.placement`); here it meets a
run's config. Only placements are decided here, nothing is computed.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma2.placement import AXES, ROW_AXES, partition
from schemas.errors import ConfigError
from schemas.runs import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all `devices` (default: all of this job's). Raises ConfigError."""
    devices = list(jax.devices() if devices is None else devices)
    others = config.replica * config.model
    fsdp = config.fsdp if config.fsdp != -1 else max(1, len(devices) // others)
    if others * fsdp != len(devices):
        raise ConfigError(
            f"The mesh must use every device, but replica {config.replica} x fsdp {config.fsdp} x "
            f"model {config.model} does not make {len(devices)} devices; set mesh.fsdp to -1 or "
            "change the others."
        )
    shape = (config.replica, fsdp, config.model)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if config.replica % slices:
        raise ConfigError(
            f"mesh.replica must be a multiple of the {slices} slices, as only whole copies of the "
            f"state lie on different ones, but it is {config.replica}; set mesh.replica to "
            f"{slices}."
        )
    # Both order a pod's devices by its topology, of which an axis may take a part.
    if slices == 1:
        ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within = (config.replica // slices, fsdp, config.model)
        ordered = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


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
