"""Samplers on the accelerator: a tile's next-token distributions to points on ids (JAX).

A tile is a run of a row's positions whose scores exist at once. They are read once, for the sums of
chunks of the vocabulary; all else works on those sums and on the few chunks that a point falls
into. `teacher_dump.targets` settles what is proposed here into the entries that are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gemma2.model import soft_cap
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
# Places times twice the points stay within uint32 in halves.
_MOST_SYSTEMATIC_POINTS = 2**15 - 1
# Measured at 12 entries, one leaves 0.886 of the gradient's variance, two 0.873, six 0.869.
_SWEEPS = 2
# Smallest normal float32: below, a probability is 0 (some devices flush such numbers anyway).
_TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclass(frozen=True)
class Scoring:
    """How the products of a head become scores: the soft-cap, the temperature, ids that exist."""

    vocab_size: int
    temperature: float = 1.0
    cap: float | None = None

    def __call__(self, products: Array, columns: Array) -> Array:
        """float32 scores of products, whose columns these are; -inf for what is no id."""
        if self.cap is not None:
            products = soft_cap(products, self.cap)
        return jnp.where(columns < self.vocab_size, products / self.temperature, -jnp.inf)

    @property
    def needs_maximum(self) -> bool:
        """Whether exponentials of the scores may leave float32."""
        if self.cap is None:
            return True
        return self.cap / self.temperature > LARGEST_SCORE_WITHOUT_MAXIMUM


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tile:
    """Next-token distributions of B positions over C chunks of ids.

    products float32 [B, C, CHUNK] of the head, of which `scoring` makes scores where they are
    wanted, so that scores of all ids are never written; predicted bool [B]; log_total float32 [B],
    the scores' log-sum-exp; mass float32 [B, C], the sum of a chunk's probabilities.
    """

    products: Array
    predicted: Array
    log_total: Array
    mass: Array
    scoring: Scoring = field(metadata={"static": True})

    def probabilities(self, position: Array, chunk: Array) -> Array:
        """float32 [M, CHUNK] of chunks [M] of positions [M]."""
        columns = chunk[:, None] * CHUNK + jnp.arange(CHUNK)[None, :]
        scores = self.scoring(self.products[position, chunk], columns)
        p = jnp.exp(scores - self.log_total[position][:, None])
        return jnp.where(p < _TINY, 0.0, p)

    def log_probabilities(self, position: Array, column: Array) -> Array:
        """float32 [M] in nats, of columns [M] at positions [M]."""
        products = self.products[position, column // CHUNK, column % CHUNK]
        return self.scoring(products, column) - self.log_total[position]

    def scores(self) -> Array:
        """float32 [B, C · CHUNK]: all of them, for what cannot do with less."""
        products = self.products.reshape(len(self.products), -1)
        return self.scoring(products, jnp.arange(products.shape[1])[None, :])


class Candidates(NamedTuple):
    """position, id int32 [M]; points [M], 0 where there is no candidate.

    int32 where the sampler draws points, float32 where it proposes exact probabilities as points.
    """

    position: Array
    id: Array
    points: Array


class Balance(NamedTuple):
    """What is left open of a tile's candidates: pairs of them, of which one gets a point each.

    order int32 [M], a candidate's place among its position's open ones, in pairs, or -1; gram
    float32 [B, P, P], products of the pairs' differences in embedding; flip bool [B].
    """

    order: Array
    gram: Array
    flip: Array


class Draft(NamedTuple):
    """A tile's candidates, whose points may lack what `settle` gives them."""

    candidates: Candidates
    balance: Balance | None = None


class Sampler(NamedTuple):
    """propose(spec, vocab_size, tile, table, key) → draft, and what it promises."""

    propose: Callable[[SamplerSpec, int, Tile, Array, Array], Draft]
    unbiased: bool
    """Whether the mean of the weights over seeds is the teacher's probability."""


