"""Samplers: from a block's next-token distributions to a fixed number of stored entries (JAX).

Each sampler proposes entries (position, id, weight); one shared step sorts them, merges repeats
and counts. Nothing of the size of a block times the vocabulary is sorted or cumulated: picks are
found by searching the sums of chunks of the vocabulary, then one chunk. Shapes are fixed.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from schemas.errors import BudgetError
from schemas.manifest import SamplerSpec

_CHUNK = 128
_MAX_PASSES = 64
# A tail entry's inclusion probability stays this far below 1: rounding cannot pick it twice.
_HEAD_SLACK = 1e-3
_NOWHERE = jnp.iinfo(jnp.int32).max

UNBIASED = {"threshold": True, "multinomial": True, "full": True, "top_k": False}
"""Whether the mean of a sampler's weights over seeds is the teacher's probability."""


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
    probabilities = jnp.where(predicted[:, None], jnp.exp(log_probs), 0.0)
    proposed = _SAMPLERS[spec.name](spec, probabilities, predicted, key)
    return _settle(proposed, spec.entries_per_block, *probabilities.shape)


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
    tau = _solve_tau(p, slots)
    slack = tau * (1.0 - _HEAD_SLACK)
    threshold = jnp.where(jnp.sum(p >= slack) < slots, slack, tau)
    is_head = (p >= threshold) & (p > 0.0)
    num_heads = jnp.sum(is_head)
    tail = _chunked(jnp.where(is_head, 0.0, p))
    mass = jnp.sum(tail, axis=(1, 2))
    num_tails = jnp.where(jnp.sum(mass) > 0.0, slots - num_heads, 0)
    spacing = jnp.sum(mass) / jnp.maximum(num_tails, 1).astype(jnp.float32)

    index = jnp.arange(slots)
    heads = _nth_true(_chunked(is_head), index, vocab)
    heads = jnp.where(index < num_heads, heads, _NOWHERE)
    head_weight = p.reshape(-1)[jnp.minimum(heads, p.size - 1)]

    position, point = _systematic(mass / spacing, num_tails, slots, key)
    tails = _pick(tail, position, point * spacing, vocab)
    tails = jnp.where(index < num_tails, tails, _NOWHERE)
    return _Proposed(
        jnp.concatenate([heads, tails]),
        jnp.concatenate([head_weight, jnp.broadcast_to(spacing, (slots,))]),
    )


def _solve_tau(p: Array, slots: int) -> Array:
    """tau with sum(min(1, p / tau)) = slots; 0 if no more than `slots` entries are above zero.

    From tau = mass / slots, the step tau <- tail mass / (slots - heads) only falls and ends at the
    solution once the number of heads stays the same.
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
    return jnp.where(jnp.sum(p > 0.0) <= slots, 0.0, tau)


def _systematic(mass: Array, total: Array, slots: int, key: Array) -> tuple[Array, Array]:
    """Grid points u, u + 1, … over positions of given mass [B] (in grid steps, sum `total`).

    Returns for each of `slots` points its position int32 and its place inside the position's mass.
    Sums over positions are exact, in fixed point: float32 would misplace points by 1e-4 steps, more
    than the mass of most vocabulary entries.
    """
    bits = 30 - (mass.shape[0] - 1).bit_length()
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

    offset = jax.random.bits(key, (), jnp.uint32) >> (32 - bits)
    # Points at or before the end of each position: floor(cumulative mass + 1 - u) for u in (0, 1].
    fractions = jnp.cumsum(fraction) + offset
    reached = jnp.cumsum(whole) + (fractions >> bits).astype(jnp.int32)
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), reached[:-1]])
    # The first point of a position lies 1 - frac(start + offset) after its start.
    start = jnp.concatenate([offset[None], fractions[:-1]]) & jnp.uint32(2**bits - 1)
    first = (jnp.uint32(2**bits) - start).astype(jnp.float32) / unit
    index = jnp.arange(slots)
    position = jnp.minimum(jnp.searchsorted(reached, index, side="right"), mass.shape[0] - 1)
    return position, first[position] + (index - before[position]).astype(jnp.float32)


