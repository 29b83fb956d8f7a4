"""FlashAttention-4 for Hopper GPUs in JAX: windows and packed documents, forward and backward.

The kernels (`gemma2.flash_kernels`) are called through JAX's foreign function interface. Gradients
of queries, and of keys that several heads share, are added by atomic operations, whose order
changes from run to run: two runs differ in the last bits of a gradient.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

import os
DEFER = os.environ.get('DEFER','1')=='1'


def attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    cap: float | None,
    window: int | None,
) -> Array:
    """As `gemma2.attention.reference`, for bfloat16, a cap, and ids that do not come back."""
    if cap is None:
        raise ValueError("flash attention needs a soft-cap")
    return _attention(cap, query, key, value, visibility(segment_ids, window))


def visibility(segment_ids: Array, window: int | None) -> Array:
    """int32 [B, 1 + 2T]: T, then each query's first key, then each key's last query.

    segment_ids [B, T]: a run of one id is a document, and so is padding.
    """
    batch, length = segment_ids.shape
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((batch, 1), bool)
    first = lax.cummax(jnp.where(jnp.concatenate([edge, changes], 1), at, 0), axis=1)
    last = jnp.where(jnp.concatenate([changes, edge], 1), at, length - 1)
    last = lax.cummin(last, axis=1, reverse=True)
    if window is not None:
        first = jnp.maximum(first, at - (window - 1))
        last = jnp.minimum(last, at + (window - 1))
    return jnp.concatenate([jnp.full((batch, 1), length, jnp.int32), first, last], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(cap: float, query: Array, key: Array, value: Array, bounds: Array) -> Array:
    return _forward(cap, query, key, value, bounds)[0]


class _Residuals(NamedTuple):
    query: Array
    key: Array
    value: Array
    bounds: Array
    out: Array
    log_sum: Array  # float32 [B, H, T], logarithm of each query's sum of weights


class _NoServer:
    """Stands where cutejax would share compiled kernels between machines."""

    def hgetall(self, *_: Any) -> dict[bytes, bytes]:
        return {}

    def hset(self, *_: Any, **__: Any) -> None:
        pass


def _cutejax() -> Any:
    """The package, which keeps compiled kernels where JAX keeps compiled programs, if it does."""
    import cutejax

    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder and "://" not in folder:
        cutejax.configure_cache(
            url="none",
            client_factory=_NoServer,
            hmac_key="of no use without a server",
            spool_dir=str(Path(folder) / "kernels"),
        )
    return cutejax


def _forward(
    cap: float, query: Array, key: Array, value: Array, bounds: Array
) -> tuple[Array, _Residuals]:
    from gemma2 import flash_kernels as kernels

    cutejax = _cutejax()
    batch, length, heads, size = query.shape
    heads_spec = cutejax.ArraySpec(static_dims=(2, 3))
    out, log_sum = cutejax.call(
        kernels.run_forward,
        [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        query,
        key,
        value,
        bounds,
        in_specs=[heads_spec] * 3 + [None],
        out_specs=[heads_spec, None],
        kernel=kernels.forward(size, heads // key.shape[2], cap),
        name="flash_forward",
    )
    # Named, so that a policy that keeps attention's output need not run the forward again.
    out, log_sum = checkpoint_name(out, "attention"), checkpoint_name(log_sum, "attention")
    return out, _Residuals(query, key, value, bounds, out, log_sum)


def _backward(cap: float, kept: _Residuals, gradient: Array) -> tuple[Any, ...]:
    from gemma2 import flash_kernels as kernels

    cutejax = _cutejax()
    batch, length, heads, size = kept.query.shape
    kv_heads = kept.key.shape[2]
    tiles = kernels.BACKWARD_TILES[size]
    heads_spec = cutejax.ArraySpec(static_dims=(2, 3))
    sums_spec = cutejax.ArraySpec(divisibility=4)
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def padded(tile: int) -> int:
        return -(-length // tile) * tile

    rows, key_rows = padded(tiles.queries), padded(tiles.keys)
    gradient = gradient.astype(kept.query.dtype)
    product_sum, log2_sum, query_sums = cutejax.call(
        kernels.run_prepare,
        [float32((batch, heads, n)) for n in (rows, rows, rows * size)],
        kept.out,
        gradient,
        kept.log_sum,
        in_specs=[heads_spec, heads_spec, None],
        out_specs=sums_spec,
        kernel=kernels.prepare(size),
        name="flash_backward_prepare",
    )
    if size == 256:
        from gemma2 import flash_pairs

        sums, key_gradient, value_gradient = cutejax.call(
            flash_pairs.run_backward,
            [
                float32(query_sums.shape),
                jax.ShapeDtypeStruct(kept.key.shape, kept.key.dtype),
                jax.ShapeDtypeStruct(kept.value.shape, kept.value.dtype),
            ],
            kept.query,
            kept.key,
            kept.value,
            gradient,
            log2_sum,
            product_sum,
            query_sums,
            kept.bounds,
            in_specs=[heads_spec] * 4 + [sums_spec] * 3 + [None],
            out_specs=[sums_spec, heads_spec, heads_spec],
            input_output_aliases={6: 0},
            kernel=flash_pairs.backward(heads // kv_heads, cap, DEFER),
            name="flash_backward",
        )
        query_gradient = cutejax.call(
            kernels.run_convert,
            jax.ShapeDtypeStruct(kept.query.shape, kept.query.dtype),
            sums,
            in_specs=[sums_spec],
            out_specs=heads_spec,
            kernel=flash_pairs.convert(),
            name="flash_backward_convert",
        )
        return (
            query_gradient,
            key_gradient,
            value_gradient,
            np.zeros(kept.bounds.shape, jax.dtypes.float0),
        )
    key_zeros = jnp.zeros((batch, kv_heads, key_rows * size), jnp.float32)
    zeros = [query_sums, key_zeros, key_zeros]
    found = cutejax.call(
        kernels.run_backward,
        [float32(x.shape) for x in zeros],
        kept.query,
        kept.key,
        kept.value,
        gradient,
        log2_sum,
        product_sum,
        *zeros,
        kept.bounds,
        in_specs=[heads_spec] * 4 + [sums_spec] * 5 + [None],
        out_specs=[sums_spec] * 3,
        input_output_aliases={6: 0, 7: 1, 8: 2},
        kernel=kernels.backward(size, heads // kv_heads, cap),
        name="flash_backward",
    )
    gradients = [
        cutejax.call(
            kernels.run_convert,
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            total,
            in_specs=[sums_spec],
            out_specs=heads_spec,
            kernel=kernels.convert(size, x is not kept.query),
            name="flash_backward_convert",
        )
        for x, total in zip((kept.query, kept.key, kept.value), found, strict=True)
    ]
    return (*gradients, np.zeros(kept.bounds.shape, jax.dtypes.float0))


_attention.defvjp(_forward, _backward)
