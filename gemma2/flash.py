"""FlashAttention-4 for Hopper GPUs in JAX: documents packed in rows, forward and backward.

The kernels (`gemma2.flash_kernels`) are called through JAX's foreign function interface. They are
told where documents begin, so that what a document may not see is skipped, not masked. Gradients of
queries, and of keys that several heads share, are added by atomic operations, whose order changes
from run to run: two runs differ in the last bits of a gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

# The places for documents are fixed when a step is compiled, and unused ones take time: one for so
# many tokens. Rows whose documents are shorter on average are computed in XLA.
TOKENS_PER_DOCUMENT = 128


class _Static(NamedTuple):
    cap: float
    window: int | None
    in_xla: Callable[..., Array]
    """(query, key, value, segment_ids) → out, for more documents than there are places."""


def attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    cap: float | None,
    window: int | None,
    in_xla: Callable[..., Array],
) -> Array:
    """As `in_xla`, which is `gemma2.attention.reference`, for bfloat16 and a cap."""
    if cap is None:
        raise ValueError("flash attention needs a soft-cap")
    starts, count = document_starts(segment_ids)
    static = _Static(cap, window, partial(in_xla, cap=cap, window=window))
    return _attention(static, query, key, value, segment_ids, starts, count)


def document_starts(segment_ids: Array) -> tuple[Array, Array]:
    """(int32 [N + 1], int32 []): where each document of the rows, end to end, begins; how many.

    segment_ids [B, T]: a run of one id is a document, and so is padding. Places that are left hold
    B·T; of more than N documents the last are missing.
    """
    batch, length = segment_ids.shape
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_start = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True).reshape(-1)
    places = batch * -(-length // TOKENS_PER_DOCUMENT)
    starts = jnp.nonzero(is_start, size=places, fill_value=batch * length)[0]
    starts = jnp.append(starts, batch * length).astype(jnp.int32)
    return starts, jnp.sum(is_start, dtype=jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: _Static,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    starts: Array,
    count: Array,
) -> Array:
    return _forward(static, query, key, value, segment_ids, starts, count)[0]


def _forward(
    static: _Static,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    starts: Array,
    count: Array,
) -> tuple[Array, Any]:
    batch, length, heads, _ = query.shape

    def in_kernel() -> tuple[Array, Array]:
        return _call_forward(static, query, key, value, starts)

    def in_xla() -> tuple[Array, Array]:
        out = static.in_xla(query, key, value, segment_ids)
        return out, jnp.zeros((heads, batch * length), jnp.float32)

    out, log_sum = lax.cond(count < len(starts), in_kernel, in_xla)
    # Named, so that a policy that keeps attention's output need not run the forward again.
    out, log_sum = checkpoint_name(out, "attention"), checkpoint_name(log_sum, "attention")
    return out, (query, key, value, segment_ids, starts, count, out, log_sum)


def _backward(static: _Static, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    query, key, value, segment_ids, starts, count, out, log_sum = residuals

    def in_kernel() -> tuple[Array, ...]:
        return _call_backward(static, query, key, value, starts, out, log_sum, gradient)

    def in_xla() -> tuple[Array, ...]:
        _, pull = jax.vjp(partial(_without_ids, static.in_xla, segment_ids), query, key, value)
        return pull(gradient)

    gradients = lax.cond(count < len(starts), in_kernel, in_xla)
    return (*gradients, *(_no_gradient(x) for x in (segment_ids, starts, count)))


_attention.defvjp(_forward, _backward)


def _without_ids(run: Callable[..., Array], ids: Array, *arrays: Array) -> Array:
    return run(*arrays, ids)


def _no_gradient(x: Array) -> Any:
    return np.zeros(x.shape, jax.dtypes.float0)


def _call_forward(
    static: _Static, query: Array, key: Array, value: Array, starts: Array
) -> tuple[Array, Array]:
    """(out [B, T, H, h], float32 [H, B·T] logarithms of the sums of weights)."""
    import cutejax

    from gemma2 import flash_kernels as kernels

    batch, length, heads, size = query.shape
    flat = cutejax.ArraySpec(static_dims=(1, 2))
    out, log_sum = cutejax.call(
        kernels.run_forward,
        [
            jax.ShapeDtypeStruct((batch * length, heads, size), query.dtype),
            jax.ShapeDtypeStruct((heads, batch * length), jnp.float32),
        ],
        *(_flat(x) for x in (query, key, value)),
        starts,
        in_specs=[flat] * 3 + [None],
        out_specs=[flat, None],
        kernel=kernels.forward(size, heads // key.shape[2], static.cap, static.window),
        window=static.window,
        name="flash_forward",
    )
    return out.reshape(query.shape), log_sum


def _call_backward(
    static: _Static,
    query: Array,
    key: Array,
    value: Array,
    starts: Array,
    out: Array,
    log_sum: Array,
    gradient: Array,
) -> tuple[Array, ...]:
    """Gradients of query, key and value, in their dtype."""
    import cutejax

    from gemma2 import flash_kernels as kernels

    batch, length, heads, size = query.shape
    kv_heads, tokens = key.shape[2], batch * length
    tiles = kernels.BACKWARD_TILES[size]
    flat, sums = cutejax.ArraySpec(static_dims=(1, 2)), cutejax.ArraySpec(divisibility=4)
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def padded(tile: int) -> int:
        # Each document's sums begin with a tile of their own.
        return -(-tokens // tile) * tile + (len(starts) - 1) * tile

    rows, key_rows = padded(tiles.queries), padded(tiles.keys)
    gradient = _flat(gradient.astype(query.dtype))
    product_sum, log2_sum, query_sums = cutejax.call(
        kernels.run_prepare,
        [float32((heads, rows)), float32((heads, rows)), float32((heads, rows * size))],
        _flat(out),
        gradient,
        log_sum,
        starts,
        in_specs=[flat, flat, None, None],
        out_specs=sums,
        kernel=kernels.prepare(size),
        name="flash_backward_prepare",
    )
    zeros = [query_sums, *[jnp.zeros((kv_heads, key_rows * size), jnp.float32)] * 2]
    found = cutejax.call(
        kernels.run_backward,
        [float32(x.shape) for x in zeros],
        *(_flat(x) for x in (query, key, value)),
        gradient,
        log2_sum,
        product_sum,
        *zeros,
        starts,
        in_specs=[flat] * 4 + [sums] * 5 + [None],
        out_specs=[sums] * 3,
        input_output_aliases={6: 0, 7: 1, 8: 2},
        kernel=kernels.backward(size, heads // kv_heads, static.cap, static.window),
        window=static.window,
        name="flash_backward",
    )
    return tuple(
        cutejax.call(
            kernels.run_convert,
            jax.ShapeDtypeStruct((tokens, *x.shape[2:]), x.dtype),
            total,
            starts,
            in_specs=[sums, None],
            out_specs=flat,
            kernel=kernels.convert(size, x is not query),
            name="flash_backward_convert",
        ).reshape(x.shape)
        for x, total in zip((query, key, value), found, strict=True)
    )


def _flat(x: Array) -> Array:
    """[B, T, ...] as [B·T, ...]."""
    return x.reshape(-1, *x.shape[2:])
