"""Settling a row: whole points, thinning to the slots and to the offset bits, without bias."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_store import codec
from logit_store.codec import RowEntries, Vocabulary
from logit_store.layout import predicted_mask
from schemas.errors import BudgetError
from schemas.manifest import MOST_POINTS, SamplerSpec, TeacherInfo
from teacher_dump import targets
from teacher_dump.targets import begin_rows, settle_row
from teacher_dump.teacher import RowCandidates

LENGTH, BLOCK, VOCAB, POINTS = 12, 4, 200, 16
WORST_Z = 5.0


def spec_of(name: str = "systematic", **changes: Any) -> SamplerSpec:
    settings_ = {"points": POINTS, "slots_per_token": 3, "block_tokens": BLOCK} | changes
    return SamplerSpec.model_validate({"name": name} | settings_)


def vocabulary(size: int = VOCAB, slots: int = 3) -> Vocabulary:
    counts = (1e5 / np.arange(1, size + 1)).astype(np.int64)
    return codec.make_vocabulary(counts, slots)


def random_of(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[7, seed]))


def settle(
    proposed: RowEntries, spec: SamplerSpec, seed: int = 0, length: int = LENGTH, **other: Any
) -> tuple[RowEntries, np.ndarray]:
    tables = other.get("tables", vocabulary())
    return settle_row(tables, proposed, spec, length, random_of(seed), where="row 3")


def draws(
    random: np.random.Generator, predicted: np.ndarray, points: np.ndarray, ids: int
) -> RowEntries:
    """As many draws of each predicted position as `points` [L] says, each an entry of its own."""
    position = np.repeat(np.flatnonzero(predicted), points[predicted])
    return RowEntries(
        position, random.integers(0, ids, len(position)), np.ones(len(position), np.int32)
    )


def dense(entries: RowEntries, length: int = LENGTH, ids: int = VOCAB + 1) -> np.ndarray:
    points = np.zeros((length, ids))
    np.add.at(points, (entries.position, entries.id), entries.points)
    return points


def z_scores(samples: np.ndarray, expected: np.ndarray) -> np.ndarray:
    error = samples.std(axis=0) / np.sqrt(len(samples))
    return (samples.mean(axis=0) - expected) / np.maximum(error, 1e-7)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.integers(1, 18),
    ids=st.sampled_from([1, 3, 10, VOCAB]),
    share=st.sampled_from([0.0, 0.6, 1.0]),
    fewer=st.booleans(),
)
def test_any_row_is_settled_by_the_rules(
    seed: int, slots: int, ids: int, share: float, fewer: bool
) -> None:
    """Nothing is there that was not proposed; all points of the block are, and they fit."""
    random = np.random.default_rng(seed)
    spec = spec_of("multinomial", slots_per_token=slots)
    predicted = random.random(LENGTH) < share
    # A sampler's tile is two tokens here, so that a block may hold two numbers of points.
    points = np.repeat(random.choice([POINTS // 2, POINTS] if fewer else [POINTS], LENGTH // 2), 2)
    proposed = draws(random, predicted, points, ids)
    # What is no candidate has no points, whatever else it says.
    nothing = RowEntries(np.array([0, 5]), np.array([199, 1]), np.array([0, 0]))
    proposed = RowEntries(
        *(
            np.concatenate([getattr(x, name) for x in (nothing, proposed)])
            for name in ("position", "id", "points")
        )
    )
    entries, block_points = settle(proposed, spec, seed)
    wanted, found = dense(proposed), dense(entries)
    assert block_points.dtype == np.uint16
    assert block_points.shape == (LENGTH // BLOCK,)
    pairs = entries.position * 1000 + entries.id
    assert len(np.unique(pairs)) == len(pairs)
    assert (entries.points >= 1).all()
    assert (found <= wanted).all()
    totals = np.where(predicted, np.repeat(block_points, BLOCK), 0)
    np.testing.assert_array_equal(found.sum(axis=1), totals)
    used = np.count_nonzero(found.reshape(-1, BLOCK, VOCAB + 1), axis=(1, 2))
    assert (used <= slots * BLOCK).all()
    least = np.where(predicted, points, POINTS).reshape(-1, BLOCK).min(axis=1)
    fits = np.count_nonzero(wanted.reshape(-1, BLOCK, VOCAB + 1), axis=(1, 2)) <= slots * BLOCK
    assert (block_points[fits] == least[fits]).all()
    assert (block_points <= least).all()
    assert (block_points >= 1).all()
    # It can be written, and what is read is that.
    columns = codec.encode_row(vocabulary(), entries, LENGTH, LENGTH * slots, POINTS)
    stored = {k: x[None] for k, x in columns.items()} | {"block_points": block_points[None]}
    read = codec.check_rows(vocabulary(), predicted[None], stored, BLOCK, BLOCK * slots, 0)
    position = codec.entry_positions(read.head_count, read.tail_count, BLOCK, BLOCK * slots)
    there = read.entry_id >= 0
    weights = np.zeros_like(found)
    weights[position[there], read.entry_id[there]] = read.entry_weight[there]
    expected = found / np.repeat(block_points, BLOCK)[:, None]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_a_row_that_fits_is_left_as_it_is() -> None:
    proposed = RowEntries(
        np.array([3, 0, 0, 9, 0, 9]), np.array([7, 5, 2, 9, 5, 1]), np.array([16, 3, 9, 15, 4, 1])
    )
    entries, block_points = settle(proposed, spec_of())
    assert block_points.tolist() == [16, 16, 16]
    assert entries.position.tolist() == [0, 0, 3, 9, 9]
    assert entries.id.tolist() == [2, 5, 7, 1, 9]
    assert entries.points.tolist() == [9, 7, 16, 1, 15]


def test_nothing_proposed_is_an_empty_row() -> None:
    nothing = RowEntries(*(np.zeros(4, int) for _ in range(3)))
    for name in ("systematic", "top_k"):
        entries, block_points = settle(nothing, spec_of(name))
        assert len(entries.points) == 0
        assert block_points.tolist() == [16, 16, 16]


def test_only_blocks_that_overflow_are_thinned_and_no_more_than_they_need() -> None:
    """Sixteen entries of one point a token, and five slots: five points are kept."""
    random = np.random.default_rng(0)
    position = np.concatenate([np.repeat(np.arange(4), 16), [4, 11]])
    some = [random.choice(100, 16, replace=False) for _ in range(4)]
    ids = np.concatenate([*some, [7, 8]])
    points = np.array([1] * 64 + [16, 16])
    proposed = RowEntries(position, ids, points)
    entries, block_points = settle(proposed, spec_of(slots_per_token=5))
    assert block_points.tolist() == [5, 16, 16]
    assert len(entries.points) == 22


def test_one_point_per_token_always_fits_its_slots() -> None:
    """Steps down from many points do not pass over the last number that fits."""
    for points in (200, 3000, MOST_POINTS):
        spec = spec_of(points=points, slots_per_token=1)
        position = np.repeat(np.arange(LENGTH), 100)
        ids = np.tile(np.arange(100), LENGTH)
        counts = np.full((LENGTH, 100), points // 100)
        counts[:, 0] += points % 100
        entries, block_points = settle(RowEntries(position, ids, counts.ravel()), spec)
        assert block_points.tolist() == [1, 1, 1]
        assert entries.points.tolist() == [1] * LENGTH


@pytest.mark.parametrize("kept", [1, 5, 11, 15, 16])
def test_thinning_is_unbiased_and_as_even_as_can_be(kept: int) -> None:
    """Every id keeps its share of the points, rounded up or down, and the mean is the share."""
    points = np.array([1, 3, 0, 2, 9, 1, 15, 16, 4, 12])
    position = np.array([0, 0, 0, 0, 0, 0 + 1, 1, 2, 5, 5])
    points[4] = 10
    assert np.bincount(position, points)[[0, 1, 2, 5]].tolist() == [16] * 4
    seeds = 20_000 if kept == 5 else 4000
    random = random_of(kept)
    found = np.stack([targets._thin(points, position, kept, random) for _ in range(seeds)])
    assert found.dtype == np.int64
    expected = points * kept / 16
    assert (np.abs(found - expected) < 1).all()
    for t in (0, 1, 2, 5):
        assert (found[:, position == t].sum(axis=1) == kept).all()
    assert np.abs(z_scores(found, expected)).max() < WORST_Z
    # Where it is not forced, it varies, and by itself at each position.
    assert (found.std(axis=0) > 0).tolist() == (expected % 1 > 0).tolist()
    if kept == 5:
        assert abs(np.corrcoef(found[:, 1], found[:, 6])[0, 1]) < WORST_Z / np.sqrt(seeds)


def settled_means(
    proposed: RowEntries, spec: SamplerSpec, seeds: int, tables: Vocabulary, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [seeds, L, V + 1] and the points of the first block [seeds]."""
    weights, kept = [], []
    for seed in range(seeds):
        entries, block_points = settle(proposed, spec, seed, length, tables=tables)
        per_position = np.repeat(block_points, spec.block_tokens)[:, None]
        weights.append(dense(entries, length, len(tables.order)) / per_position)
        kept.append(int(block_points[0]))
    return np.stack(weights), np.array(kept)


