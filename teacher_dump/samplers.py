"""Samplers: from a block's next-token distributions to a fixed number of stored entries (JAX).

Each sampler proposes entries (position, id, weight); one shared step sorts them, merges repeats
and counts. Nothing of the size of a block times the vocabulary is sorted, cumulated or copied:
picks are found by searching the sums of chunks of the vocabulary, then one chunk. Shapes are fixed.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from schemas.errors import BudgetError
from schemas.manifest import SamplerName, SamplerSpec

_CHUNK = 128
_MAX_PASSES = 64
# A tail entry's inclusion probability stays this far below 1, so that float32 rounding (1e-5 at
# 200 picks in one position) cannot pick it twice. Larger would put more heads below the tail's
# weight, and then tail codes are no longer all 0.
_HEAD_SLACK = 1e-4
# A position's chunk masses are cumulated as integers that sum to about this.
_FULL_BITS = 30
# A float32 in [0, 1) has this many bits; the rest of an integer in [0, 2^30) is drawn at random.
_FLOAT_BITS = 24
_NOWHERE = jnp.iinfo(jnp.int32).max
# Smallest normal float32: below, a probability is 0 (some devices flush such numbers anyway).
_TINY = float(jnp.finfo(jnp.float32).tiny)


class BlockTargets(NamedTuple):
    """Entries of one block of B positions; K slots, used ones first, sorted by (position, id).

    entry_id int32 [K], -1 unused; entry_position int32 [K], B - 1 unused; entry_weight float32 [K],
    0 unused; entry_count int32 [B]; floor float32 [], the smallest used weight (1 if none is used);
    overflow bool [], True if entries did not fit and the block must be refused.
    """

    entry_id: Array
    entry_position: Array
    entry_weight: Array
    entry_count: Array
    floor: Array
    overflow: Array


class _Proposed(NamedTuple):
    """flat int32 [M]: position * V + id, or _NOWHERE; weight float32 [M]."""

    flat: Array
    weight: Array


class Sampler(NamedTuple):
    """propose(spec, p float32 [B, V], predicted bool [B], key) -> entries, and what it promises."""

    propose: Callable[[SamplerSpec, Array, Array, Array], _Proposed]
    unbiased: bool
    """Whether the mean of the weights over seeds is the teacher's probability."""


def check(spec: SamplerSpec, vocab_size: int) -> None:
    """Raise BudgetError if `spec` cannot be met at this vocabulary, before anything is computed."""
    if spec.name == "full" and spec.entries_per_token != vocab_size:
        raise BudgetError(
            f"The full sampler stores the whole vocabulary, so entries_per_token must be "
            f"{vocab_size}, but it is {spec.entries_per_token}; set it so."
        )
    if spec.entries_per_token > vocab_size:
        raise BudgetError(
            f"entries_per_token must be at most the vocabulary size {vocab_size}, but it is "
            f"{spec.entries_per_token}; lower it."
        )
    if spec.block_tokens * vocab_size >= _NOWHERE:
        raise BudgetError(
            f"block_tokens times the vocabulary size must be below {_NOWHERE}, but it is "
            f"{spec.block_tokens} x {vocab_size}; use a shorter block."
        )


def sample_block(spec: SamplerSpec, log_probs: Array, predicted: Array, key: Array) -> BlockTargets:
    """Sample one block: log_probs float32 [B, V] (-inf: never), predicted bool [B], a PRNG key.

    Positions that are not predicted get no entries. A pure function of its arguments.
    """
    p = jnp.where(predicted[:, None], jnp.exp(log_probs), 0.0)
    p = jnp.where(p < _TINY, 0.0, p)
    proposed = SAMPLERS[spec.name].propose(spec, p, predicted, key)
    return _settle(proposed, spec.entries_per_block, *p.shape)


