"""What vendors say of their accelerators: a table of datasheet figures, none of them measured."""

from pydantic import Field

from schemas.base import Document

_SPARSITY = 2
"""NVIDIA's datasheets give tensor-core rates with 2:4 sparsity: twice those of dense products."""


class Accelerator(Document):
    """One chip."""

    peak_flops_per_second: float = Field(gt=0, description="Dense products in bfloat16.")
    memory_bytes: int = Field(gt=0)
    source: str


def _nvidia(sparse_flops_per_second: float, memory_bytes: int, source: str) -> Accelerator:
    return Accelerator(
        peak_flops_per_second=sparse_flops_per_second / _SPARSITY,
        memory_bytes=memory_bytes,
        source=f"{source}; dense is half of the rate with sparsity",
    )


def _tpu(peak_flops_per_second: float, memory_bytes: int, page: str) -> Accelerator:
    return Accelerator(
        peak_flops_per_second=peak_flops_per_second,
        memory_bytes=memory_bytes,
        source=f"docs.cloud.google.com/tpu/docs/{page}",
    )


# Memory in the unit that each page prints, GB or GiB.
ACCELERATORS: dict[str, Accelerator] = {
    "h100": _nvidia(1979e12, 80 * 10**9, "NVIDIA H100 datasheet, SXM"),
    "h200": _nvidia(1979e12, 141 * 10**9, "NVIDIA H200 datasheet, SXM"),
    "b200": _nvidia(4500e12, 180 * 10**9, "NVIDIA Blackwell datasheet, HGX B200"),
    "v4": _tpu(275e12, 32 * 2**30, "v4"),
    "v5e": _tpu(197e12, 16 * 10**9, "v5e"),
    "v5p": _tpu(459e12, 95 * 10**9, "v5p"),
    "v6e": _tpu(918e12, 32 * 10**9, "v6e"),
    "tpu7x": _tpu(2307e12, 192 * 2**30, "tpu7x"),
}

# What JAX calls the devices, to the letter: another variant of a card has another peak.
_DEVICE_KINDS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator that JAX calls `device_kind`; None if it is not in the table."""
    name = _DEVICE_KINDS.get(device_kind)
    return None if name is None else ACCELERATORS[name]
