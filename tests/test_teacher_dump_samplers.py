"""Samplers: exact points at every position, oracles in float64, edge cases, inclusion, variance.

That the stored bytes are unbiased is tested in test_teacher_dump_unbiased.py.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import BudgetError
from schemas.manifest import MOST_POINTS, SamplerSpec
from teacher_dump import samplers
from teacher_dump.samplers import CHUNK, Balance, Candidates, Draft, Scoring, Tile

TINY = float(np.finfo(np.float32).tiny)
WORST_Z = 5.0
# Every shape, spec and number of seeds is a program to compile, so tests share them.
FEW, SEEDS = 4, 2000


def spec_of(name: str = "systematic", **changes: Any) -> SamplerSpec:
    settings_ = {"points": 12, "slots_per_token": 12, "block_tokens": 8} | changes
    return SamplerSpec.model_validate({"name": name} | settings_)


def log_probabilities(
    positions: int, vocab: int, seed: int = 0, sharpest: float = 7.0
) -> np.ndarray:
    """Log-probabilities float32 [B, V] whose entropies run from sharp to flat over the tile."""
    random = np.random.default_rng(seed)
    scale = np.linspace(sharpest, 0.5, positions)[:, None]
    scores = random.normal(size=(positions, vocab)) * scale
    return np.asarray(jax.nn.log_softmax(jnp.asarray(scores, jnp.float32)))


def some_predicted(positions: int) -> np.ndarray:
    return np.arange(positions) % 7 != 3


def padded(scores: np.ndarray) -> jax.Array:
    """Scores with columns that are no id up to a multiple of CHUNK."""
    return jnp.asarray(
        np.pad(scores, ((0, 0), (0, -scores.shape[1] % CHUNK)), constant_values=-np.inf)
    )


def make_tile(scores: np.ndarray, predicted: np.ndarray) -> Tile:
    scoring = Scoring(scores.shape[1])
    return samplers.make_tile(padded(scores), jnp.asarray(predicted), scoring)[0]


def masses(log_probs: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The probabilities [B, V] in float64; 0 where nothing is predicted."""
    p = np.exp(log_probs.astype(np.float64))
    return np.where(predicted[:, None], p / p.sum(axis=1, keepdims=True), 0.0)


def a_table(vocab: int, width: int = 6) -> jax.Array:
    random = np.random.default_rng(9)
    rows = vocab + -vocab % CHUNK
    return jnp.asarray(random.normal(size=(rows, width)), jnp.float32)


@partial(jax.jit, static_argnames=("spec", "vocab"))
def propose(spec: SamplerSpec, vocab: int, tile: Tile, table: jax.Array, keys: jax.Array) -> Draft:
    """A draft for each key."""
    return jax.vmap(lambda key: samplers.propose(spec, vocab, tile, table, key))(keys)


settle = jax.jit(samplers.settle)


def sample(
    spec: SamplerSpec,
    log_probs: np.ndarray,
    predicted: np.ndarray,
    seed: int = 0,
    seeds: int = FEW,
    table: jax.Array | None = None,
) -> Candidates:
    """Settled candidates, NumPy arrays [seeds, M]."""
    vocab = log_probs.shape[1]
    table = a_table(vocab) if table is None else table
    keys = jax.random.split(jax.random.key(seed), seeds)
    draft = propose(spec, vocab, make_tile(log_probs, predicted), table, keys)
    return Candidates(*(np.asarray(x) for x in settle(draft)))


def dense(found: Candidates, positions: int, ids: int) -> np.ndarray:
    """Points [seeds, B, ids]."""
    seeds = len(found.points)
    points = np.zeros((seeds, positions, ids))
    used = found.points > 0
    rows = np.nonzero(used)[0]
    np.add.at(points, (rows, found.position[used], found.id[used]), found.points[used])
    return points