def _settle(proposed: _Proposed, slots: int, positions: int, vocab: int) -> BlockTargets:
    """Sort, merge entries of the same position and id (weights add up), count, cut to `slots`."""
    flat, weight = jax.lax.sort((proposed.flat, proposed.weight), num_keys=1)
    is_first = jnp.concatenate([jnp.ones((1,), bool), flat[1:] != flat[:-1]])
    used = flat != _NOWHERE
    group = jnp.cumsum(is_first.astype(jnp.int32)) - 1
    merged_weight = (
        jnp.zeros((slots,), jnp.float32).at[group].add(jnp.where(used, weight, 0.0), mode="drop")
    )
    merged_flat = jnp.full((slots,), _NOWHERE, jnp.int32).at[group].set(flat, mode="drop")
    total = jnp.sum(is_first & used)
    in_use = merged_flat != _NOWHERE
    position = jnp.where(in_use, merged_flat // vocab, positions - 1)
    counts = jnp.zeros((positions,), jnp.int32).at[position].add(in_use.astype(jnp.int32))
    floor = jnp.min(jnp.where(in_use, merged_weight, 1.0))
    return BlockTargets(
        entry_id=jnp.where(in_use, merged_flat % vocab, -1),
        entry_position=position,
        entry_weight=jnp.where(in_use, merged_weight, 0.0),
        entry_count=counts,
        floor=floor,
        overflow=total > slots,
    )


def _threshold(spec: SamplerSpec, p: Array, predicted: Array, key: Array) -> _Proposed:
    """Exact head, systematically sampled tail (VarOpt; Szegedy and Thorup, 2007).

    With tau such that sum(min(1, p / tau)) is the budget, p >= tau is kept as it is and the rest is
    included with probability p / tau and weight tau. Systematic sampling over (position, id) order
    makes the number of entries exact.
    """
    slots = spec.entries_per_block
    vocab = p.shape[1]
    chunked = _chunked(p)
    tau = _solve_tau(p, slots)
    slack = jnp.maximum(tau * (1.0 - _HEAD_SLACK), _TINY)
    heads, tail = _head_and_tail(chunked, slack)
    # Where near-heads would use up the budget of the tail (all p about equal), they stay in it.
    fits = (jnp.sum(heads) < slots) | (jnp.sum(tail) == 0.0)
    limit = jnp.where(fits, slack, jnp.maximum(tau, _TINY))
    heads, tail = jax.lax.cond(fits, lambda: (heads, tail), lambda: _head_and_tail(chunked, limit))
    num_heads = jnp.sum(heads)
    mass = jnp.sum(tail, axis=1)
    total = jnp.sum(mass)
    num_tails = jnp.where(total > 0.0, slots - num_heads, 0)
    spacing = jnp.where(num_tails > 0, total / jnp.maximum(num_tails, 1).astype(jnp.float32), 1.0)

    index = jnp.arange(slots)
    head = _nth_head(chunked, heads, limit, index, vocab)
    head = jnp.where(index < num_heads, head, _NOWHERE)
    head_weight = p.reshape(-1)[jnp.minimum(head, p.size - 1)]

    offset_key, pick_key = jax.random.split(key)
    position, fraction = _systematic(mass / spacing, num_tails, slots, offset_key)
    picked = _pick(chunked, tail, limit, position, fraction, pick_key, vocab)
    picked = jnp.where(index < num_tails, picked, _NOWHERE)
    return _Proposed(
        jnp.concatenate([head, picked]),
        jnp.concatenate([head_weight, jnp.broadcast_to(spacing, (slots,))]),
    )


def _solve_tau(p: Array, slots: int) -> Array:
    """tau with sum(min(1, p / tau)) = slots; if no more than that are above zero, tau <= them all.

    From tau = mass / slots, the step tau <- tail mass / (slots - heads) only falls and ends at the
    solution once the number of heads stays the same: 2 to 6 passes on a language model's blocks. A
    pass that adds one head has divided tau by the slots left, so float32's range bounds the passes
    by about 35 (log 35! > 87), below _MAX_PASSES.
    """

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tau, heads, passes = state
        is_head = p >= tau
        now = jnp.sum(is_head)
        tail = jnp.sum(jnp.where(is_head, 0.0, p))
        room = jnp.maximum(slots - now, 1).astype(jnp.float32)
        new = jnp.where(now < slots, tail / room, tau)
        same = now == heads
        return jnp.where(same, tau, new), now, jnp.where(same, _MAX_PASSES, passes + 1)

    start = (jnp.sum(p) / slots, jnp.int32(-1), jnp.int32(0))
    tau, _, _ = jax.lax.while_loop(lambda state: state[2] < _MAX_PASSES, step, start)
    return tau


def _head_and_tail(chunked: Array, limit: Array) -> tuple[Array, Array]:
    """Per chunk, how many p >= limit int32 [B, C] and the mass of the others float32 [B, C]."""
    is_head = chunked >= limit
    heads = jnp.sum(is_head, axis=2, dtype=jnp.int32)
    return heads, jnp.sum(jnp.where(is_head, 0.0, chunked), axis=2)


def _systematic(mass: Array, total: Array, slots: int, key: Array) -> tuple[Array, Array]:
    """Grid points u, u + 1, … over positions of given mass [B] (in grid steps, sum `total`).

    Returns for each of `slots` points its position int32 and where in the position's mass it falls,
    float32 in [0, 1]. Sums over positions are exact, in fixed point: float32 would misplace points
    by 1e-4 steps, more than the mass of most vocabulary entries.
    """
    bits = _FULL_BITS - (mass.shape[0] - 1).bit_length()
    unit = jnp.float32(2**bits)
    whole = jnp.floor(mass)
    fraction = jnp.round((mass - whole) * unit).astype(jnp.uint32)
    whole = whole.astype(jnp.int32)
    # Give what rounding left over to the largest position, so that the total is exact.
    carry = jnp.sum(fraction)
    have = jnp.sum(whole) + (carry >> bits).astype(jnp.int32)
    rest = (carry & jnp.uint32(2**bits - 1)).astype(jnp.int32)
    missing = (total.astype(jnp.int32) - have) * 2**bits - rest
    largest = jnp.argmax(mass)
    adjusted = fraction[largest].astype(jnp.int32) + missing
    whole = whole.at[largest].add(adjusted >> bits)
    fraction = fraction.at[largest].set((adjusted & (2**bits - 1)).astype(jnp.uint32))

    offset_key, rest_key = jax.random.split(key)
    offset = jax.random.bits(offset_key, (), jnp.uint32) >> (32 - bits)
    # Points at or before the end of each position: floor(cumulative mass + 1 - u) for u in (0, 1].
    fractions = jnp.cumsum(fraction) + offset
    reached = jnp.cumsum(whole) + (fractions >> bits).astype(jnp.int32)
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), reached[:-1]])
    # The first point of a position lies 1 - frac(start + offset) after its start.
    start = jnp.concatenate([offset[None], fractions[:-1]]) & jnp.uint32(2**bits - 1)
    first = (jnp.uint32(2**bits) - start).astype(jnp.float32) / unit
    index = jnp.arange(slots)
    position = jnp.minimum(jnp.searchsorted(reached, index, side="right"), mass.shape[0] - 1)
    # Below the fixed point's unit the offset is drawn too; it never moves a point's position.
    below_unit = jax.random.uniform(rest_key) / unit
    point = first[position] - below_unit + (index - before[position]).astype(jnp.float32)
    width = whole.astype(jnp.float32) + fraction.astype(jnp.float32) / unit
    return position, jnp.clip(point / jnp.maximum(width[position], _TINY), 0.0, 1.0)


