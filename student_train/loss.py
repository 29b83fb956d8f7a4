"""The sparse-target loss: a vocabulary head that never holds the logits of all its tokens.

For one position with stored weights p̂ on ids S, mass m = Σ p̂ and capped student logits
s = c·tanh(z/c), the distillation loss is m·logsumexp(s) − Σ_{i∈S} p̂_i s_i, and the hard label's
cross-entropy logsumexp(s) − s_label; each position has a weight for either. A scan over chunks of
whole blocks forms the logits of one chunk at a time and, when the loss is differentiated, the
gradients with them, so that the logits are never formed twice. No model and no store is known here:
hidden states, the tied table and arrays of entries come in.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from schemas.errors import ConfigError
from student_train import head_hopper

# With a soft-cap c every logit lies in [−c, c]: up to this c, Σ exp(s) over 2^31 ids neither
# overflows nor underflows float32 (e^60 · 2^31 < 3.4e38), so that no running maximum is needed.
LARGEST_CAP_WITHOUT_MAXIMUM = 60.0

KERNELS = ("auto", "portable", "hopper")


class Targets(NamedTuple):
    """What the positions of a batch should predict; all of it is constant to the gradient.

    No weight is negative.

    B rows of T tokens; E entry slots a row, block b of a row owning slots [b·K, (b+1)·K) with
    K = E / (T / block_tokens). Without stored targets E is 0.
    """

    labels: jax.Array
    """int32 [B, T], the next token's id; any valid id where `label_weight` is 0."""
    label_weight: jax.Array
    """float32 [B, T], weight of the label's cross-entropy: 0 where there is no next token."""
    entry_id: jax.Array
    """int32 [B, E], vocabulary id of each entry, -1 in an unused slot."""
    entry_position: jax.Array
    """int32 [B, E], position of each entry in its row; in an unused slot any one of its block."""
    entry_weight: jax.Array
    """float32 [B, E], the stored weight p̂; 0 in an unused slot."""
    entry_scale: jax.Array
    """float32 [B, T], weight of the position's distillation loss."""


class Losses(NamedTuple):
    """In nats; divide the sum by the sum of the weights for a mean."""

    loss: jax.Array
    """float32 [], Σ entry_scale·kd + label_weight·ce over positions: to differentiate."""
    position_kd: jax.Array
    """float32 [B, T], m·logsumexp - Σ p̂ s of each position, without its weight."""
    position_ce: jax.Array
    """float32 [B, T], logsumexp - s_label of each position, without its weight."""


class Head(NamedTuple):
    """What is static about the head; hashable, so that it may key a compiled function."""

    valid_vocab: int
    """Ids the tokenizer knows; the table's rows from here on are padding and get no mass."""
    final_cap: float | None
    block_tokens: int
    """Tokens that share one fixed run of entry slots; divides T. 1 without stored targets."""
    chunk_tokens: int
    """Tokens whose logits exist at once; rounded down to whole blocks, at least one."""
    table_axis: str | None = None
    """Inside shard_map: the mesh axis over which the table is sharded."""
    table_dimension: int = 0
    """The dimension of the table that `table_axis` shards."""
    vocab_axis: str | None = None
    """Inside shard_map: the mesh axis that cuts the vocabulary; each device has a run of ids."""
    batch_axes: tuple[str, ...] = ()
    """Inside shard_map: the mesh axes over which the rows are sharded."""
    kernel: str = "portable"
    """What forms the logits: portable or hopper. auto is for `resolve_kernel` to resolve."""


