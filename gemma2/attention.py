"""Attention kernels and the table they are chosen from.

A kernel declares what it supports. Asking one for a feature it lacks raises; nothing is dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gemma2 import splash
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
    device_kinds: frozenset[str] | None = None  # None: any


def resolve(name: str, config: ModelConfig, device: Any, *, backward: bool) -> str:
    """The kernel for a model on a device; auto is the first in the table that fits both.

    device: a `jax.Device`, of this machine or only compiled for. Raises ConfigError by feature.
    """
    needs = _Needs(
        config.attention_cap, config.window_tokens, config.head_size, backward, device.device_kind
    )
    return _first_fitting(name, list(KERNELS), needs)


def choose(
    name: str, *, cap: float | None, window: int | None, head_size: int, backward: bool
) -> Callable[..., Array]:
    """The kernel `name`; auto is the first that runs on every device.

    Raises ConfigError by feature.
    """
    everywhere = [name for name, kernel in KERNELS.items() if kernel.device_kinds is None]
    return KERNELS[
        _first_fitting(name, everywhere, _Needs(cap, window, head_size, backward, None))
    ].run


class _Needs(NamedTuple):
    cap: float | None
    window: int | None
    head_size: int
    backward: bool
    device_kind: str | None
    """None: whoever named the kernel knows where it runs."""

    def lacking(self, kernel: Kernel) -> list[str]:
        """What the kernel does not have of this."""
        sizes, kinds = kernel.head_sizes, kernel.device_kinds
        features = (
            ("soft-cap", self.cap is None or kernel.cap),
            ("window", self.window is None or kernel.window),
            ("segments", kernel.segments),
            ("backward", not self.backward or kernel.backward),
            (f"head size {self.head_size}", sizes is None or self.head_size in sizes),
            (
                f"device {self.device_kind}",
                kinds is None or self.device_kind is None or self.device_kind in kinds,
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
        lacking = needs.lacking(KERNELS[candidate])
        if not lacking:
            return candidate
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
    "splash": _splash(1024, "TPU v5 lite", "TPU v5", "TPU v6 lite"),
    # Blocks of 1024 overflow this chip's vector memory.
    "splash_v4": _splash(512, "TPU v4"),
    "reference": Kernel(reference, cap=True, window=True, segments=True, backward=True),
}