# With one head and many tails, with many small heads, and with tails alone.
UNEVEN = RowEntries(
    np.array([0] * 7 + [1] * 8 + [2] * 12),
    np.concatenate([np.arange(7), np.arange(8), np.arange(12)]),
    np.array([6] + [1] * 6 + [2] * 4 + [1] * 4 + [1] * 12),
)
# Five points keep 3 or 4 of the entries of each of five positions, and 1 of the eight others: 25.5
# in the mean, for 26 slots. More than that come out in 6 of 32 cases.
CHANCE = RowEntries(
    np.concatenate([np.repeat(np.arange(5), 7), np.arange(5, 13)]),
    np.concatenate([np.tile(np.arange(7), 5), np.arange(8)]),
    np.array([6, 1, 1, 1, 1, 1, 1] * 5 + [12] * 8),
)


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_a_block_that_is_thinned_to_fit_is_unbiased(slots: int) -> None:
    spec = spec_of(points=12, slots_per_token=slots, block_tokens=3)
    weights, kept = settled_means(UNEVEN, spec, 4000, vocabulary(), 3)
    assert (kept < 12).all()
    assert np.abs(z_scores(weights, dense(UNEVEN, 3) / 12)).max() < WORST_Z
    assert (weights.std(axis=0) > 0).sum() > 20
    np.testing.assert_allclose(weights.sum(axis=2), 1.0)


