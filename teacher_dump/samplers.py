"""Samplers on the accelerator: a tile's next-token distributions to points on ids (JAX).

A tile is a run of a row's positions whose scores exist at once. Its scores are read once, for the
sums of chunks of the vocabulary; all else works on those sums and on the few chunks that a point
falls into. `teacher_dump.targets` settles what is proposed here into the entries that are stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from schemas.errors import BudgetError
from schemas.manifest import SamplerName, SamplerSpec

CHUNK = 128
"""Ids that are summed together; the vocabulary of the scores is padded to a multiple of it."""
LARGEST_SCORE_WITHOUT_MAXIMUM = 60.0
"""Scores within ±60 need no maximum: e^60 · 2^20 ids stays within float32, in both directions."""

# Entries that a tile has room for: so many times the slots of its blocks. What does not fit the
# slots is thinned later, which wants to see all that there is.
_ROOM = 2
# A position's chunk sums are cumulated as integers that end at 2^30 exactly.
_FULL_BITS = 30
_HALF_BITS = _FULL_BITS // 2
_HALF_MASK = 2**_HALF_BITS - 1
_UNIT = 2.0**-_FULL_BITS
# Smallest normal float32: below, a probability is 0 (some devices flush such numbers anyway).
_TINY = float(jnp.finfo(jnp.float32).tiny)


class Tile(NamedTuple):
    """Next-token distributions of B positions over C chunks of ids.

    scores float32 [B, C, CHUNK], -inf for what is no id; predicted bool [B]; log_total float32 [B],
    the scores' log-sum-exp; mass float32 [B, C], the sum of a chunk's probabilities.
    """

    scores: Array
    predicted: Array
    log_total: Array
    mass: Array

    def probabilities(self, position: Array, chunk: Array) -> Array:
        """float32 [M, CHUNK] of chunks [M] of positions [M]."""
        p = jnp.exp(self.scores[position, chunk] - self.log_total[position][:, None])
        return jnp.where(p < _TINY, 0.0, p)


class Candidates(NamedTuple):
    """position, id int32 [M]; points [M], 0 where there is no candidate.

    int32 where the sampler draws points, float32 where it proposes exact probabilities as points.
    """

    position: Array
    id: Array
    points: Array


class Sampler(NamedTuple):
    """propose(spec, vocab_size, tile, key) → candidates, and what it promises."""

    propose: Callable[[SamplerSpec, int, Tile, Array], Candidates]
    unbiased: bool
    """Whether the mean of the weights over seeds is the teacher's probability."""


def check(spec: SamplerSpec, vocab_size: int) -> None:
    """Raise BudgetError if `spec` cannot be met at this vocabulary, before anything is computed."""
    if spec.name == "full" and spec.slots_per_token != vocab_size:
        raise BudgetError(
            f"The full sampler stores the whole vocabulary, so slots_per_token must be "
            f"{vocab_size}, but it is {spec.slots_per_token}; set it so."
        )
    if spec.slots_per_token > vocab_size + 1:
        raise BudgetError(
            f"slots_per_token must be at most the vocabulary's {vocab_size} ids and the rest, but "
            f"it is {spec.slots_per_token}; lower it."
        )
    if spec.name == "top_k" and spec.slots_per_token < 2:
        raise BudgetError(
            "top_k needs a slot for an id and one for the rest, but slots_per_token is "
            f"{spec.slots_per_token}; raise it."
        )


