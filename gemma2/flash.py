"""FlashAttention-4 for Hopper GPUs in JAX: windows and packed documents, forward and backward.

The kernels (`gemma2.flash_kernels`) are called through JAX's foreign function interface. Gradients
of queries, and with heads of 128 those of keys that several heads share, are added by atomic
operations, whose order changes from run to run: two runs differ in the last bits of a gradient.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name


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
    heads_spec = _heads_spec()
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

    batch, length, heads, size = kept.query.shape
    rows = _padded(length, kernels.BACKWARD_QUERIES)
    gradient = gradient.astype(kept.query.dtype)
    product_sum, log2_sum, query_sums = _cutejax().call(
        kernels.run_prepare,
        [_float32(batch, heads, n) for n in (rows, rows, rows * size)],
        kept.out,
        gradient,
        kept.log_sum,
        in_specs=[_heads_spec(), _heads_spec(), None],
        out_specs=_sums_spec(),
        kernel=kernels.prepare(size),
        name="flash_backward_prepare",
    )
    run = _backward_in_pairs if size == 256 else _backward_of_128
    operands = (kept.query, kept.key, kept.value, gradient, log2_sum, product_sum)
    gradients = run(cap, operands, query_sums, kept.bounds)
    return (*gradients, np.zeros(kept.bounds.shape, jax.dtypes.float0))


def _backward_in_pairs(
    cap: float, operands: tuple[Array, ...], query_zeros: Array, bounds: Array
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value, which are the first three operands."""
    from gemma2 import flash_pairs

    query, key, value = operands[:3]
    query_sums, of_key, of_value = _cutejax().call(
        flash_pairs.run_backward,
        [_float32(*query_zeros.shape), _like(key), _like(value)],
        *operands,
        query_zeros,
        bounds,
        in_specs=[_heads_spec()] * 4 + [_sums_spec()] * 3 + [None],
        out_specs=[_sums_spec(), _heads_spec(), _heads_spec()],
        input_output_aliases={6: 0},
        kernel=flash_pairs.backward(query.shape[2] // key.shape[2], cap),
        name="flash_backward",
    )
    return _converted(query_sums, query, flash_pairs.convert()), of_key, of_value


def _backward_of_128(
    cap: float, operands: tuple[Array, ...], query_zeros: Array, bounds: Array
) -> tuple[Array, Array, Array]:
    """As `_backward_in_pairs`, for heads of 128."""
    from gemma2 import flash_backward

    query, key, value = operands[:3]
    batch, length, key_heads, size = key.shape
    padded = _padded(length, flash_backward.KEYS)
    key_zeros = jnp.zeros((batch, key_heads, padded * size), jnp.float32)
    zeros = [query_zeros, key_zeros, key_zeros]
    found = _cutejax().call(
        flash_backward.run_backward,
        [_float32(*x.shape) for x in zeros],
        *operands,
        *zeros,
        bounds,
        in_specs=[_heads_spec()] * 4 + [_sums_spec()] * 5 + [None],
        out_specs=[_sums_spec()] * 3,
        input_output_aliases={6: 0, 7: 1, 8: 2},
        kernel=flash_backward.backward(query.shape[2] // key_heads, cap),
        name="flash_backward",
    )
    of_query, of_key, of_value = (
        _converted(sums, x, flash_backward.convert(x is not query))
        for sums, x in zip(found, (query, key, value), strict=True)
    )
    return of_query, of_key, of_value


def _converted(sums: Array, like: Array, kernel: Any) -> Array:
    """float32 sums in a backward's own order as an array of another's shape and dtype."""
    from gemma2 import flash_kernels as kernels

    return _cutejax().call(
        kernels.run_convert,
        _like(like),
        sums,
        in_specs=[_sums_spec()],
        out_specs=_heads_spec(),
        kernel=kernel,
        name="flash_backward_convert",
    )


def _heads_spec() -> Any:
    return _cutejax().ArraySpec(static_dims=(2, 3))


def _sums_spec() -> Any:
    return _cutejax().ArraySpec(divisibility=4)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _padded(length: int, tile: int) -> int:
    return -(-length // tile) * tile


_attention.defvjp(_forward, _backward)
