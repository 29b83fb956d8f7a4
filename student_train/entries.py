"""Where stored entries belong, found on the device: a batch carries counts, not positions."""

import jax
import jax.numpy as jnp


@jax.named_scope("targets")
def entry_positions(
    head_count: jax.Array, tail_count: jax.Array, block_tokens: int, slots: int
) -> jax.Array:
    """int32 [B, E] position in its row of each of `slots` E entry slots a row.

    head_count, tail_count [B, L]. In a block's slots its heads come first, then its tails, each by
    position, then unused slots, which get the block's last position. As
    `logit_store.codec.entry_positions`, on the device.
    """
    rows, length = head_count.shape
    blocks = length // block_tokens
    counts = jnp.concatenate(
        [
            head_count.astype(jnp.int32).reshape(rows * blocks, block_tokens),
            tail_count.astype(jnp.int32).reshape(rows * blocks, block_tokens),
        ],
        axis=1,
    )
    ends = jnp.cumsum(counts, axis=1)
    slot = jnp.arange(slots // blocks, dtype=jnp.int32)
    # The first list element whose end lies behind the slot; past the last end, there is none.
    element = jax.vmap(lambda row: jnp.searchsorted(row, slot, side="right"))(ends)
    inside = jnp.where(element < 2 * block_tokens, element % block_tokens, block_tokens - 1)
    first = jnp.tile(jnp.arange(blocks, dtype=jnp.int32) * block_tokens, rows)
    return (inside.astype(jnp.int32) + first[:, None]).reshape(rows, slots)