def test_where_it_is_chance_whether_points_fit_is_unbiased_too() -> None:
    """Thinning the proposal anew until it fits chooses outcomes of few entries: next test."""
    spec = spec_of(points=12, slots_per_token=2, block_tokens=13)
    weights, kept = settled_means(CHANCE, spec, 5000, vocabulary(), 13)
    assert {4, 5} <= set(kept.tolist()) <= {2, 3, 4, 5}
    assert (kept < 5).mean() == pytest.approx(6 / 32, abs=0.03)
    assert np.abs(z_scores(weights, dense(CHANCE, 13) / 12)).max() < WORST_Z


def test_thinning_anew_until_it_fits_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def anew(
        points: np.ndarray,
        position: np.ndarray,
        most: int,
        spec: SamplerSpec,
        random: np.random.Generator,
    ) -> tuple[np.ndarray, int]:
        for kept in range(most, 0, -1):
            thinned = targets._thin(points, position, kept, random)
            if np.count_nonzero(thinned) <= spec.slots_per_block:
                return thinned, kept
        raise AssertionError

    monkeypatch.setattr(targets, "_thin_to_fit", anew)
    spec = spec_of(points=12, slots_per_token=2, block_tokens=13)
    weights, _ = settled_means(CHANCE, spec, 5000, vocabulary(), 13)
    assert np.abs(z_scores(weights, dense(CHANCE, 13) / 12)).max() > 1.5 * WORST_Z


