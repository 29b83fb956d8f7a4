"""The order of similar ids: a permutation, alike neighbours, halves, determinism.

Tables of ranks and buckets are tested in test_logit_store_codec.py.
"""

import numpy as np
import pytest

from teacher_dump import vocabulary
from teacher_dump.vocabulary import similarity_order


def steps(embedding: np.ndarray, order: np.ndarray) -> float:
    """Mean squared distance of neighbours in an order."""
    return float(np.square(np.diff(embedding[order], axis=0)).sum(axis=1).mean())


def clusters(seed: int, groups: int, size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [groups * size, width] around well separated centres, shuffled, and their groups."""
    random = np.random.default_rng(seed)
    group = random.permutation(np.repeat(np.arange(groups), size))
    centres = random.normal(size=(groups, width)) * 10
    rows = centres[group] + random.normal(size=(groups * size, width)) * 0.01
    return rows.astype(np.float32), group


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (3, 4), (7, 1), (100, 3), (1001, 48), (40, 64)])
def test_order_is_a_permutation_that_is_always_the_same(shape: tuple[int, int]) -> None:
    embedding = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    order = similarity_order(embedding)
    assert order.dtype == np.uint32
    np.testing.assert_array_equal(np.sort(order), np.arange(shape[0]))
    np.testing.assert_array_equal(similarity_order(embedding.copy()), order)
    np.testing.assert_array_equal(similarity_order(embedding.astype(np.float64)), order)


def test_ids_of_one_kind_lie_together() -> None:
    """Eight kinds of equal size: halving three times parts them, so none is torn."""
    embedding, group = clusters(1, 8, 32, 16)
    along = group[similarity_order(embedding)]
    assert np.count_nonzero(np.diff(along)) == 7


def test_kinds_of_any_size_are_torn_rarely() -> None:
    embedding, group = clusters(2, 30, 21, 40)
    along = group[similarity_order(embedding)]
    changes = np.count_nonzero(np.diff(along))
    by_chance = 630 * 29 / 30
    assert changes < 0.2 * by_chance


def test_neighbours_are_more_alike_than_by_chance() -> None:
    """Rows in three directions of many: a line, a plane and a cloud of noise."""
    random = np.random.default_rng(3)
    mixed = random.normal(size=(2000, 3)) @ random.normal(size=(3, 64)) * 2
    embedding = mixed + random.normal(size=(2000, 64)) * 0.3
    chance = steps(embedding, random.permutation(2000))
    assert steps(embedding, similarity_order(embedding)) < 0.2 * chance


def test_a_line_is_followed_from_end_to_end() -> None:
    random = np.random.default_rng(4)
    place = random.permutation(256)
    embedding = np.outer(place, random.normal(size=10)) + 5.0
    along = place[similarity_order(embedding)]
    # From the median outwards each half is turned as its own axis points, pairs not at all.
    np.testing.assert_array_equal(np.sort(along[:128]) // 128, np.full(128, along[0] // 128))
    for size in (4, 16, 64):
        pieces = along.reshape(-1, size)
        assert (np.ptp(pieces, axis=1) == size - 1).all()


def test_halves_are_parted_at_the_median_of_the_widest_axis() -> None:
    random = np.random.default_rng(5)
    embedding = random.normal(size=(501, 6)) * [1, 1, 1, 8, 1, 1]
    order = similarity_order(embedding)
    first, second = embedding[order[:250], 3], embedding[order[250:], 3]
    low, high = sorted([first, second], key=np.mean)
    # The widest axis is found by power iteration and from a sample, so all but exactly.
    assert np.quantile(low, 0.97) < np.quantile(high, 0.03)


def test_directions_that_hardly_vary_do_not_count() -> None:
    """32 principal axes are looked at; where a row lies is none, only how rows differ."""
    random = np.random.default_rng(6)
    wide = random.normal(size=(300, 32)) * 3
    flat = random.normal(size=(300, 8)) * 1e-3
    order = similarity_order(np.concatenate([flat, wide], axis=1))
    same = similarity_order(np.concatenate([flat, wide], axis=1) + 7.0)
    assert np.mean(order == same) > 0.95
    assert steps(wide, order) < 0.9 * steps(wide, random.permutation(300))


def test_rows_that_are_all_equal_keep_their_order() -> None:
    """No axis to part them by, and no division by nothing."""
    order = similarity_order(np.full((50, 5), 0.25, np.float32))
    np.testing.assert_array_equal(order, np.arange(50))


def test_the_axis_is_found_from_a_sample_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(7)
    # Far from the origin, whose direction does not count.
    rows = (random.normal(size=(4000, 12)) * np.linspace(1, 3, 12) + 20).astype(np.float32)
    exact = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][0]
    for sample in (20_000, 500):
        monkeypatch.setattr(vocabulary, "_SAMPLE_ROWS", sample)
        axis = vocabulary._main_axis(rows, np.random.default_rng(0))
        assert np.linalg.norm(axis) == pytest.approx(1.0, abs=1e-5)
        # Eight steps: the variance along it is nearly the largest there is.
        assert np.var(rows @ axis) > 0.9 * np.var(rows @ exact)