def _multinomial(spec: SamplerSpec, p: Array, predicted: Array, key: Array) -> _Proposed:
    """Draws with replacement, weight count / draws (random-sampling KD, arXiv 2503.16870)."""
    assert spec.draws is not None
    positions, vocab = p.shape
    chunked = _chunked(p)
    position = jnp.repeat(jnp.arange(positions), spec.draws)
    point_key, pick_key = jax.random.split(key)
    bits = jax.random.bits(point_key, position.shape, jnp.uint32)
    fraction = bits.astype(jnp.float32) * 2.0**-32
    limit = jnp.float32(jnp.inf)
    flat = _pick(chunked, jnp.sum(chunked, axis=2), limit, position, fraction, pick_key, vocab)
    flat = jnp.where(predicted[position], flat, _NOWHERE)
    return _Proposed(flat, jnp.full(flat.shape, 1.0 / spec.draws, jnp.float32))


def _top_k(spec: SamplerSpec, p: Array, predicted: Array, key: Array) -> _Proposed:
    """The k most probable ids of each position with their probabilities; biased."""
    positions, vocab = p.shape
    weight, ids = jax.lax.top_k(p, spec.entries_per_token)
    flat = jnp.arange(positions)[:, None] * vocab + ids
    return _Proposed(jnp.where(weight > 0.0, flat, _NOWHERE).reshape(-1), weight.reshape(-1))


def _full(spec: SamplerSpec, p: Array, predicted: Array, key: Array) -> _Proposed:
    """Every id above zero."""
    flat = jnp.arange(p.size)
    return _Proposed(jnp.where(p.reshape(-1) > 0.0, flat, _NOWHERE), p.reshape(-1))