def test_blocks_of_tiles_with_unequal_points_get_the_fewest_without_bias() -> None:
    """Half a block lost points in the sampler already; it fits, but has one number of points."""
    proposed = RowEntries(
        np.array([0, 0, 0, 1, 1, 2, 2, 2]),
        np.array([3, 4, 9, 3, 5, 1, 2, 7]),
        np.array([9, 2, 1, 11, 1, 3, 2, 1]),
    )
    spec = spec_of(points=12, slots_per_token=5, block_tokens=3)
    weights, kept = settled_means(proposed, spec, 3000, vocabulary(), 3)
    assert (kept == 6).all()
    points = dense(proposed, 3)
    expected = points / points.sum(axis=1, keepdims=True)
    assert np.abs(z_scores(weights, expected)).max() < WORST_Z
    assert (weights[:, 2] == expected[2]).all()


# Offset bits


def rare(slots: int) -> tuple[Vocabulary, np.ndarray]:
    """Tables in which some ids have eleven offset bits or more, and those ids."""
    counts = np.zeros(40_000, np.int64)
    counts[:50] = 10**6
    tables = codec.make_vocabulary(counts, slots)
    wide = np.flatnonzero(tables.bits_of_rank[tables.rank[:-1]] >= 11)
    assert len(wide) > 10_000
    return tables, wide


def test_rows_of_rare_ids_are_thinned_until_their_bits_fit_without_bias() -> None:
    tables, wide = rare(4)
    spec = spec_of(points=8, slots_per_token=4, block_tokens=2)
    # Two heads of few bits, and tails of many; all fit the slots.
    ids = np.concatenate([[0, *wide[:3]], wide[3:7], [1, *wide[7:10]], wide[10:14]])
    points = np.array([5, 1, 1, 1, 2, 2, 2, 2, 5, 1, 1, 1, 2, 2, 2, 2])
    proposed = RowEntries(np.repeat(np.arange(4), 4), ids, points)
    room = 8 * 4 * 4
    assert codec.offset_bits(tables, ids) > room
    place = {int(id_): at for at, id_ in enumerate(ids)}
    weights, kept = [], []
    for seed in range(4000):
        entries, block_points = settle(proposed, spec, seed, 4, tables=tables)
        assert codec.offset_bits(tables, entries.id) <= room
        mine = np.zeros(16)
        mine[[place[int(id_)] for id_ in entries.id]] = entries.points / block_points[0]
        weights.append(mine)
        kept.append(block_points.tolist())
        columns = codec.encode_row(tables, entries, 4, 16, 8)
        assert columns["entry_offset"].shape == (18,)
    assert all(a == b < 8 for a, b in kept)
    assert len({a for a, _ in kept}) > 1
    assert np.abs(z_scores(np.stack(weights), points / 8)).max() < WORST_Z


def test_bits_that_never_fit_are_refused_by_name() -> None:
    tables, wide = rare(1)
    spec = spec_of(points=8, slots_per_token=1, block_tokens=2)
    proposed = RowEntries(np.arange(4), wide[:4], np.full(4, 8))
    message = (
        "offset bits of a row must fit a byte for each slot, but those of row 3 do not with one "
        "point per token; raise sampler.slots_per_token"
    )
    with pytest.raises(BudgetError, match=message):
        settle(proposed, spec, length=4, tables=tables)


# Samplers of exact probabilities


@pytest.mark.parametrize("name", ["top_k", "full"])
def test_what_cannot_be_thinned_is_refused_by_name(name: str) -> None:
    spec = spec_of(name, slots_per_token=2)
    position = np.repeat(np.arange(4, 7), 3)
    proposed = RowEntries(position, np.tile([1, 2, 3], 3), np.full(9, POINTS / 3))
    message = (
        f"What the {name} sampler keeps must fit its slots, 2 per token, but 9 entries in block 1 "
        "of row 3 do not; raise sampler.slots_per_token"
    )
    with pytest.raises(BudgetError, match=message):
        settle(proposed, spec)
    tables, wide = rare(1)
    proposed = RowEntries(np.arange(4), wide[:4], np.full(4, float(POINTS)))
    with pytest.raises(BudgetError, match=f"What the {name} .* but the offset bits of row 3 do"):
        settle(proposed, spec_of(name, slots_per_token=1), tables=tables, length=4)