def make_tile(scores: Array, predicted: Array, largest_score: float | None) -> tuple[Tile, Array]:
    """A tile and the entropy float32 [B] in nats of scores [B, V], V a multiple of CHUNK.

    largest_score bounds the finite scores' magnitude, if it is known; -inf is no id.
    """
    rows, vocab = scores.shape
    if largest_score is not None and largest_score <= LARGEST_SCORE_WITHOUT_MAXIMUM:
        shift = jnp.zeros((rows,), jnp.float32)
    else:
        shift = jnp.max(scores, axis=1)
    chunked = scores.reshape(rows, vocab // CHUNK, CHUNK)
    shifted = chunked - shift[:, None, None]
    e = jnp.exp(shifted)
    sums = jnp.sum(e, axis=2)
    # Together with the sums, so that the scores are read once.
    moments = jnp.sum(jnp.where(e > 0.0, e * shifted, 0.0), axis=2)
    total = jnp.sum(sums, axis=1)
    entropy = jnp.log(total) - jnp.sum(moments, axis=1) / total
    tile = Tile(chunked, predicted, shift + jnp.log(total), sums / total[:, None])
    return tile, jnp.where(predicted, jnp.maximum(entropy, 0.0), 0.0)


def propose(spec: SamplerSpec, vocab_size: int, tile: Tile, key: Array) -> Candidates:
    """The sampler's candidates: a pure function of its arguments."""
    return SAMPLERS[spec.name].propose(spec, vocab_size, tile, key)


def expected_entries(name: SamplerName, tile: Tile, points: Array) -> Array:
    """float32 [P]: the expected number of entries of a tile for each of `points` int32 [P]."""
    p = jnp.exp(tile.scores - tile.log_total[:, None, None])
    p = jnp.where(tile.predicted[:, None, None], p, 0.0)

    def count(number: Array) -> Array:
        n = number.astype(jnp.float32)
        if name == "systematic":
            return jnp.sum(jnp.minimum(p * n, 1.0))
        return jnp.sum(-jnp.expm1(n * jnp.log1p(-jnp.minimum(p, 1.0))))

    return jax.lax.map(count, points)


def _systematic(spec: SamplerSpec, vocab_size: int, tile: Tile, key: Array) -> Candidates:
    """Evenly spaced points over each position's cumulated probabilities, from a random one on.

    An id of probability p gets floor(points · p) of them or one more, so that p is met in the mean
    and missed by less than one point: systematic sampling (Madow 1949; Szegedy and Thorup 2007 on
    why nothing unbiased does better for all sums). An id of p < 1 / points is included with
    probability points · p, as in threshold sampling.
    """
    positions = len(tile.mass)
    place_key, rest_key = jax.random.split(key)
    ends = _integer_ends(tile.mass)
    offset = jax.random.bits(place_key, (positions,), jnp.uint32) >> (32 - _FULL_BITS)
    # Below the integers' unit a point's place is drawn too; it never moves it to another chunk.
    below_unit = jax.random.uniform(rest_key, (positions,))
    size = positions * spec.points
    room = min(_ROOM * spec.slots_per_token, spec.points) * positions

    def attempt(points: Array) -> tuple[Array, Array, Array]:
        """Each point's id [size], whether it is the id's first point, whether all have room."""
        ids = _ids_of_points(spec, tile, ends, offset[:, None], below_unit[:, None], points)
        is_first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        is_first &= tile.predicted[:, None] & (jnp.arange(spec.points) < points)[None, :]
        return ids.reshape(-1), is_first.reshape(-1), jnp.sum(is_first) <= room

    # A tile with more entries than there is room for is far from fitting its slots, so its points
    # are halved; all others, which is nearly all, take one attempt.
    points, ids, is_first, _ = jax.lax.while_loop(
        lambda state: ~state[3] & (state[0] > 1),
        lambda state: (state[0] // 2, *attempt(state[0] // 2)),
        (
            jnp.int32(2 * spec.points),
            jnp.zeros((size,), jnp.int32),
            jnp.zeros((size,), bool),
            jnp.bool_(False),
        ),
    )
    first = jnp.nonzero(is_first, size=room, fill_value=size)[0].astype(jnp.int32)
    exists = first < size
    position = jnp.where(exists, first // spec.points, 0)
    # An id's points end where the next id's begin, at the latest with the position's.
    following = jnp.append(first[1:], jnp.int32(size))
    stop = jnp.minimum(following, position * spec.points + points)
    return Candidates(
        position, ids[jnp.minimum(first, size - 1)], jnp.where(exists, stop - first, 0)
    )


def _ids_of_points(
    spec: SamplerSpec, tile: Tile, ends: Array, offset: Array, below_unit: Array, points: Array
) -> Array:
    """int32 [B, spec.points]: the id that each point falls on, of which the first `points` count.

    ends [B, C] of the chunks, as `_integer_ends`; offset uint32 and below_unit float32 [B, 1].
    """
    positions, chunks = ends.shape
    shape = (positions, spec.points)
    number = jnp.broadcast_to(jnp.arange(1, spec.points + 1, dtype=jnp.int32), shape)
    # How many points lie before the end of each chunk: point j is in the first with j or more.
    reached = _grid(ends, offset, points)[0].astype(jnp.int32)
    chunk = _search(lambda at: jnp.take_along_axis(reached, at, axis=1) < number, shape, chunks)
    end = jnp.take_along_axis(ends, chunk, axis=1)
    start = jnp.take_along_axis(ends, jnp.maximum(chunk - 1, 0), axis=1)
    start = jnp.where(chunk > 0, start, 0)
    before, since = _grid(start, offset, points)
    total = (_grid(end, offset, points)[0] - before).astype(jnp.int32)
    # In grid steps, from the chunk's start: its first point, and the ends of its ids.
    first = ((2**_FULL_BITS - since).astype(jnp.float32) - below_unit) * _UNIT
    width = (end - start).astype(jnp.float32) * points.astype(jnp.float32) * _UNIT
    nth, total, first, width = (
        x.reshape(-1, 1) for x in (number - before.astype(jnp.int32), total, first, width)
    )
    position = jnp.repeat(jnp.arange(positions, dtype=jnp.int32), spec.points)
    p = tile.probabilities(position, chunk.reshape(-1))
    share = jnp.cumsum(p, axis=1)
    share = share / jnp.maximum(share[:, -1:], _TINY)
    passed = jnp.floor(share * width - first).astype(jnp.int32) + 1
    # A chunk's number of points is exact; rounding here can only move one between its ids.
    is_end = jnp.arange(CHUNK)[None, :] >= _last_with_mass(p)[:, None]
    passed = jnp.where(is_end, total, jnp.clip(passed, 0, total))
    inside = jnp.sum(passed < nth, axis=1).astype(jnp.int32)
    return chunk * CHUNK + inside.reshape(shape)


def _search(is_before: Callable[[Array], Array], shape: tuple[int, ...], size: int) -> Array:
    """int32 of `shape`: the first index of `size` that is not before what is sought, by halving.

    is_before(index) tells for an index of `shape`; the last index is never before.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        is_right = is_before(middle)
        return jnp.where(is_right, middle + 1, low), jnp.where(is_right, high, middle)

    bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, size - 1, jnp.int32))
    return jax.lax.fori_loop(0, (size - 1).bit_length(), halve, bounds)[0]


def _last_with_mass(p: Array) -> Array:
    """int32 [M]: the last id of each chunk [M, CHUNK] that has any probability."""
    return CHUNK - 1 - jnp.argmax((p > 0.0)[:, ::-1], axis=1)


def _integer_ends(mass: Array) -> Array:
    """int32 [B, C]: cumulated chunk masses [B, C] as integers, of which the last is 2^30."""
    full = 2**_FULL_BITS
    whole = jnp.maximum(jnp.sum(mass, axis=1, keepdims=True), _TINY)
    widths = jnp.round(mass / whole * float(full)).astype(jnp.int32)
    # The largest chunk takes what rounding left over, so that each position's end is the same.
    left_over = full - jnp.sum(widths, axis=1, keepdims=True)
    chunks = mass.shape[1]
    is_largest = jnp.arange(chunks)[None, :] == jnp.argmax(widths, axis=1)[:, None]
    return jnp.cumsum(widths + jnp.where(is_largest, left_over, 0), axis=1)


def _grid(place: Array, offset: Array, points: Array) -> tuple[Array, Array]:
    """(whole, fraction) uint32 of (place · points + offset) / 2^30, the fraction in units of 2^-30.

    place ≤ 2^30, offset < 2^30, points < 2^16: exact in halves of 15 bits.
    """
    place, offset, points = (x.astype(jnp.uint32) for x in (place, offset, points))
    low = (place & _HALF_MASK) * points + (offset & _HALF_MASK)
    high = (place >> _HALF_BITS) * points + (offset >> _HALF_BITS) + (low >> _HALF_BITS)
    return high >> _HALF_BITS, ((high & _HALF_MASK) << _HALF_BITS) | (low & _HALF_MASK)


def _multinomial(spec: SamplerSpec, vocab_size: int, tile: Tile, key: Array) -> Candidates:
    """Independent draws, each a point (random-sampling KD, arXiv 2503.16870)."""
    positions, chunks = tile.mass.shape
    position = jnp.repeat(jnp.arange(positions, dtype=jnp.int32), spec.points)
    place_key, noise_key = jax.random.split(key)
    place = jax.random.bits(place_key, position.shape, jnp.uint32) >> (32 - _FULL_BITS)
    place = place.astype(jnp.int32)
    ends = _integer_ends(tile.mass)

    chunk = _search(lambda at: ends[position, at] <= place, position.shape, chunks)
    start = jnp.where(chunk > 0, ends[position, jnp.maximum(chunk - 1, 0)], 0)
    width = (ends[position, chunk] - start).astype(jnp.float32)
    share = (place - start).astype(jnp.float32) + jax.random.uniform(noise_key, position.shape)
    p = tile.probabilities(position, chunk)
    cumulated = jnp.cumsum(p, axis=1)
    # Only what has mass can be picked, whatever rounding does to the sums.
    past = (cumulated > (share / width * cumulated[:, -1])[:, None]) & (p > 0.0)
    inside = jnp.where(jnp.any(past, axis=1), jnp.argmax(past, axis=1), _last_with_mass(p))
    points = jnp.where(tile.predicted[position], 1, 0)
    return Candidates(position, chunk * CHUNK + inside.astype(jnp.int32), points)


def _top_k(spec: SamplerSpec, vocab_size: int, tile: Tile, key: Array) -> Candidates:
    """The most probable ids of each position with their probabilities, and the rest; biased."""
    positions = len(tile.mass)
    kept = spec.slots_per_token - 1
    best, ids = jax.lax.top_k(tile.scores.reshape(positions, -1), kept)
    p = jnp.exp(best - tile.log_total[:, None])
    p = jnp.concatenate([p, jnp.maximum(1.0 - jnp.sum(p, axis=1, keepdims=True), 0.0)], axis=1)
    rest = jnp.full((positions, 1), vocab_size, jnp.int32)
    return _exact(spec, tile, jnp.concatenate([ids.astype(jnp.int32), rest], axis=1), p)


def _full(spec: SamplerSpec, vocab_size: int, tile: Tile, key: Array) -> Candidates:
    """Every id above zero."""
    positions = len(tile.mass)
    p = jnp.exp(tile.scores.reshape(positions, -1)[:, :vocab_size] - tile.log_total[:, None])
    ids = jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32), p.shape)
    return _exact(spec, tile, ids, p)


def _exact(spec: SamplerSpec, tile: Tile, ids: Array, p: Array) -> Candidates:
    """Candidates of the probabilities p of ids [B, k], as points that are not whole yet."""
    position = jnp.repeat(jnp.arange(len(ids), dtype=jnp.int32), ids.shape[1])
    points = jnp.where(tile.predicted[:, None], p * float(spec.points), 0.0)
    return Candidates(position, ids.reshape(-1), points.reshape(-1))


SAMPLERS: dict[SamplerName, Sampler] = {
    "systematic": Sampler(_systematic, unbiased=True),
    "multinomial": Sampler(_multinomial, unbiased=True),
    "full": Sampler(_full, unbiased=True),
    "top_k": Sampler(_top_k, unbiased=False),
}
