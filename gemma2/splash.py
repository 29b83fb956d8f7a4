"""Splash attention for TPU: JAX's Pallas kernel, given the model's masks, cap and grouped heads.

Blocks of the score matrix that the mask leaves empty are skipped, forward and backward.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

_LANES = 128  # what a TPU's vector registers hold in a row: the least that a block may be
# Keys whose scores exist at once: with 1024, gradients of head size 256 overflow a v5e's memory.
_LARGEST_PART = 512
# Of what only fills the last block: no document of a store has it.
_FILLING_SEGMENT = -1


def attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    cap: float | None,
    window: int | None,
    largest_block: int,
    interpret: bool = False,
) -> Array:
    """As `gemma2.attention.reference`, for head sizes that are multiples of 128.

    largest_block: queries, and keys, of a block: a multiple of 128. Larger ones are faster, until
    they no longer fit a chip's vector memory. interpret: compute on any device, slowly.
    """
    length, heads = query.shape[1:3]
    padded = -(-length // _LANES) * _LANES
    filling = ((0, 0), (0, padded - length))
    query, key, value = (jnp.pad(x, (*filling, (0, 0), (0, 0))) for x in (query, key, value))
    segment_ids = jnp.pad(segment_ids, filling, constant_values=_FILLING_SEGMENT)
    block = max(b for b in range(_LANES, largest_block + 1, _LANES) if padded % b == 0)
    part = max(b for b in range(_LANES, _LARGEST_PART + 1, _LANES) if block % b == 0)
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([_mask(padded, window)] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=part,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=part,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))  # [heads, T, h]
        return kernel(q, k, v, kernels.SegmentIds(segments, segments)).swapaxes(0, 1)

    return jax.vmap(row)(query, key, value, segment_ids)[:, :length]


def _mask(length: int, window: int | None) -> masks.Mask:
    """Position t sees s where 0 <= t - s < window."""
    if window is None:
        return masks.CausalMask((length, length))
    return masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