def test_probabilities_are_rounded_to_whole_points_without_bias() -> None:
    """A point more or less at most, the sum exact; also where the proposed sum is not."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(6, 0.4), LENGTH)
    p[3] = [1, 0, 0, 0, 0, 0]
    p[4] = [0, 1e-9, 0.5, 0.5, 1e-12, 0]
    position, ids = np.repeat(np.arange(LENGTH), 6), np.tile([9, 4, 2, 7, 0, VOCAB], LENGTH)
    spec = spec_of("full", points=7, slots_per_token=6)
    off = p * 7 * np.linspace(0.9, 1.1, LENGTH)[:, None]
    seeds = 4000
    found = []
    for seed in range(seeds):
        entries, block_points = settle(RowEntries(position, ids, off.ravel()), spec, seed)
        assert block_points.tolist() == [7, 7, 7]
        found.append(dense(entries)[:, [9, 4, 2, 7, 0, VOCAB]])
    points = np.stack(found)
    assert (points.sum(axis=2) == 7).all()
    assert (np.abs(points - 7 * p) < 1 + 1e-5).all()
    part = 7 * p % 1
    error = np.sqrt(part * (1 - part) / seeds) + 1e-6
    assert np.abs((points.mean(axis=0) - 7 * p) / error).max() < WORST_Z
    assert (points.std(axis=0) > 0).sum() > 50


def test_rounding_keeps_the_sum_where_the_last_probability_is_almost_nothing() -> None:
    """Cumulated over a long row, the share before the last exceeds the total by float64's error."""

    class Last(np.random.Generator):
        """Draws just below 1."""

        def random(self, size: Any = None, *args: Any, **more: Any) -> Any:
            return np.full(size, np.nextafter(1.0, 0.0))

    length, width = 2000, 50
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(width - 1), length) * MOST_POINTS
    points = np.concatenate([p, np.full((length, 1), 1e-15)], axis=1).ravel()
    position = np.repeat(np.arange(length), width)
    whole = targets._round(points, position, MOST_POINTS, Last(np.random.Philox(0)))
    assert (whole >= 0).all()
    assert (whole.reshape(length, width).sum(axis=1) == MOST_POINTS).all()


# Randomness


def test_a_seed_decides_and_seeds_differ() -> None:
    random = np.random.default_rng(0)
    proposed = draws(random, np.ones(LENGTH, bool), np.full(LENGTH, POINTS), VOCAB)
    spec = spec_of("multinomial")
    first, again, other = (settle(proposed, spec, seed) for seed in (0, 0, 1))
    for name in ("position", "id", "points"):
        np.testing.assert_array_equal(getattr(first[0], name), getattr(again[0], name))
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(dense(first[0]), dense(other[0]))
    # The order in which candidates come is none of the randomness.
    shuffled = random.permutation(len(proposed.id))
    turned = RowEntries(*(x[shuffled] for x in (proposed.position, proposed.id, proposed.points)))
    np.testing.assert_array_equal(dense(settle(turned, spec, 0)[0]), dense(first[0]))


class MadeUpTeacher:
    """The same draws for every row, so that nothing but settling tells rows apart."""

    info = TeacherInfo(name="x", config_sha256="0", weights_sha256="0", vocab_size=VOCAB)

    def __init__(self, nats: float):
        self.asked: list[np.ndarray] = []
        self.waited = 0
        self.most_unsettled = 0
        self.hold: Callable[[int], None] = lambda batch: None
        """Called with its number when a batch is waited for; the wait is over when it returns."""
        self._nats = nats

    def begin(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        rows: np.ndarray,
        spec: SamplerSpec,
        seed: int,
    ) -> Callable[[], RowCandidates]:
        self.asked.append(rows)
        number = len(self.asked) - 1
        self.most_unsettled = max(self.most_unsettled, len(self.asked) - self.waited)
        predicted = predicted_mask(segment_ids[0])
        one = draws(np.random.default_rng(0), predicted, np.full(LENGTH, spec.points), VOCAB)
        many = [np.tile(x, (len(rows), 1)) for x in (one.position, one.id, one.points)]
        nats = np.where(predicted_mask(segment_ids), self._nats, 0.0).astype(np.float32)

        def wait() -> RowCandidates:
            self.hold(number)
            self.waited += 1
            return RowCandidates(*many, nats, -nats / 2)

        return wait


