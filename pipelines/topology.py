"""TPU topologies that are compiled for on a machine without one: their chips, and chips' limits.

libtpu describes a topology by name and compiles for it; nothing runs.
"""

import os
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from pydantic import Field

from schemas.base import Document
from schemas.errors import ConfigError, MissingDependencyError

# Else libtpu asks Google's metadata server which TPU this machine is, and warns if it is none;
# what it is told instead has no effect on a topology that is asked for by name.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Chip(Document):
    """What limits a program on one chip of a generation."""

    accelerator: str = Field(description="Its name in `schemas.accelerators`.")
    usable_bytes: int = Field(description="Of its memory, what the compiler lets a program use.")
    memory_bytes_per_second: float
    link_bytes_per_second: float = Field(description="All links of a slice together, one way.")
    network_bytes_per_second: float = Field(description="A chip's part between slices, one way.")
    source: str


def _chip(
    accelerator: str, usable_gib: float, memory_gb: float, link_gb: float, network_gb: float
) -> Chip:
    return Chip(
        accelerator=accelerator,
        usable_bytes=int(usable_gib * 2**30),
        memory_bytes_per_second=memory_gb * 1e9,
        link_bytes_per_second=link_gb * 1e9,
        network_bytes_per_second=network_gb * 1e9,
        source=f"docs.cloud.google.com/tpu/docs/{accelerator}",
    )


# Between slices 6.4 Tbit/s for each 256 chips of a v5e; of others assumed the same.
CHIPS: dict[str, Chip] = {
    "TPU v4": _chip("v4", 30.75, 1228, 300, 3.125),
    "TPU v5 lite": _chip("v5e", 15.75, 819, 200, 3.125),
    "TPU v5": _chip("v5p", 95.74, 2765, 600, 3.125),
    "TPU v6 lite": _chip("v6e", 31.25, 1640, 448, 3.125),
}


def devices(topology: str, slices: int) -> list[Any]:
    """The chips of `slices` slices of a topology such as v5e:16x16, to compile for.

    Raises ConfigError for a name that libtpu does not know, MissingDependencyError without libtpu.
    """
    if find_spec("libtpu") is None:
        raise MissingDependencyError(
            "Compiling for a TPU needs its compiler, libtpu, but it is not installed; "
            "run pip install 'jax[tpu]'."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The compiler alone is wanted, of a TPU that may be this machine's too.
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        # A chip's two cores as one device.
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(topology, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"topology must be a TPU's generation and shape, such as v5e:16x16, v4:8x16x32, "
            f"v5p:8x8x8 or v6e:16x16, but it is '{topology}' ({error})."
        ) from error
    found: list[Any] = list(described.devices)
    kind = found[0].device_kind
    if kind not in CHIPS:
        raise ConfigError(
            f"topology must be of {', '.join(chip.accelerator for chip in CHIPS.values())}, but "
            f"'{topology}' is of {kind}, of whose limits nothing is known here."
        )
    return found