def _multinomial(spec: SamplerSpec, p: Array, predicted: Array, key: Array) -> _Proposed:
    """Draws with replacement, weight count / draws (random-sampling KD, arXiv 2503.16870)."""
    assert spec.draws is not None
    positions, vocab = p.shape
    chunked = _chunked(p)
    mass = jnp.sum(chunked, axis=(1, 2))
    position = jnp.repeat(jnp.arange(positions), spec.draws)
    point = jax.random.uniform(key, position.shape) * mass[position]
    flat = jnp.where(predicted[position], _pick(chunked, position, point, vocab), _NOWHERE)
    return _Proposed(flat, jnp.full(flat.shape, 1.0 / spec.draws, jnp.float32))


def _top_k(spec: SamplerSpec, p: Array, predicted: Array, key: Array) -> _Proposed:
    """The k most probable ids of each position with their probabilities; biased."""
    positions, vocab = p.shape
    weight, ids = jax.lax.top_k(p, spec.entries_per_token)
    flat = jnp.arange(positions)[:, None] * vocab + ids
    keep = predicted[:, None] & (weight > 0.0)
    return _Proposed(jnp.where(keep, flat, _NOWHERE).reshape(-1), weight.reshape(-1))


def _full(spec: SamplerSpec, p: Array, predicted: Array, key: Array) -> _Proposed:
    """Every id above zero."""
    flat = jnp.arange(p.size)
    return _Proposed(jnp.where(p.reshape(-1) > 0.0, flat, _NOWHERE), p.reshape(-1))


_SAMPLERS = {
    "threshold": _threshold,
    "multinomial": _multinomial,
    "top_k": _top_k,
    "full": _full,
}


def _chunked(x: Array) -> Array:
    """[B, V] as [B, chunks, _CHUNK], padded with zeros (False)."""
    positions, vocab = x.shape
    chunks = -(-vocab // _CHUNK)
    padded = jnp.pad(x, ((0, 0), (0, chunks * _CHUNK - vocab)))
    return padded.reshape(positions, chunks, _CHUNK)


def _nth_true(mask: Array, index: Array, vocab: int) -> Array:
    """Flat index (position * vocab + id) of the index-th True of mask [B, chunks, _CHUNK]."""
    chunks = mask.shape[1]
    reached = jnp.cumsum(jnp.sum(mask, axis=2, dtype=jnp.int32).reshape(-1))
    chunk = jnp.minimum(jnp.searchsorted(reached, index, side="right"), reached.size - 1)
    members = mask.reshape(-1, _CHUNK)[chunk]
    before = reached[chunk] - jnp.sum(members, axis=1, dtype=jnp.int32)
    rank = jnp.cumsum(members, axis=1, dtype=jnp.int32) - 1
    inside = jnp.argmax(members & (rank == (index - before)[:, None]), axis=1)
    return ((chunk // chunks) * vocab + (chunk % chunks) * _CHUNK + inside).astype(jnp.int32)


def _pick(mass: Array, position: Array, point: Array, vocab: int) -> Array:
    """Flat index of the element under `point` [M] of the cumulative mass of its position [M].

    mass [B, chunks, _CHUNK] >= 0. A point that rounding puts past the end takes the last element
    that has mass.
    """
    cumulative = jnp.cumsum(jnp.sum(mass, axis=2), axis=1)
    chunks = cumulative.shape[1]
    # Just below the end, so that the search always ends on a chunk with mass.
    point = jnp.minimum(point, cumulative[position, -1] * (1.0 - 1e-7))
    low = jnp.zeros(position.shape, jnp.int32)
    high = jnp.full(position.shape, chunks - 1, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        is_right = cumulative[position, middle] <= point
        return jnp.where(is_right, middle + 1, low), jnp.where(is_right, high, middle)

    low, _ = jax.lax.fori_loop(0, (chunks - 1).bit_length() + 1, halve, (low, high))
    chunk = jnp.minimum(low, chunks - 1)
    start = jnp.where(chunk > 0, cumulative[position, jnp.maximum(chunk - 1, 0)], 0.0)
    members = mass[position, chunk]
    past = jnp.cumsum(members, axis=1) > (point - start)[:, None]
    last = _CHUNK - 1 - jnp.argmax(members[:, ::-1] > 0.0, axis=1)
    inside = jnp.where(jnp.any(past, axis=1), jnp.argmax(past, axis=1), last)
    return (position * vocab + chunk * _CHUNK + inside).astype(jnp.int32)


sample_block_jit = partial(jax.jit, static_argnums=0)(sample_block)