def compute(teacher: MadeUpTeacher, rows: np.ndarray, seed: int = 0, slots: int = 3) -> Any:
    return begin(teacher, rows, seed, slots)()


def begin(teacher: MadeUpTeacher, rows: np.ndarray, seed: int = 0, slots: int = 3) -> Any:
    segment_ids = np.ones((len(rows), LENGTH), np.int32)
    return begin_rows(
        teacher,  # type: ignore[arg-type]
        vocabulary(),
        np.zeros_like(segment_ids),
        segment_ids,
        rows,
        spec=spec_of("multinomial", slots_per_token=slots),
        seed=seed,
        batch_sequences=4,
    )


def test_the_device_has_the_next_batch_while_one_is_settled() -> None:
    teacher = MadeUpTeacher(nats=1.0)
    deadline = time.monotonic() + 30

    def until_the_next_is_begun(batch: int) -> None:
        while len(teacher.asked) < min(batch + 2, 5):
            assert time.monotonic() < deadline, "the next batch waits for this one"
            time.sleep(0.001)
        time.sleep(0.01)

    teacher.hold = until_the_next_is_begun
    compute(teacher, np.arange(17))
    assert 2 <= teacher.most_unsettled <= 3


def test_a_teacher_may_be_handed_other_rows_before_the_last_are_settled() -> None:
    teacher = MadeUpTeacher(nats=1.0)
    let_go = threading.Event()
    teacher.hold = lambda batch: None if let_go.wait(30) else pytest.fail("never let go")
    first, second = (begin(teacher, rows) for rows in (np.arange(9), np.arange(20, 26)))
    assert (len(teacher.asked), teacher.waited) == (5, 0)
    let_go.set()
    found = [finish().entry_bucket for finish in (second, first)]
    for buckets, rows in zip(found, (np.arange(20, 26), np.arange(9)), strict=True):
        expected = compute(MadeUpTeacher(nats=1.0), rows).entry_bucket
        np.testing.assert_array_equal(buckets, expected)


def test_rows_are_settled_by_their_own_numbers_in_padded_batches() -> None:
    teacher = MadeUpTeacher(nats=1.0)
    rows = np.array([9, 3, 4, 8, 7, 3])
    result = compute(teacher, rows)
    assert [x.tolist() for x in teacher.asked] == [[9, 3, 4, 8], [7, 3, 3, 3]]
    assert len(result.head_count) == 6
    buckets = [x.tobytes() for x in result.entry_bucket]
    assert buckets[1] == buckets[5]
    assert len(set(buckets)) == 5
    assert len({compute(teacher, rows, seed).entry_bucket.tobytes() for seed in (0, 1, 2**33)}) == 3
    np.testing.assert_array_equal(compute(teacher, rows).entry_bucket, result.entry_bucket)


def test_nats_are_rounded_without_bias_and_apart_from_thinning() -> None:
    """Entropy and label have offsets of their own, which thinning does not disturb."""
    teacher = MadeUpTeacher(nats=3.21)
    result = compute(teacher, np.arange(400))
    entropy = codec.decode_nats(result.teacher_nats)[:, :, :-1]
    assert abs(z_scores(entropy[:, 0].ravel(), np.float64(3.21))) < WORST_Z
    assert abs(z_scores(entropy[:, 1].ravel(), np.float64(1.605))) < WORST_Z
    assert 0.05 < entropy[:, 0].std() + entropy[:, 1].std() < 0.2
    assert np.abs(np.corrcoef(entropy[:, 0].ravel(), entropy[:, 1].ravel())[0, 1]) < 0.1
    assert (result.teacher_nats[:, :, -1] == 0).all()
    unthinned = compute(teacher, np.arange(400), slots=16)
    assert (unthinned.block_points == POINTS).all()
    assert (result.block_points < POINTS).all()
    np.testing.assert_array_equal(unthinned.teacher_nats, result.teacher_nats)


def test_impossible_budgets_are_refused_before_the_teacher_is_asked() -> None:
    teacher = MadeUpTeacher(nats=1.0)
    with pytest.raises(BudgetError, match="at most the vocabulary's 200 ids and the rest"):
        compute(teacher, np.arange(2), slots=202)
    assert teacher.asked == []
