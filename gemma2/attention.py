"""Attention kernels and the table they are chosen from.

A kernel declares what it supports. Asking one for a feature it lacks raises; nothing is dropped.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from gemma2 import flash, splash
from schemas.errors import ConfigError
from schemas.model import ModelConfig

_QUERY_BLOCK = 1024


@dataclass(frozen=True)
class Kernel:
    """An attention function and the features it computes exactly."""

    run: Callable[..., Array]
    cap: bool
    window: bool
    segments: bool
    backward: bool
    head_sizes: frozenset[int] | None = None  # None: any
    dtypes: frozenset[str] | None = None  # None: any
    device_kinds: frozenset[str] | None = None  # None: any; of a CUDA device sm_90 and the like
    largest_cap: float | None = None  # Without a cap, or with a larger one, it does not work.
    shared_keys: bool = False  # Several heads must share a key's.
    package: str | None = None  # What must be installed.


def resolve(
    name: str, config: ModelConfig, device: Any, *, dtype: DTypeLike, backward: bool
) -> str:
    """The kernel for a model on a device; auto is the first in the table that fits both.

    device: a `jax.Device`, of this machine or only compiled for. dtype: the compute dtype. Raises
    ConfigError by feature. Warns if auto passes over a kernel that only is not installed.
    """
    needs = _Needs.of(config, config.window_tokens, dtype, backward, device)
    return _first_fitting(name, list(KERNELS), needs)


def choose(
    name: str, config: ModelConfig, *, window: int | None, dtype: DTypeLike, backward: bool
) -> Callable[..., Array]:
    """The kernel `name`; auto is the first that runs on every device.

    Raises ConfigError by feature.
    """
    everywhere = [name for name, kernel in KERNELS.items() if kernel.device_kinds is None]
    needs = _Needs.of(config, window, dtype, backward, None)
    return KERNELS[_first_fitting(name, everywhere, needs)].run


def device_kind(device: Any) -> str | None:
    """What a kernel is made for: sm_90 and the like of a CUDA device; None without a device."""
    capability = getattr(device, "compute_capability", None)
    if capability:
        return f"sm_{str(capability).replace('.', '')}"
    return getattr(device, "device_kind", None)


class _Needs(NamedTuple):
    cap: float | None
    window: int | None
    head_size: int
    heads_per_key: int
    dtype: str
    backward: bool
    device_kind: str | None
    """None: whoever named the kernel knows where it runs."""

    @classmethod
    def of(
        cls, config: ModelConfig, window: int | None, dtype: DTypeLike, backward: bool, device: Any
    ) -> "_Needs":
        return cls(
            config.attention_cap,
            window,
            config.head_size,
            config.num_heads // config.num_kv_heads,
            jnp.dtype(dtype).name,
            backward,
            device_kind(device),
        )

    def lacking(self, kernel: Kernel) -> list[str]:
        """What the kernel does not have of this; what is not installed comes last."""
        sizes, kinds, largest = kernel.head_sizes, kernel.device_kinds, kernel.largest_cap
        features = (
            ("soft-cap", self.cap is None or kernel.cap),
            (
                f"scores that no cap of {largest} bounds",
                largest is None or (self.cap is not None and self.cap <= largest),
            ),
            ("window", self.window is None or kernel.window),
            ("segments", kernel.segments),
            ("backward", not self.backward or kernel.backward),
            (f"head size {self.head_size}", sizes is None or self.head_size in sizes),
            ("as many key heads as heads", self.heads_per_key > 1 or not kernel.shared_keys),
            (f"compute in {self.dtype}", kernel.dtypes is None or self.dtype in kernel.dtypes),
            (
                f"device {self.device_kind}",
                kinds is None or self.device_kind is None or self.device_kind in kinds,
            ),
            (
                f"the package {kernel.package} (pip install 'retort[gpu]', Python 3.12 or later)",
                kernel.package is None or find_spec(kernel.package) is not None,
            ),
        )
        return [feature for feature, present in features if not present]


def _first_fitting(name: str, automatic: list[str], needs: _Needs) -> str:
    lacking: list[str] = []
    for candidate in automatic if name == "auto" else [name]:
        if candidate not in KERNELS:
            raise ConfigError(
                f"attention must be one of auto, {', '.join(KERNELS)}, but it is '{candidate}'."
            )
        kernel = KERNELS[candidate]
        lacking = needs.lacking(kernel)
        if not lacking:
            return candidate
        if name == "auto" and len(lacking) == 1 and kernel.package and kernel.package in lacking[0]:
            warnings.warn(
                f"attention: '{candidate}' is faster here but lacks {lacking[0]}.", stacklevel=3
            )
    raise ConfigError(
        f"The attention kernel must support what the model has, but '{name}' lacks "
        f"{', '.join(lacking)}; choose attention 'reference'."
    )


def reference(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    cap: float | None,
    window: int | None,
) -> Array:
    """Exact masked attention in XLA; query blocks bound the score matrix.

    query [B, T, H, h] (already scaled), key and value [B, T, K, h] with K dividing H, segment_ids
    [B, T]. Position t sees s where s <= t, both are of one segment, and t - s < window. Scores,
    the cap and the softmax are float32. Returns [B, T, H, h] in the value's dtype.
    """
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    # One batch dimension, [B * K, ...]: XLA on CPU is several times slower at products with more.
    query = query.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 1, 3, 4)
    query = query.reshape(batch * kv_heads, length, groups * size)
    key, value = (x.transpose(0, 2, 1, 3).reshape(-1, length, size) for x in (key, value))
    positions = jnp.arange(length)

    def block(q: Array, q_segments: Array, q_positions: Array) -> Array:
        rows = q.shape[1]
        q = q.reshape(-1, rows * groups, size)
        scores = jnp.einsum("nth,nsh->nts", q, key, preferred_element_type=jnp.float32)
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        distance = q_positions[:, None] - positions[None, :]
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        mask = allowed[None] & (q_segments[:, :, None] == segment_ids[:, None, :])
        scores = scores.reshape(batch, kv_heads, rows, groups, length)
        # Finite: a query that only fills the last block sees nothing; -inf would give NaN there,
        # which the backward spreads to keys and values.
        scores = jnp.where(mask[:, None, :, None, :], scores, jnp.float32(-1e30))
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        weights = weights.reshape(-1, rows * groups, length)
        return jnp.einsum("nts,nsh->nth", weights, value).reshape(-1, rows, groups * size)

    if length <= _QUERY_BLOCK:
        out = block(query, segment_ids, positions)
    else:
        blocks = -(-length // _QUERY_BLOCK)
        extra = blocks * _QUERY_BLOCK - length  # queries that only fill the last block
        query = jnp.pad(query, ((0, 0), (0, extra), (0, 0)))
        query_segments = jnp.pad(segment_ids, ((0, 0), (0, extra)))
        out = jax.lax.map(
            lambda item: jax.checkpoint(block)(*item),
            (
                jnp.moveaxis(query.reshape(-1, blocks, _QUERY_BLOCK, groups * size), 1, 0),
                jnp.moveaxis(query_segments.reshape(batch, blocks, _QUERY_BLOCK), 1, 0),
                jnp.arange(blocks * _QUERY_BLOCK).reshape(blocks, _QUERY_BLOCK),
            ),
        )
        out = jnp.moveaxis(out, 0, 1).reshape(-1, blocks * _QUERY_BLOCK, groups * size)
        out = out[:, :length]
    out = out.reshape(batch, kv_heads, length, groups, size).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, length, heads, size)


def _splash(largest_block: int, *device_kinds: str) -> Kernel:
    return Kernel(
        partial(splash.attention, largest_block=largest_block),
        cap=True,
        window=True,
        segments=True,
        backward=True,
        head_sizes=frozenset((128, 256)),
        device_kinds=frozenset(device_kinds),
    )


# In the order of preference.
KERNELS: dict[str, Kernel] = {
    "flash": Kernel(
        flash.attention,
        cap=True,
        window=True,
        segments=True,
        backward=True,
        head_sizes=frozenset((128, 256)),
        dtypes=frozenset(("bfloat16",)),
        device_kinds=frozenset(("sm_90",)),
        largest_cap=60.0,  # e^60, and sums of them, fit float32
        shared_keys=True,
        package="fa4_jax",
    ),
    "splash": _splash(1024, "TPU v5 lite", "TPU v5", "TPU v6 lite"),
    # Blocks of 1024 overflow this chip's vector memory.
    "splash_v4": _splash(512, "TPU v4"),
    "reference": Kernel(reference, cap=True, window=True, segments=True, backward=True),
}