def resolve_kernel(
    head: Head, device_kind: str | None, *, dtype: DTypeLike, table_shape: tuple[int, int]
) -> Head:
    """`head` with the kernel that it names, or for auto the fastest that fits.

    device_kind: sm_90 and the like of a CUDA device. dtype: the compute dtype. table_shape: [V, D]
    as one device multiplies it. Raises ConfigError by feature.
    """
    if head.kernel not in KERNELS:
        raise ConfigError(
            f"The head's kernel must be one of {', '.join(KERNELS)}, but it is '{head.kernel}'."
        )
    if head.kernel == "portable":
        return head
    cap, largest = head.final_cap, LARGEST_CAP_WITHOUT_MAXIMUM
    rows, width = table_shape
    lacking = [
        feature
        for feature, is_present in (
            (f"logits that no cap of {largest} bounds", cap is not None and cap <= largest),
            (f"compute in {jnp.dtype(dtype).name}", jnp.dtype(dtype) == jnp.bfloat16),
            (f"width {width}", width % head_hopper.WIDTH_MULTIPLE == 0),
            (f"a table of {rows} rows", rows % head_hopper.ROW_MULTIPLE == 0),
            (f"device {device_kind}", device_kind == "sm_90"),
            (f"jax {jax.__version__}", jax.__version_info__ >= head_hopper.OLDEST_JAX),
        )
        if not is_present
    ]
    if lacking and head.kernel != "auto":
        raise ConfigError(
            f"The head's kernel must support what the loss has, but '{head.kernel}' lacks "
            f"{', '.join(lacking)}; choose 'portable'."
        )
    return head._replace(kernel="portable" if lacking else "hopper")