SAMPLERS: dict[SamplerName, Sampler] = {
    "threshold": Sampler(_threshold, unbiased=True),
    "multinomial": Sampler(_multinomial, unbiased=True),
    "full": Sampler(_full, unbiased=True),
    "top_k": Sampler(_top_k, unbiased=False),
}


def _chunked(p: Array) -> Array:
    """[B, V] as [B, C, _CHUNK], padded with zeros."""
    positions, vocab = p.shape
    chunks = -(-vocab // _CHUNK)
    padded = jnp.pad(p, ((0, 0), (0, chunks * _CHUNK - vocab)))
    return padded.reshape(positions, chunks, _CHUNK)


def _nth_head(chunked: Array, heads: Array, limit: Array, index: Array, vocab: int) -> Array:
    """Flat index (position * vocab + id) of the index-th p >= limit; heads int32 [B, C] of them."""
    chunks = chunked.shape[1]
    reached = jnp.cumsum(heads.reshape(-1))
    chunk = jnp.minimum(jnp.searchsorted(reached, index, side="right"), reached.size - 1)
    rank = index - (reached[chunk] - heads.reshape(-1)[chunk])
    is_head = chunked.reshape(-1, _CHUNK)[chunk] >= limit
    inside = jnp.argmax(jnp.cumsum(is_head, axis=1, dtype=jnp.int32) > rank[:, None], axis=1)
    return ((chunk // chunks) * vocab + (chunk % chunks) * _CHUNK + inside).astype(jnp.int32)


def _pick(
    chunked: Array,
    mass: Array,
    limit: Array,
    position: Array,
    fraction: Array,
    key: Array,
    vocab: int,
) -> Array:
    """Flat index of the element of 0 < p < limit at `fraction` [M] of the mass of `position` [M].

    mass float32 [B, C] is that of each chunk's elements below the limit; fraction float32 in
    [0, 1], rounded to nearest. Chunks are cumulated as integers, which is exact; `key` draws the
    bits of the place that rounding lost, so that an element of a billionth of the position is still
    found with its own probability.
    """
    chunks = mass.shape[1]
    end = 2**_FULL_BITS
    whole = jnp.maximum(jnp.sum(mass, axis=1, keepdims=True), _TINY)
    widths = jnp.round(mass / whole * float(end)).astype(jnp.int32)
    # The largest chunk takes what rounding left over, so that each position's end is the same.
    left_over = end - jnp.sum(widths, axis=1, keepdims=True)
    is_largest = jnp.arange(chunks)[None, :] == jnp.argmax(widths, axis=1)[:, None]
    widths = widths + jnp.where(is_largest, left_over, 0)
    reached = jnp.cumsum(widths, axis=1)
    bits = jax.random.bits(key, position.shape, jnp.uint32)
    cell = 2 ** (_FULL_BITS - _FLOAT_BITS)
    dither = (bits & jnp.uint32(cell - 1)).astype(jnp.int32) - cell // 2
    # Mirrored at both ends, which leaves the density even.
    point = jnp.abs((fraction * float(end)).astype(jnp.int32) + dither)
    point = jnp.where(point >= end, 2 * (end - 1) - point + 1, point)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        is_right = reached[position, middle] <= point
        return jnp.where(is_right, middle + 1, low), jnp.where(is_right, high, middle)

    low = jnp.zeros(position.shape, jnp.int32)
    high = jnp.full(position.shape, chunks - 1, jnp.int32)
    chunk, _ = jax.lax.fori_loop(0, (chunks - 1).bit_length(), halve, (low, high))
    width = widths[position, chunk]
    place = (point - (reached[position, chunk] - width)).astype(jnp.float32)
    noise = (bits >> (32 - _FLOAT_BITS)).astype(jnp.float32) * 2.0**-_FLOAT_BITS
    share = (place + noise) / jnp.maximum(width, 1).astype(jnp.float32)
    members = chunked[position, chunk]
    members = jnp.where(members < limit, members, 0.0)
    cumulative = jnp.cumsum(members, axis=1)
    # Only what has mass can be picked, whatever rounding does to the sums.
    has_mass = members > 0.0
    past = (cumulative > (share * cumulative[:, -1])[:, None]) & has_mass
    last = _CHUNK - 1 - jnp.argmax(has_mass[:, ::-1], axis=1)
    inside = jnp.where(jnp.any(past, axis=1), jnp.argmax(past, axis=1), last)
    return (position * vocab + chunk * _CHUNK + inside).astype(jnp.int32)


sample_block_jit = partial(jax.jit, static_argnums=0)(sample_block)