def check(spec: SamplerSpec, vocab_size: int) -> None:
    """Raise BudgetError if `spec` cannot be met at this vocabulary, before anything is computed."""
    if spec.name == "systematic" and spec.points > _MOST_SYSTEMATIC_POINTS:
        raise BudgetError(
            f"The systematic sampler draws at most {_MOST_SYSTEMATIC_POINTS} points a token, but "
            f"sampler.points is {spec.points}; lower it."
        )
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


def make_tile(products: Array, predicted: Array, scoring: Scoring) -> tuple[Tile, Array]:
    """A tile and the entropy float32 [B] in nats of products [B, V], V a multiple of CHUNK."""
    rows, vocab = products.shape
    products = products.reshape(rows, vocab // CHUNK, CHUNK)
    scores = scoring(products, jnp.arange(vocab).reshape(1, -1, CHUNK))
    if scoring.needs_maximum:
        shift = jnp.max(scores, axis=(1, 2))
    else:
        shift = jnp.zeros((rows,), jnp.float32)
    shifted = scores - shift[:, None, None]
    e = jnp.exp(shifted)
    # As one sum of complex numbers: of two sums XLA for GPUs writes all scores, and reads them.
    both = jnp.sum(jax.lax.complex(e, jnp.where(e > 0.0, e * shifted, 0.0)), axis=2)
    sums, moments = both.real, both.imag
    total = jnp.sum(sums, axis=1)
    entropy = jnp.log(total) - jnp.sum(moments, axis=1) / total
    tile = Tile(products, predicted, shift + jnp.log(total), sums / total[:, None], scoring)
    return tile, jnp.where(predicted, jnp.maximum(entropy, 0.0), 0.0)


def propose(spec: SamplerSpec, vocab_size: int, tile: Tile, table: Array, key: Array) -> Draft:
    """The sampler's candidates: a pure function of its arguments.

    table [V', D] holds the embeddings of the tile's ids; only `systematic` looks at it.
    """
    return SAMPLERS[spec.name].propose(spec, vocab_size, tile, table, key)


def settle(draft: Draft) -> Candidates:
    """The candidates of T tiles with all their points; every array of `draft` has T in front.

    Each pair's point goes to its first candidate (sign +1) or to its second (-1). From all +1 on,
    signs are turned one by one where that makes the sum of sign · difference of embeddings
    shorter, which is the error that the pairs add to the gradient in the hidden states. A sign
    drawn for the position then multiplies them all, so that each is +1 with probability 1/2
    whatever the embeddings are, and nothing is biased (compare sign balancing in discrepancy
    theory, for instance Alweiss, Liu and Sawhney, arXiv 2006.14009).
    """
    candidates, balance = draft
    if balance is None:
        return candidates
    gram = balance.gram
    pairs = gram.shape[-1]
    own = jnp.diagonal(gram, axis1=-2, axis2=-1)

    def turn(step: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        signs, towards = state
        pair = step % pairs
        sign = jax.lax.dynamic_index_in_dim(signs, pair, -1)
        gain = sign * jax.lax.dynamic_index_in_dim(towards, pair, -1)
        change = jnp.where(gain > jax.lax.dynamic_index_in_dim(own, pair, -1), -2.0 * sign, 0.0)
        column = jax.lax.dynamic_index_in_dim(gram, pair, -2, keepdims=False)
        signs = jax.lax.dynamic_update_index_in_dim(signs, sign + change, pair, -1)
        return signs, towards + change * column

    state = (jnp.ones(gram.shape[:-1], jnp.float32), jnp.sum(gram, axis=-1))
    signs, _ = jax.lax.fori_loop(0, _SWEEPS * pairs, turn, state)
    is_first = (signs > 0.0) ^ balance.flip[..., None]
    # Pairs that there was no room for are as those that were not turned.
    is_first = jnp.concatenate([is_first, ~balance.flip[..., None]], axis=-1)
    pair = jnp.minimum(balance.order // 2, pairs)

    def of_tile(is_first: Array, position: Array, pair: Array) -> Array:
        return is_first[position, pair]

    chosen = jax.vmap(of_tile)(is_first, candidates.position, pair)
    gets_one = (balance.order >= 0) & (chosen == (balance.order % 2 == 0))
    return candidates._replace(points=candidates.points + gets_one.astype(jnp.int32))


def expected_entries(name: SamplerName, tile: Tile, points: Array) -> Array:
    """float32 [P]: the expected number of entries of a tile for each of `points` int32 [P]."""
    p = jnp.exp(tile.scores() - tile.log_total[:, None])
    p = jnp.where(tile.predicted[:, None], p, 0.0)

    def count(number: Array) -> Array:
        n = number.astype(jnp.float32)
        if name == "systematic":
            return jnp.sum(jnp.minimum(p * n, 1.0))
        return jnp.sum(-jnp.expm1(n * jnp.log1p(-jnp.minimum(p, 1.0))))

    return jax.lax.map(count, points)


def _systematic(spec: SamplerSpec, vocab_size: int, tile: Tile, table: Array, key: Array) -> Draft:
    """Evenly spaced points over each position's cumulated probabilities, from a random one on.

    Twice as many as are stored: an id of probability p gets floor(2 · points · p) of them or one
    more (systematic sampling, Madow 1949). Half of them are kept; ids with an odd number are
    paired, neighbours in the order of ids, and one of each pair gets the half point of the other,
    by `settle`. So p is met in the mean and missed by less than one point, which nothing unbiased
    betters for all sums (Szegedy and Thorup 2007); an id of p < 1 / points is included with
    probability points · p, as in threshold sampling.
    """
    positions = len(tile.mass)
    place_key, rest_key, flip_key, halve_key = jax.random.split(key, 4)
    ends = _integer_ends(tile.mass)
    offset = jax.random.bits(place_key, (positions,), jnp.uint32) >> (32 - _FULL_BITS)
    # Below the integers' unit a point's place is drawn too; it never moves it to another chunk.
    below_unit = jax.random.uniform(rest_key, (positions,))
    drawn = 2 * spec.points
    size = positions * drawn
    room = min(2 * _ROOM * spec.slots_per_token, drawn) * positions

    ids = _ids_of_points(drawn, tile, ends, offset[:, None], below_unit[:, None])

    def mark(ids: Array, points: int) -> Array:
        """Whether each of the first `points` is its id's first."""
        is_first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return is_first & tile.predicted[:, None] & (jnp.arange(drawn) < points)[None, :]

    # A tile with more entries than there is room for is far from fitting its slots, so evenly
    # spaced ones of its points are kept, half of them. Points drawn anew would be biased: that
    # there were many entries says where the first ones lay. All halvings are computed: a loop that
    # ends when its tile fits would be waited for by the host, tile by tile.
    numbers, ids_of = [drawn], [ids]
    while (before := numbers[-1]) > 2:
        kept = before // 4 * 2
        shift = jax.random.randint(jax.random.fold_in(halve_key, before), (positions, 1), 0, before)
        number = jnp.minimum(jnp.arange(drawn, dtype=jnp.int32), kept - 1)
        of_before = (number[None, :] * before + shift) // kept
        numbers.append(kept)
        ids_of.append(jnp.take_along_axis(ids_of[-1], of_before, axis=1))
    firsts = [mark(*each) for each in zip(ids_of, numbers, strict=True)]
    fits = jnp.stack([jnp.sum(each) <= room for each in firsts[:-1]] + [jnp.bool_(True)])
    level = jnp.argmax(fits)
    points = jnp.asarray(numbers, jnp.int32)[level]
    ids, is_first = (jnp.stack(each)[level].reshape(-1) for each in (ids_of, firsts))
    first = jnp.nonzero(is_first, size=room, fill_value=size)[0].astype(jnp.int32)
    exists = first < size
    position = jnp.where(exists, first // drawn, 0)
    # An id's points end where the next id's begin, at the latest with the position's.
    following = jnp.append(first[1:], jnp.int32(size))
    stop = jnp.minimum(following, position * drawn + points)
    points_of = jnp.where(exists, stop - first, 0)
    ids = ids[jnp.minimum(first, size - 1)]
    order = _order_within(position, points_of % 2 == 1, positions)
    gram = _gram(table, position, ids, order, min(spec.points, spec.slots_per_token), positions)
    flip = jax.random.bernoulli(flip_key, shape=(positions,))
    return Draft(Candidates(position, ids, points_of // 2), Balance(order, gram, flip))


def _order_within(position: Array, is_open: Array, positions: int) -> Array:
    """int32 [M]: the number of each open candidate among those of its position, -1 if not open."""
    one = is_open.astype(jnp.int32)
    before = jnp.cumsum(one) - one
    counts = jnp.zeros((positions,), jnp.int32).at[position].add(one)
    starts = jnp.cumsum(counts) - counts
    return jnp.where(is_open, before - starts[position], -1)


def _gram(
    table: Array, position: Array, ids: Array, order: Array, pairs: int, positions: int
) -> Array:
    """float32 [B, pairs, pairs] products of the differences of a position's pairs in embedding."""
    size = 2 * pairs
    slot = jnp.where((order >= 0) & (order < size), position * size + order, positions * size)
    rows = jnp.full((positions * size,), -1, jnp.int32).at[slot].set(ids, mode="drop")
    rows = rows.reshape(positions, pairs, 2)
    differences = table[rows[..., 0]] - table[rows[..., 1]]
    differences = jnp.where((rows[..., 0] >= 0)[..., None], differences, 0)
    return jnp.einsum("bpd,bqd->bpq", differences, differences, preferred_element_type=jnp.float32)


def _ids_of_points(drawn: int, tile: Tile, ends: Array, offset: Array, below_unit: Array) -> Array:
    """int32 [B, drawn]: the id that each point falls on.

    ends [B, C] of the chunks, as `_integer_ends`; offset uint32 and below_unit float32 [B, 1].
    """
    positions, chunks = ends.shape
    shape = (positions, drawn)
    points = jnp.int32(drawn)
    number = jnp.broadcast_to(jnp.arange(1, drawn + 1, dtype=jnp.int32), shape)
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
    position = jnp.repeat(jnp.arange(positions, dtype=jnp.int32), drawn)
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


def _multinomial(spec: SamplerSpec, vocab_size: int, tile: Tile, table: Array, key: Array) -> Draft:
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
    return Draft(Candidates(position, chunk * CHUNK + inside.astype(jnp.int32), points))


def _top_k(spec: SamplerSpec, vocab_size: int, tile: Tile, table: Array, key: Array) -> Draft:
    """The most probable ids of each position with their probabilities, and the rest; biased."""
    positions = len(tile.mass)
    kept = spec.slots_per_token - 1
    best, ids = jax.lax.top_k(tile.scores(), kept)
    p = jnp.exp(best - tile.log_total[:, None])
    p = jnp.concatenate([p, jnp.maximum(1.0 - jnp.sum(p, axis=1, keepdims=True), 0.0)], axis=1)
    rest = jnp.full((positions, 1), vocab_size, jnp.int32)
    return _exact(spec, tile, jnp.concatenate([ids.astype(jnp.int32), rest], axis=1), p)


def _full(spec: SamplerSpec, vocab_size: int, tile: Tile, table: Array, key: Array) -> Draft:
    """Every id above zero."""
    p = jnp.exp(tile.scores()[:, :vocab_size] - tile.log_total[:, None])
    ids = jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32), p.shape)
    return _exact(spec, tile, ids, p)


def _exact(spec: SamplerSpec, tile: Tile, ids: Array, p: Array) -> Draft:
    """Candidates of the probabilities p of ids [B, k], as points that are not whole yet."""
    position = jnp.repeat(jnp.arange(len(ids), dtype=jnp.int32), ids.shape[1])
    points = jnp.where(tile.predicted[:, None], p * float(spec.points), 0.0)
    return Draft(Candidates(position, ids.reshape(-1), points.reshape(-1)))


SAMPLERS: dict[SamplerName, Sampler] = {
    "systematic": Sampler(_systematic, unbiased=True),
    "multinomial": Sampler(_multinomial, unbiased=True),
    "full": Sampler(_full, unbiased=True),
    "top_k": Sampler(_top_k, unbiased=False),
}