@jax.named_scope("head")
def sparse_target_loss(hidden: jax.Array, table: jax.Array, targets: Targets, head: Head) -> Losses:
    """Distillation and label losses of a batch, with gradients to `hidden` and `table`.

    Args:
      hidden: [B, T, D] after the final norm, in the compute dtype, which the three matrix
        products read; they accumulate in float32.
      table: [V, D] tied embedding in its master dtype. Inside shard_map with `head.table_axis`
        set: this device's part, gathered here in the compute dtype; its gradient comes back
        summed over `head.batch_axes` and scattered as the table is. With `head.vocab_axis` its
        rows are a part of the vocabulary, and the devices of that axis share what they find.
      targets: of these B rows.
      head: static description.

    Only `loss` carries gradients. Inside shard_map it is over all devices, while the [B, T] arrays
    are this device's.
    """
    tokens = hidden.shape[1]
    if tokens % head.block_tokens or targets.entry_id.shape[1] % (tokens // head.block_tokens):
        raise ConfigError(
            f"The loss needs rows of whole blocks, but {tokens} tokens with "
            f"{targets.entry_id.shape[1]} entry slots are not blocks of {head.block_tokens} "
            "tokens; pass the store's block_tokens."
        )
    return _head_loss(head, hidden, table, lax.stop_gradient(targets))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(head: Head, hidden: jax.Array, table: jax.Array, targets: Targets) -> Losses:
    losses, _ = _scan_chunks(head, hidden, table, targets, with_gradients=False)
    return losses


def _forward(
    head: Head, hidden: jax.Array, table: jax.Array, targets: Targets
) -> tuple[Losses, Any]:
    losses, (hidden_gradient, table_gradient) = _scan_chunks(
        head, hidden, table, targets, with_gradients=True
    )
    return losses, (hidden_gradient, table_gradient, targets, table[:0])


def _backward(head: Head, residuals: Any, cotangent: Losses) -> tuple[Any, ...]:
    hidden_gradient, table_gradient, targets, empty_table = residuals
    scale = cotangent.loss
    return (
        hidden_gradient * scale.astype(hidden_gradient.dtype),
        (table_gradient * scale).astype(empty_table.dtype),
        jax.tree.map(_zero_cotangent, targets),
    )


_head_loss.defvjp(_forward, _backward)


def _zero_cotangent(array: jax.Array) -> Any:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


class _Chunk(NamedTuple):
    """One chunk's inputs: C tokens, the K entry slots of their blocks."""

    hidden: jax.Array  # [C, D]
    labels: jax.Array  # int32 [C]
    label_weight: jax.Array  # float32 [C]
    entry_id: jax.Array  # int32 [K]
    entry_token: jax.Array  # int32 [K], token of the chunk
    entry_weight: jax.Array  # float32 [K]
    entry_scale: jax.Array  # float32 [C]


def _chunk_blocks(head: Head, blocks: int) -> tuple[int, int, int]:
    """(blocks of the first chunk, of each further one, how many further ones there are).

    All chunks but the first are alike, so that they can be a loop's; the first has what is left.
    """
    each = min(blocks, max(1, head.chunk_tokens // head.block_tokens))
    further = -(-blocks // each) - 1
    return blocks - further * each, each, further


def _chunk_at(
    head: Head, hidden: jax.Array, targets: Targets, start: jax.Array | int, blocks: int
) -> _Chunk:
    """`blocks` blocks from block `start` on; those of a row follow those of the row before."""
    slots = targets.entry_id.shape[1] // (hidden.shape[1] // head.block_tokens)

    def cut(array: jax.Array, per_block: int) -> jax.Array:
        array = array.reshape(-1, *array.shape[2:])
        return lax.dynamic_slice_in_dim(array, start * per_block, blocks * per_block)

    # Position in the row → token of the chunk: the offset in its block + the block's first token.
    offset = cut(targets.entry_position, slots) % head.block_tokens
    first = jnp.repeat(jnp.arange(blocks, dtype=jnp.int32) * head.block_tokens, slots)
    return _Chunk(
        hidden=cut(hidden, head.block_tokens),
        labels=cut(targets.labels, head.block_tokens),
        label_weight=cut(targets.label_weight, head.block_tokens),
        entry_id=cut(targets.entry_id, slots),
        entry_token=offset + first,
        entry_weight=cut(targets.entry_weight, slots),
        entry_scale=cut(targets.entry_scale, head.block_tokens),
    )


def _scan_chunks(
    head: Head,
    hidden: jax.Array,
    table: jax.Array,
    targets: Targets,
    with_gradients: bool,
) -> tuple[Losses, Any]:
    """The loss and, with gradients, (hidden's [B, T, D], the table's float32 [V, D])."""
    weights = table.astype(hidden.dtype)
    if head.table_axis is not None:
        weights = lax.all_gather(weights, head.table_axis, axis=head.table_dimension, tiled=True)

    def step(gradients: Any, start: jax.Array | int, blocks: int) -> tuple[Any, Any]:
        chunk = _chunk_at(head, hidden, targets, start, blocks)
        losses, (unnormalised, scale) = _chunk_loss(head, chunk, weights, with_gradients)
        if not with_gradients:
            return None, losses
        dx, dw = gradients
        scaled = (chunk.hidden.astype(jnp.float32) * scale[:, None]).astype(chunk.hidden.dtype)
        of_chunk = _times_table(head, unnormalised, weights)
        of_chunk = _over_vocabulary(head, lax.psum, scale[:, None] * of_chunk).astype(dx.dtype)
        dx = lax.dynamic_update_slice_in_dim(dx, of_chunk, start * head.block_tokens, axis=0)
        added = jnp.einsum("cv,cd->vd", unnormalised, scaled, preferred_element_type=jnp.float32)
        return (dx, added if dw is None else dw + added), losses

    batch, tokens, width = hidden.shape
    first, each, further = _chunk_blocks(head, batch * tokens // head.block_tokens)
    # The gradient is as large as one float32 table. The first chunk makes it; zeros would have to
    # be written, and read to be added to.
    gradients: Any = (jnp.zeros((batch * tokens, width), hidden.dtype), None)
    found = []
    if with_gradients or first != each:
        gradients, losses = step(gradients, 0, first)
        found.append(losses)
    else:
        gradients, first, further = None, 0, further + 1
    if further:
        gradients, losses = lax.scan(
            lambda gradients, at: step(gradients, first + at * each, each),
            gradients,
            jnp.arange(further),
        )
        found.append(jax.tree.map(jnp.ravel, losses))
    losses = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
    kd, ce = (x.reshape(batch, tokens) for x in losses)
    loss = jnp.sum(targets.entry_scale * kd + targets.label_weight * ce)
    if head.batch_axes:
        loss = lax.psum(loss, head.batch_axes)
    if not with_gradients:
        return Losses(loss, kd, ce), None
    dx, dw = gradients
    return Losses(loss, kd, ce), (dx.reshape(hidden.shape), _reduce_over_devices(head, dw))


def _reduce_over_devices(head: Head, table_gradient: jax.Array) -> jax.Array:
    """Sum over the devices that hold other rows; every device keeps its own part of the table."""
    others = tuple(axis for axis in head.batch_axes if axis != head.table_axis)
    if head.table_axis is not None:
        table_gradient = lax.psum_scatter(
            table_gradient, head.table_axis, scatter_dimension=head.table_dimension, tiled=True
        )
    return lax.psum(table_gradient, others) if others else table_gradient


class _Scores(NamedTuple):
    """What the logits of C tokens and V ids leave behind; shift and total know all devices' ids."""

    unnormalised: jax.Array | None
    """Compute dtype [C, V], s' exp(s - shift), 0 in padded columns; None without gradients."""
    total: jax.Array
    """float32 [C], Σ exp(s - shift)."""
    shift: jax.Array
    """float32 [C]."""
    slot_logits: jax.Array
    """float32 [N], logits z of the wanted (token, id) pairs, before the cap."""


def _chunk_loss(
    head: Head, chunk: _Chunk, weights: jax.Array, with_gradients: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, jax.Array]]:
    """((kd [C], ce [C]), (G [C, V] in the compute dtype, r float32 [C])), d loss / d logits = r·G.

    With s the capped logit, s' its derivative, q = softmax(s) = exp(s) / total, p̂ and y the entries
    and the one-hot label, a and b the weights of the two losses and n = a·m + b, the gradient of a
    row is s'·(a·(m·q − p̂) + b·(q − y)) = n / total · s'·(exp(s) − total·(a·p̂ + b·y) / n). The first
    factor is r. What it multiplies is known before the total is, but for label and entries: one
    pass over the logits writes G and adds up the total, and r waits until after the products.

    Label and entries are computed apart and then *set*: they are rounded to the compute dtype (for
    the two products that follow) only after their differences were taken in float32, no dense copy
    of the targets exists, and there is no adding scatter, which would be atomic on a GPU.

    As a·p̂ + b·y <= n, no G is larger than the total: the range that LARGEST_CAP_WITHOUT_MAXIMUM
    leaves to float32 is that of bfloat16 too. Where n is 0, r is.
    """
    rows, width = chunk.hidden.shape[0], weights.shape[0]
    first = 0 if head.vocab_axis is None else lax.axis_index(head.vocab_axis) * width
    # Every position's label follows the entries, as one more slot.
    token = jnp.concatenate([chunk.entry_token, jnp.arange(rows, dtype=jnp.int32)])
    # Unused slots (−1) read any logit of their token; their weight is 0.
    column = jnp.concatenate([jnp.maximum(chunk.entry_id, 0), chunk.labels]) - first
    form = _fused_scores if head.kernel == "hopper" else _scores
    scores = form(head, chunk.hidden, weights, first, token, column, with_gradients)

    logsumexp = scores.shift + jnp.log(scores.total)
    capped, slope = _soft_cap(head.final_cap, scores.slot_logits)
    surprise = logsumexp[token] - capped
    entries = chunk.entry_id.shape[0]
    is_label = chunk.entry_id == chunk.labels[chunk.entry_token]
    mass, kd, on_label = jax.ops.segment_sum(
        jnp.stack(
            [
                chunk.entry_weight,
                chunk.entry_weight * surprise[:entries],
                jnp.where(is_label, chunk.entry_weight, 0.0),
            ],
            axis=1,
        ),
        chunk.entry_token,
        num_segments=rows,
    ).T
    softmax_scale = chunk.entry_scale * mass + chunk.label_weight
    target = jnp.concatenate(
        [
            chunk.entry_scale[chunk.entry_token] * chunk.entry_weight,
            chunk.entry_scale * on_label + chunk.label_weight,
        ]
    )
    share = target / jnp.where(softmax_scale > 0, softmax_scale, 1.0)[token]
    gradient = slope * (jnp.exp(-surprise) - share) * scores.total[token]
    # Past the end nothing is set: unused slots, other devices' ids (which would wrap around) and
    # entries that are their position's label, whose own slot knows them.
    is_set = jnp.concatenate([(chunk.entry_id >= 0) & ~is_label, jnp.ones((rows,), bool)])
    column = jnp.where(is_set & (column >= 0), column, width)
    unnormalised = scores.unnormalised
    if unnormalised is not None:
        unnormalised = unnormalised.at[token, column].set(
            gradient.astype(unnormalised.dtype), mode="drop", unique_indices=True
        )
    return (kd, surprise[entries:]), (unnormalised, softmax_scale / scores.total)


def _scores(
    head: Head,
    hidden: jax.Array,
    weights: jax.Array,
    first: Any,
    token: jax.Array,
    column: jax.Array,
    with_gradients: bool,
) -> _Scores:
    """Scores of C tokens against this device's V ids, the first of which is `first`."""
    logits = jnp.einsum("cd,vd->cv", hidden, weights, preferred_element_type=jnp.float32)
    known = first + lax.broadcasted_iota(jnp.int32, logits.shape, 1) < head.valid_vocab
    capped, slope = _soft_cap(head.final_cap, logits)
    if head.final_cap is not None and head.final_cap <= LARGEST_CAP_WITHOUT_MAXIMUM:
        shift = jnp.zeros(logits.shape[:1], jnp.float32)
    else:
        shift = jnp.max(jnp.where(known, capped, -jnp.inf), axis=1)
        shift = _over_vocabulary(head, lax.pmax, shift)
    # Padded rows of the table are masked after the cap, which would make −inf finite.
    exponential = jnp.where(known, jnp.exp(capped - shift[:, None]), 0.0)
    return _Scores(
        unnormalised=(slope * exponential).astype(hidden.dtype) if with_gradients else None,
        total=_over_vocabulary(head, lax.psum, jnp.sum(exponential, axis=1)),
        shift=shift,
        slot_logits=_of_own_columns(
            head, weights.shape[0], column, lambda column: logits[token, column]
        ),
    )


def _fused_scores(
    head: Head,
    hidden: jax.Array,
    weights: jax.Array,
    first: Any,
    token: jax.Array,
    column: jax.Array,
    with_gradients: bool,
) -> _Scores:
    """As `_scores`, by the kernel that keeps logits in registers; those of slots are its own."""
    assert head.final_cap is not None
    width = weights.shape[0]
    valid = jnp.clip(jnp.int32(head.valid_vocab) - first, 0, width)
    # Compiled apart, so that the first chunk and the loop share what is lowered.
    scores = jax.jit(head_hopper.scores, static_argnames=("cap", "gradient"))
    unnormalised, total = scores(
        hidden, weights, valid, cap=head.final_cap, gradient=with_gradients
    )

    def products(column: jax.Array) -> jax.Array:
        # No [N, D] of gathered rows exists: XLA reads them as it sums.
        left, right = hidden[token], weights[column]
        return jnp.sum(left.astype(jnp.float32) * right.astype(jnp.float32), axis=1)

    return _Scores(
        unnormalised,
        total=_over_vocabulary(head, lax.psum, total),
        shift=jnp.zeros(hidden.shape[:1], jnp.float32),
        slot_logits=_of_own_columns(head, width, column, products),
    )


def _times_table(head: Head, unnormalised: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 [C, D], G·W of this device's part of the vocabulary."""
    if head.kernel == "hopper":
        return jax.jit(head_hopper.hidden_gradient)(unnormalised, weights)
    return jnp.einsum("cv,vd->cd", unnormalised, weights, preferred_element_type=jnp.float32)


def _over_vocabulary(head: Head, combine: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Combine what each device found in its part of the vocabulary."""
    return x if head.vocab_axis is None else combine(x, head.vocab_axis)


def _of_own_columns(
    head: Head, width: int, column: jax.Array, look_up: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """float32 [N], look_up(column) on the device whose part of the vocabulary has the column.

    A column counts from this device's first id; it is the table's own if nothing cuts it.
    """
    if head.vocab_axis is None:
        return look_up(column)
    is_own = (column >= 0) & (column < width)
    found = jnp.where(is_own, look_up(jnp.where(is_own, column, 0)), 0.0)
    return lax.psum(found, head.vocab_axis)


def _soft_cap(cap: float | None, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(c·tanh(z/c), its derivative 1 − tanh²(z/c)); (z, 1) without a cap."""
    if cap is None:
        return logits, jnp.ones_like(logits)
    ratio = jnp.tanh(logits / cap)
    return cap * ratio, 1 - ratio * ratio