def z_scores(samples: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many standard errors the mean over the first axis is from what is expected."""
    error = samples.std(axis=0) / np.sqrt(len(samples))
    return (samples.mean(axis=0) - expected) / np.maximum(error, 1e-6 * (1.0 + expected))


def mean_square_z(samples: np.ndarray, expected: np.ndarray, least: float = 30) -> float:
    """Mean square of the z of what is expected `least` times or more; about 1 if it is unbiased."""
    often = (expected * len(samples) >= least) & (samples.std(axis=0) > 0)
    return float(np.mean(np.square(z_scores(samples, expected)[often])))


# The tile


@pytest.mark.parametrize("cap", [None, 50.0, 60.0, 61.0])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_tile_holds_the_distribution(cap: float | None, temperature: float) -> None:
    """Entropies, log-sum-exp and the masses of chunks, against float64; the padding has none."""
    random = np.random.default_rng(1)
    products = (random.normal(size=(7, 300)) * np.linspace(0.5, 24, 7)[:, None]).astype(np.float32)
    predicted = some_predicted(7)
    # Columns that are no id, and would be the likeliest by far.
    wide = np.pad(products, ((0, 0), (0, 84)), constant_values=100.0)
    scoring = Scoring(300, temperature, cap)
    tile, entropy = samplers.make_tile(jnp.asarray(wide), jnp.asarray(predicted), scoring)
    exact = products.astype(np.float64)
    if cap is not None:
        exact = cap * np.tanh(exact / cap)
    exact /= temperature
    total = np.log(np.exp(exact).sum(axis=1))
    p = np.exp(exact - total[:, None])
    np.testing.assert_allclose(tile.log_total, total, rtol=1e-6)
    expected = np.where(predicted, -(p * np.log(p)).sum(axis=1), 0.0)
    # Scores up to 75 are rounded to 4e-6; the entropy is a difference of such, p an exponential.
    np.testing.assert_allclose(entropy, expected, rtol=1e-4, atol=1e-5)
    chunks = np.pad(p, ((0, 0), (0, 84))).reshape(7, 3, CHUNK).sum(axis=2)
    np.testing.assert_allclose(tile.mass, chunks, rtol=2e-5, atol=1e-30)
    position, chunk = jnp.asarray([0, 6]), jnp.asarray([2, 0])
    some = np.asarray(tile.probabilities(position, chunk))
    np.testing.assert_allclose(some[0, :44], p[0, 256:], rtol=2e-5)
    assert (some[0, 44:] == 0).all()
    np.testing.assert_allclose(some[1], np.where(p[6] < TINY, 0, p[6])[:CHUNK], rtol=2e-5)
    column = jnp.asarray([250, 5])
    labels = tile.log_probabilities(position, column)
    np.testing.assert_allclose(labels, (exact - total[:, None])[position, column], rtol=1e-5)
    np.testing.assert_allclose(tile.scores()[:, :300], exact, rtol=1e-5, atol=1e-5)
    assert (tile.scores()[:, 300:] == -np.inf).all()


def test_scores_without_a_bound_need_no_luck() -> None:
    """Scores whose exponentials overflow, or all vanish, unless the maximum is taken off."""
    base = log_probabilities(2, 200)
    for shift in (-2000.0, 2000.0):
        tile, entropy = samplers.make_tile(
            padded(base + np.float32(shift)), jnp.ones(2, bool), Scoring(200)
        )
        expected = samplers.make_tile(padded(base), jnp.ones(2, bool), Scoring(200))[1]
        np.testing.assert_allclose(entropy, expected, rtol=2e-3)
        np.testing.assert_allclose(np.asarray(tile.mass).sum(axis=1), 1.0, rtol=1e-5)


def test_the_largest_score_that_needs_no_maximum_stays_within_float32() -> None:
    most = samplers.LARGEST_SCORE_WITHOUT_MAXIMUM
    scoring = Scoring(2**18, cap=most)
    assert not scoring.needs_maximum
    assert Scoring(2**18, temperature=0.999, cap=most).needs_maximum
    for product in (1e9, -1e9):
        products = np.full((1, 2**18), product, np.float32)
        tile, entropy = samplers.make_tile(jnp.asarray(products), jnp.ones(1, bool), scoring)
        np.testing.assert_allclose(entropy, np.log(2**18), rtol=1e-5)
        np.testing.assert_allclose(tile.mass, 1 / 2048, rtol=1e-5)


# Systematic: exact properties


def check_systematic(points: np.ndarray, p: np.ndarray, total: int) -> None:
    """Points [B, V]: `total` at each predicted position, less than one off the exact number."""
    predicted = p.sum(axis=1) > 0
    np.testing.assert_array_equal(points.sum(axis=1), np.where(predicted, total, 0))
    assert (points[p == 0] == 0).all()
    assert (np.abs(points - total * p) < 1 + 2e-5 * total).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sharpest=st.floats(0.0, 40.0),
    predicted=st.lists(st.booleans(), min_size=8, max_size=8),
    cut=st.integers(1, 300),
)
def test_systematic_on_any_tile(
    seed: int, sharpest: float, predicted: list[bool], cut: int
) -> None:
    """All points are there, each id has its share of them rounded up or down, none has two."""
    scores = np.where(np.arange(300) < cut, log_probabilities(8, 300, seed, sharpest), -np.inf)
    scores, mask = scores.astype(np.float32), np.array(predicted)
    p = masses(scores, mask)
    p[p < TINY] = 0.0
    found = sample(spec_of(), scores, mask, seed)
    points = dense(found, 8, 300)
    for one in range(FEW):
        used = found.points[one] > 0
        pairs = found.position[one][used] * 300 + found.id[one][used]
        assert (np.diff(pairs) > 0).all()
        check_systematic(points[one], p, 12)


@pytest.mark.parametrize("points", [1, samplers._MOST_SYSTEMATIC_POINTS])
def test_any_number_of_points(points: int) -> None:
    spec = spec_of(points=points, slots_per_token=700)
    log_probs, predicted = log_probabilities(3, 700), np.array([True, False, True])
    found = sample(spec, log_probs, predicted, seeds=1)
    check_systematic(dense(found, 3, 700)[0], masses(log_probs, predicted), points)


def test_a_certain_position_costs_one_entry() -> None:
    log_probs = np.full((8, 300), -np.inf, np.float32)
    log_probs[:7, 17] = 0.0
    log_probs[7] = -np.log(300.0)
    points = dense(sample(spec_of(), log_probs, np.ones(8, bool)), 8, 300)
    assert np.count_nonzero(points, axis=2).tolist() == [[1] * 7 + [12]] * FEW
    assert (points[:, :7, 17] == 12).all()


@pytest.mark.parametrize("ids", [13, 300])
def test_equal_probabilities_are_spread_evenly(ids: int) -> None:
    """A dozen points over at least as many ids: no id gets two, and every stretch of ids its share.

    A half point decides between neighbours among those with one, so a share is off by a few.
    """
    log_probs = np.full((8, 300), -np.inf, np.float32)
    log_probs[:, :ids] = -np.log(ids)
    points = dense(sample(spec_of(), log_probs, np.ones(8, bool)), 8, 300)
    assert points.max() == 1
    assert (points.sum(axis=2) == 12).all()
    first_half = points[:, :, : ids // 2].sum(axis=2)
    assert np.abs(first_half - 12 * (ids // 2) / ids).max() <= 1.5


@pytest.mark.parametrize("name", ["systematic", "multinomial", "top_k", "full"])
def test_nothing_predicted_gives_nothing(name: str) -> None:
    vocab = 130 if name in ("top_k", "full") else 300
    spec = spec_of(name, slots_per_token=vocab) if name == "full" else spec_of(name)
    log_probs = log_probabilities(8, vocab)
    assert (sample(spec, log_probs, np.zeros(8, bool)).points == 0).all()
    assert (sample(spec, log_probs, np.ones(8, bool)).points > 0).any()


@pytest.mark.parametrize(("name", "points"), [("systematic", 12), ("multinomial", 40)])
def test_ids_without_probability_are_never_picked(name: str, points: int) -> None:
    """Every other chunk, and all but a few ids in the others, have no mass."""
    exists = (np.arange(500) % 37 == 5) & (np.arange(500) // CHUNK % 2 == 0)
    scores = np.random.default_rng(0).normal(size=(8, 500)) * 3
    log_probs = np.where(exists, scores, -np.inf).astype(np.float32)
    found = sample(spec_of(name, points=points), log_probs, np.ones(8, bool), seeds=SEEDS)
    assert set(found.id[found.points > 0].tolist()) == set(np.flatnonzero(exists).tolist())


def test_the_smallest_tail_is_sampled_with_its_own_probability() -> None:
    """2,000 ids of 5e-10 after one of almost 1: each is half a unit of the integers wide.

    The only point is moved over the tail in even steps, ten for each id.
    """
    small, count, steps = 5e-10, 2000, 10
    scores = np.full((1, CHUNK + count), -np.inf, np.float32)
    scores[0, 0] = 0.0
    scores[0, CHUNK:] = np.log(small)
    tile = make_tile(scores, np.ones(1, bool))
    ends = samplers._integer_ends(tile.mass)
    width = int(ends[0, -1] - ends[0, 0])
    np.testing.assert_allclose(width, count * small * 2**30, rtol=0.02)
    place = (np.arange(count * steps) + 0.5) * width / (count * steps)

    @jax.jit
    def ids_at(offset: jax.Array, below_unit: jax.Array) -> jax.Array:
        rows = len(offset)
        many = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), tile)
        all_ends = jnp.broadcast_to(ends, (rows, ends.shape[1]))
        return samplers._ids_of_points(1, many, all_ends, offset, below_unit)[:, 0]

    ids = [
        ids_at(
            jnp.asarray(part.astype(np.uint32))[:, None],
            jnp.asarray(part % 1.0, jnp.float32)[:, None],
        )
        for part in np.split(place, 10)
    ]
    counts = np.bincount(np.concatenate(ids), minlength=CHUNK + count)
    # At both edges of a chunk the unit of the integers is seen; the last id of all is as the first.
    assert counts[:CHUNK].sum() <= steps
    assert np.abs(counts[CHUNK:] - steps).max() <= 1.1 * steps
    assert np.abs(counts[CHUNK:] - steps).mean() < 0.05 * steps
    assert (np.abs(counts[CHUNK:] - steps) <= 1).mean() > 0.97


def test_places_on_the_grid_are_exact() -> None:
    random = np.random.default_rng(0)
    most = 2 * samplers._MOST_SYSTEMATIC_POINTS
    place = np.concatenate([[0, 2**30, 2**30, 1], random.integers(0, 2**30 + 1, 5000)])
    offset = np.concatenate([[0, 2**30 - 1, 2**30 - 1, 0], random.integers(0, 2**30, 5000)])
    points = np.concatenate([[1, most, 1, most], random.integers(1, most + 1, 5000)])
    whole, fraction = samplers._grid(*(jnp.asarray(x, jnp.uint32) for x in (place, offset, points)))
    exact = [int(a) * int(b) + int(c) for a, b, c in zip(place, points, offset, strict=True)]
    assert np.asarray(whole).tolist() == [x >> 30 for x in exact]
    assert np.asarray(fraction).tolist() == [x & (2**30 - 1) for x in exact]


def test_cumulated_masses_end_at_the_same_integer() -> None:
    random = np.random.default_rng(0)
    mass = np.concatenate(
        [
            random.dirichlet(np.full(2048, 0.05), 20),
            random.dirichlet(np.full(2048, 5.0), 20) * (1 + 1e-5),
            np.eye(2048)[:3],
            np.zeros((1, 2048)),
        ]
    ).astype(np.float32)
    ends = np.asarray(samplers._integer_ends(jnp.asarray(mass)))
    assert (ends[:, -1] == 2**30).all()
    widths = np.diff(ends, axis=1, prepend=0)
    assert (widths >= 0).all()
    exact = mass[:-1] / mass[:-1].sum(axis=1, keepdims=True, dtype=np.float64) * 2**30
    # Each is the nearest integer, but for float32 and for the largest, which takes what is left.
    others = np.arange(2048) != mass[:-1].argmax(axis=1)[:, None]
    assert np.abs(widths[:-1] - exact)[others].max() < 0.5 + 2**30 * 2e-7
    assert np.abs(widths[:-1] - exact).max() < 2048


# Systematic: over seeds

TABLES = {
    "no": lambda vocab: jnp.zeros((vocab + -vocab % CHUNK, 6), jnp.float32),
    "random": a_table,
    # Differences of neighbours all point one way: balancing turns every other pair.
    "a line": lambda vocab: jnp.tile(
        jnp.arange(vocab + -vocab % CHUNK, dtype=jnp.float32)[:, None], (1, 6)
    ),
}


@pytest.fixture(scope="module")
def mixed() -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and probabilities of sharp to flat positions over 500 ids."""
    log_probs = log_probabilities(8, 500)
    return log_probs, masses(log_probs, np.ones(8, bool))


@pytest.mark.parametrize("name", TABLES)
def test_systematic_includes_by_the_probability_whatever_the_embeddings(
    mixed: tuple[np.ndarray, np.ndarray], name: str
) -> None:
    """An id is included with min(1, n p), has n p points in the mean, and as little variance as
    whole points can have."""
    log_probs, p = mixed
    spec = spec_of()
    found = sample(spec, log_probs, np.ones(8, bool), seeds=SEEDS, table=TABLES[name](500))
    points = dense(found, 8, 500)
    wanted = spec.points * p
    assert 0.8 < mean_square_z(points, wanted) < 1.25
    included = np.minimum(wanted, 1.0)
    assert 0.8 < mean_square_z((points > 0).astype(float), included) < 1.25
    stretches = points.reshape(SEEDS, 8, 10, 50).sum(axis=3)
    assert np.abs(z_scores(stretches, wanted.reshape(8, 10, 50).sum(axis=2))).max() < WORST_Z
    part = wanted % 1.0
    assert points.var(axis=0).sum() == pytest.approx((part * (1 - part)).sum(), rel=0.02)


def test_a_bias_of_a_sampler_is_seen(mixed: tuple[np.ndarray, np.ndarray]) -> None:
    """Half points that always go to the first of a pair, and shares that are 5 % off."""
    log_probs, p = mixed
    spec = spec_of()
    keys = jax.random.split(jax.random.key(0), SEEDS)
    tile = make_tile(log_probs, np.ones(8, bool))
    draft = propose(spec, 500, tile, TABLES["no"](500), keys)
    assert draft.balance is not None
    never = draft.balance._replace(flip=jnp.zeros_like(draft.balance.flip))
    found = Candidates(*(np.asarray(x) for x in settle(draft._replace(balance=never))))
    assert mean_square_z(dense(found, 8, 500), spec.points * p) > 2.0
    points = dense(sample(spec, log_probs, np.ones(8, bool), seeds=SEEDS), 8, 500)
    assert mean_square_z(points, spec.points * p * 1.05) > 1.25


def test_a_tile_without_room_keeps_a_part_of_its_points_without_bias() -> None:
    """Entries number eight or nine and there is room for eight: how many decides what is kept.

    Points drawn anew where there was no room give what is left a bias of 200 standard errors.
    """
    p = np.zeros((1, 128))
    p[0, 40] = 0.53
    p[0, :12] = np.linspace(0.6, 1.4, 12) * 0.47 / 12
    with np.errstate(divide="ignore"):
        log_probs = np.log(p).astype(np.float32)
    spec = spec_of(points=8, slots_per_token=2)
    found = sample(spec, log_probs, np.ones(1, bool), seeds=10_000)
    points = dense(found, 1, 128)[:, 0]
    totals = points.sum(axis=1)
    assert set(totals.tolist()) == {4.0, 8.0}
    assert 0.3 < (totals == 4).mean() < 0.7
    z = z_scores(points / totals[:, None], p[0])
    assert np.abs(z).max() < WORST_Z
    assert points[:, 40].std() > 0


def test_a_tile_is_thinned_to_what_there_is_room_for() -> None:
    """Flat positions have an entry for each point, but there is room for four a token."""
    spec = spec_of(points=25, slots_per_token=1)
    log_probs, predicted = log_probabilities(8, 500, sharpest=0.5), some_predicted(8)
    found = sample(spec, log_probs, predicted, seeds=400)
    assert found.points.shape[1] == 8 * 4
    points = dense(found, 8, 500)
    totals = points.sum(axis=2)
    # Fifty half points, then half of them in whole points, rounded down: 24, 12, 6 and 2.
    assert (totals[:, predicted] == totals[:, :1]).all()
    assert (totals[:, ~predicted] == 0).all()
    assert set(np.unique(totals[:, predicted])) <= {1.0, 3.0}
    p = masses(log_probs, predicted)
    for ids in np.array_split(np.arange(500), 5):
        shares = (points[:, predicted][:, :, ids].sum(axis=2) / totals[:, :1]).sum(axis=1)
        assert abs(float(z_scores(shares, p[:, ids].sum()))) < WORST_Z


def test_systematic_has_less_variance_than_draws_at_equal_entries(
    mixed: tuple[np.ndarray, np.ndarray],
) -> None:
    """E||p^ - p||^2 over a tile of sharp and flat positions: both are what theory says, and that
    says what as many points as cost the same entries give."""
    log_probs, p = mixed

    def squared_error(spec: SamplerSpec) -> float:
        points = dense(sample(spec, log_probs, np.ones(8, bool), seeds=SEEDS), 8, 500)
        return float(np.square(points / spec.points - p).sum(axis=(1, 2)).mean())

    def in_theory(points: int) -> float:
        part = points * p % 1.0
        return float((part * (1 - part)).sum()) / points**2

    draws = (1 - (p**2).sum(axis=1)).sum() / 40
    assert squared_error(spec_of("multinomial", points=40)) == pytest.approx(draws, rel=0.03)
    assert squared_error(spec_of()) == pytest.approx(in_theory(12), rel=0.03)
    entries = (1 - (1 - p) ** 40).sum()
    points = max(n for n in range(1, 60) if np.minimum(n * p, 1).sum() <= entries)
    assert in_theory(points) < 0.6 * draws


@pytest.mark.parametrize(("name", "points"), [("systematic", 12), ("multinomial", 40)])
def test_expected_entries_are_what_is_counted(
    mixed: tuple[np.ndarray, np.ndarray], name: Any, points: int
) -> None:
    log_probs, _ = mixed
    predicted = some_predicted(8)
    tile = make_tile(log_probs, predicted)
    numbers = jnp.asarray([1, points, points + 1], jnp.int32)
    expected = np.asarray(samplers.expected_entries(name, tile, numbers))
    assert expected[0] == pytest.approx(predicted.sum(), rel=1e-5)
    found = sample(spec_of(name, points=points), log_probs, predicted, seeds=SEEDS)
    counts = np.count_nonzero(dense(found, 8, 500), axis=(1, 2)).astype(float)
    assert abs(float(z_scores(counts, expected[1]))) < WORST_Z
    # That one point more would be told apart.
    assert abs(float(z_scores(counts, expected[2]))) > 2 * WORST_Z
    certain = np.full((2, 128), -np.inf, np.float32)
    certain[:, 3] = 0.0
    one = make_tile(certain, np.array([True, False]))
    assert samplers.expected_entries(name, one, jnp.asarray([1, 9])).tolist() == [1.0, 1.0]


# Balancing


def a_balance(
    differences: np.ndarray, flip: bool, open_pairs: int | None = None
) -> tuple[Draft, np.ndarray]:
    """A draft of one position with pairs [P, D], every candidate having one whole point already."""
    pairs = len(differences)
    count = pairs if open_pairs is None else open_pairs
    order = np.arange(2 * count, dtype=np.int32)
    gram = differences @ differences.T
    draft = Draft(
        Candidates(
            jnp.zeros((1, 2 * count), jnp.int32),
            jnp.arange(2 * count, dtype=jnp.int32)[None],
            jnp.ones((1, 2 * count), jnp.int32),
        ),
        Balance(
            jnp.asarray(order)[None],
            jnp.asarray(gram, jnp.float32)[None, None],
            jnp.asarray([[flip]]),
        ),
    )
    return draft, gram


def signs_of(draft: Draft) -> np.ndarray:
    """+1 for each pair whose first got the point, -1 for its second."""
    points = np.asarray(settle(draft).points)[0].reshape(-1, 2) - 1
    assert (points.sum(axis=1) == 1).all()
    return points[:, 0] - points[:, 1]


@pytest.mark.parametrize("seed", range(8))
def test_balancing_shortens_the_sum_of_differences(seed: int) -> None:
    """One point to each pair; the opposite ones under the other flip; no better single turn."""
    differences = np.random.default_rng(seed).normal(size=(9, 3)) + 0.8
    draft, gram = a_balance(differences, flip=False)
    signs = signs_of(draft)
    before, after = gram.sum(), signs @ gram @ signs
    assert after < 0.3 * before
    opposite = signs_of(a_balance(differences, flip=True)[0])
    np.testing.assert_array_equal(opposite, -signs)
    # Two sweeps in the order of the pairs, as the docstring says, in float64.
    expected = np.ones(9)
    for pair in [*range(9), *range(9)]:
        turned = expected.copy()
        turned[pair] *= -1
        if turned @ gram @ turned < expected @ gram @ expected:
            expected = turned
    np.testing.assert_array_equal(signs, expected)


def test_pairs_beyond_the_gram_are_settled_too() -> None:
    for flip in (False, True):
        draft, _ = a_balance(np.ones((2, 1)), flip, open_pairs=4)
        signs = signs_of(draft)
        first = -1 if flip else 1
        assert signs[0] == -signs[1]
        assert signs[2:].tolist() == [first, first]


def test_balancing_lowers_the_error_in_the_hidden_states(
    mixed: tuple[np.ndarray, np.ndarray],
) -> None:
    """E||sum (p^ - p) embedding||^2, against half points of which a coin for each pair decides.

    And it is no more off in the mean than they are, which without the flips it would be.
    """
    log_probs, p = mixed
    table = a_table(500)
    embedding = np.asarray(table)[:500]
    draft = propose(
        spec_of(),
        500,
        make_tile(log_probs, np.ones(8, bool)),
        table,
        jax.random.split(jax.random.key(0), SEEDS),
    )

    assert draft.balance is not None
    order = np.asarray(draft.balance.order)
    proposed = Candidates(*(np.asarray(x) for x in draft.candidates))
    coins = np.random.default_rng(1).integers(0, 2, (SEEDS, 8, spec_of().points))
    coin = coins[np.arange(SEEDS)[:, None], proposed.position, order // 2]
    tossed = proposed._replace(points=proposed.points + ((order >= 0) & (order % 2 == coin)))
    never = draft.balance._replace(flip=jnp.zeros_like(draft.balance.flip))

    def gradients(found: Candidates) -> np.ndarray:
        """[seeds, B, D]; each position has all its points."""
        points = dense(found, 8, 500)
        assert (points.sum(axis=2) == 12).all()
        return (points / 12 - p) @ embedding

    balanced, one_way, random = (
        gradients(Candidates(*(np.asarray(x) for x in found)))
        for found in (settle(draft), settle(draft._replace(balance=never)), tossed)
    )
    assert np.square(balanced).sum(axis=2).mean() < 0.7 * np.square(random).sum(axis=2).mean()
    for unbiased in (balanced, random):
        assert np.abs(z_scores(unbiased, np.zeros((8, 6)))).max() < WORST_Z
    assert np.abs(z_scores(one_way, np.zeros((8, 6)))).max() > 2 * WORST_Z


def test_the_gram_is_of_neighbouring_open_ids() -> None:
    table = a_table(CHUNK, width=5)
    position = jnp.asarray([0, 0, 0, 2, 2, 2, 2], jnp.int32)
    ids = jnp.asarray([7, 3, 9, 1, 2, 4, 8], jnp.int32)
    is_open = jnp.asarray([True, False, True, True, True, True, True])
    order = samplers._order_within(position, is_open, 3)
    assert order.tolist() == [0, -1, 1, 0, 1, 2, 3]
    gram = np.asarray(samplers._gram(table, position, ids, order, 3, 3))
    rows = np.asarray(table, np.float64)
    differences = np.zeros((3, 3, 5))
    differences[0, 0] = rows[7] - rows[9]
    differences[2, 0], differences[2, 1] = rows[1] - rows[2], rows[4] - rows[8]
    expected = np.einsum("bpd,bqd->bpq", differences, differences)
    np.testing.assert_allclose(gram, expected, rtol=1e-5, atol=1e-6)


# The other samplers


def test_multinomial_draws_are_independent(mixed: tuple[np.ndarray, np.ndarray]) -> None:
    """n points at each predicted position; counts have the mean and variance of a binomial."""
    log_probs, p = mixed
    spec = spec_of("multinomial", points=40)
    predicted = some_predicted(8)
    points = dense(sample(spec, log_probs, predicted, seeds=SEEDS), 8, 500)
    assert (points.sum(axis=2) == np.where(predicted, 40, 0)).all()
    p = np.where(predicted[:, None], p, 0.0)
    assert 0.8 < mean_square_z(points, 40 * p) < 1.25
    often = 40 * p > 0.5
    assert often.sum() > 30
    ratio = points.var(axis=0)[often] / (40 * p * (1 - p))[often]
    np.testing.assert_allclose(ratio, 1.0, atol=0.2)
    assert ratio.mean() == pytest.approx(1.0, abs=0.02)
    # Positions are drawn apart: a sharp one says nothing of the next.
    tops = [points[:, t, p[t].argmax()] for t in (0, 1, 2)]
    assert np.abs(np.corrcoef(tops) - np.eye(3)).max() < WORST_Z / np.sqrt(SEEDS)


def test_top_k_is_the_largest_and_the_rest() -> None:
    spec = spec_of("top_k", points=MOST_POINTS, slots_per_token=6)
    log_probs, predicted = log_probabilities(16, 1000), some_predicted(16)
    p = masses(log_probs, predicted)
    found = sample(spec, log_probs, predicted)
    points = dense(found, 16, 1001)[0]
    kept = np.zeros_like(p, bool)
    np.put_along_axis(kept, np.argsort(-p, axis=1)[:, :5], True, axis=1)
    expected = np.where(kept, p, 0.0)
    np.testing.assert_allclose(points[:, :1000], expected * MOST_POINTS, rtol=2e-5)
    rest = np.where(predicted, 1 - expected.sum(axis=1), 0)
    np.testing.assert_allclose(points[:, 1000] / MOST_POINTS, rest, rtol=1e-3, atol=1e-6)
    assert rest.max() > 0.5


def test_full_is_everything() -> None:
    spec = spec_of("full", points=MOST_POINTS, slots_per_token=130)
    log_probs, predicted = log_probabilities(8, 130), some_predicted(8)
    points = dense(sample(spec, log_probs, predicted), 8, 130)[0]
    expected = masses(log_probs, predicted) * MOST_POINTS
    np.testing.assert_allclose(points, expected, rtol=2e-5)


# Budgets, keys and transformations


@pytest.mark.parametrize(
    ("spec", "vocab", "message"),
    [
        (
            spec_of(points=32768),
            100,
            "draws at most 32767 points a token, but sampler.points is 32768; lower it",
        ),
        (
            spec_of("full"),
            100,
            "stores the whole vocabulary, so slots_per_token must be 100, but it is 12",
        ),
        (
            spec_of(slots_per_token=102),
            100,
            "at most the vocabulary's 100 ids and the rest, but it is 102",
        ),
        (
            spec_of("top_k", slots_per_token=1),
            100,
            "a slot for an id and one for the rest, but slots_per_token is 1; raise it",
        ),
    ],
)
def test_impossible_budgets_are_refused(spec: SamplerSpec, vocab: int, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        samplers.check(spec, vocab)


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(points=32767, slots_per_token=101),
        spec_of("multinomial", points=MOST_POINTS),
        spec_of("top_k", slots_per_token=2),
        spec_of("full", slots_per_token=100),
    ],
)
def test_budgets_at_the_edge_are_accepted(spec: SamplerSpec) -> None:
    samplers.check(spec, 100)


def test_only_top_k_is_said_to_be_biased() -> None:
    flags = {name: sampler.unbiased for name, sampler in samplers.SAMPLERS.items()}
    assert flags == {"systematic": True, "multinomial": True, "full": True, "top_k": False}


@pytest.mark.parametrize("name", ["systematic", "multinomial"])
def test_a_key_decides_and_tiles_settle_as_each_alone(name: str) -> None:
    """Mapped, and settled together, drafts give what a single tile gives; keys differ."""
    spec = spec_of(name)
    tiles = [make_tile(log_probabilities(8, 300, seed), some_predicted(8)) for seed in range(3)]
    table = a_table(300)
    many = jax.tree.map(lambda *x: jnp.stack(x), *tiles)

    @jax.jit
    def mapped(tiles: Tile, keys: jax.Array) -> Candidates:
        drafts = jax.lax.map(
            lambda item: samplers.propose(spec, 300, item[0], table, item[1]), (tiles, keys)
        )
        return samplers.settle(drafts)

    keys = jax.random.split(jax.random.key(1), FEW)
    together = mapped(many, keys[:3])
    for index, tile in enumerate(tiles):
        alone = settle(propose(spec, 300, tile, table, keys))
        for field in Candidates._fields:
            np.testing.assert_array_equal(
                getattr(together, field)[index], getattr(alone, field)[index]
            )
    others = dense(jax.tree.map(np.asarray, mapped(many, keys[1:])), 8, 300)
    mine = dense(jax.tree.map(np.asarray, together), 8, 300)
    assert (others != mine).any(axis=(1, 2)).all()
