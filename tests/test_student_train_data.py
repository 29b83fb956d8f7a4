"""Batches are a pure function of step, seed and store; prefetching changes nothing."""

import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from student_store import ENTRIES, add_targets, make_rows, make_store, make_targets

from logit_store.writer import TargetsWriter, plan_shards
from schemas.errors import IncompleteStoreError, StoreNotFoundError
from student_train.batch import Batch
from student_train.data import RowOrder, StoreSource, permuted, place, prefetch, row_order


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097, 65_537])
def test_a_permutation_of_any_size_reaches_every_row_once(size: int) -> None:
    images = permuted(np.arange(size), size, b"key")
    assert images.dtype == np.int64
    np.testing.assert_array_equal(np.sort(images), np.arange(size))


def test_a_permutation_looks_random() -> None:
    size = 20_000
    images = permuted(np.arange(size), size, b"key")
    # Of a random permutation: correlations of order 1/sqrt(size) = 0.007, one fixed point expected.
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.03
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert np.count_nonzero(images == np.arange(size)) < 8
    others = permuted(np.arange(size), size, b"kez")
    assert np.count_nonzero(images == others) < 8


def test_the_order_of_rows_is_golden() -> None:
    """Change these numbers only if old runs need not be continued or repeated."""
    order = RowOrder(10, 7, "abc")
    np.testing.assert_array_equal(order.rows(0, 4), GOLDEN[:4])
    np.testing.assert_array_equal(order.rows(1, 4), GOLDEN[4:8])
    np.testing.assert_array_equal(order.rows(2, 4), GOLDEN[8:])


GOLDEN = [2, 3, 0, 5, 6, 4, 8, 1, 9, 7, 5, 9]


def test_every_epoch_takes_every_row_once_in_another_order() -> None:
    order = RowOrder(23, 0, "store")
    taken = np.concatenate([order.rows(step, 5) for step in range(23)])
    epochs = taken.reshape(5, 23)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(23))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_batch_may_be_larger_than_the_store() -> None:
    rows = RowOrder(3, 0, "store").rows(1, 7)
    assert np.bincount(rows, minlength=3).min() >= 2


@pytest.mark.parametrize("other", [RowOrder(100, 1, "a"), RowOrder(100, 0, "b")])
def test_the_order_depends_on_seed_and_store(other: RowOrder) -> None:
    assert not np.array_equal(RowOrder(100, 0, "a").rows(3, 50), other.rows(3, 50))


def test_students_with_and_without_targets_see_the_same_rows(tmp_path: Path) -> None:
    store = str(make_store(tmp_path / "store"))
    with_targets, without = StoreSource(store, "default"), StoreSource(store, None)
    for step in range(6):
        rows = row_order(with_targets, 5).rows(step, 4)
        np.testing.assert_array_equal(rows, row_order(without, 5).rows(step, 4))
        left, right = with_targets.read(rows), without.read(rows)
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.segment_ids, right.segment_ids)
        assert left.entry_id.shape == (4, 32 * ENTRIES)
        assert right.entry_id.shape == (4, 0)


def test_rows_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    source = StoreSource(str(make_store(tmp_path / "store")), "default")
    tokens, segments = make_rows(20, 32, 1)
    rows = np.array([17, 3, 3, 9])
    batch = source.read(rows)
    np.testing.assert_array_equal(batch.tokens, tokens[rows])
    np.testing.assert_array_equal(batch.segment_ids, segments[rows])
    again = source.read(np.arange(20))
    for found, all_rows in zip(batch, again, strict=True):
        np.testing.assert_array_equal(found, all_rows[rows])


def test_what_top_k_stores_of_all_other_ids_is_no_entry(tmp_path: Path) -> None:
    source = StoreSource(str(make_store(tmp_path / "store")), "default")
    rows = np.arange(4)
    before = source.read(rows)
    manifest = source.targets_manifest
    assert manifest is not None
    assert source._targets is not None
    # Of a vocabulary that ends before it, an id is the rest.
    last = int(before.entry_id.max())
    teacher = manifest.teacher.model_copy(update={"vocab_size": last})
    source._targets._manifest = manifest.model_copy(update={"teacher": teacher})
    after = source.read(rows)
    is_rest = before.entry_id == last
    assert is_rest.any()
    assert (after.entry_id[is_rest] == -1).all()
    assert (after.entry_weight[is_rest] == 0).all()
    np.testing.assert_array_equal(after.entry_weight[~is_rest], before.entry_weight[~is_rest])


def test_an_incomplete_store_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", targets=False)
    with pytest.raises(StoreNotFoundError, match="holds no targets 'default'"):
        StoreSource(str(store), "default")
    add_targets(store, "default", *make_rows(20, 32, 1), shards=2)
    message = r"only 2 of the 3 shards of the targets 'default' of .* are committed"
    with pytest.raises(IncompleteStoreError, match=message):
        StoreSource(str(store), "default")


def test_of_a_store_that_grows_a_run_keeps_to_its_rows(tmp_path: Path) -> None:
    store = str(make_store(tmp_path / "store", targets=False, shard_sequences=4))
    rows = make_rows(20, 32, 1)
    add_targets(tmp_path / "store", "default", *rows, shards=3)
    with pytest.raises(IncompleteStoreError, match=r"only 3 of the 5 shards .* --partial_store"):
        StoreSource(store, "default")
    source = StoreSource(store, "default", partial=True)
    assert source.num_rows == 12
    drawn = np.concatenate([row_order(source, 0).rows(step, 6) for step in range(2)])
    np.testing.assert_array_equal(np.sort(drawn), np.arange(12))
    targets = TargetsWriter(store, "default")
    spec = plan_shards(targets.manifest)[3]
    part = slice(spec.first_row, spec.stop_row)
    targets.write(spec, rows[0][part], rows[1][part], make_targets(*rows).part(part))
    assert StoreSource(store, "default", partial=True).num_rows == 16
    again = StoreSource(store, "default", partial=True, rows=12)
    for step in range(4):
        np.testing.assert_array_equal(
            row_order(again, 0).rows(step, 5), row_order(source, 0).rows(step, 5)
        )
    # Labels alone need no targets.
    assert StoreSource(store, None).num_rows == 20


def test_a_part_of_a_store_must_begin_at_its_beginning(tmp_path: Path) -> None:
    store = str(make_store(tmp_path / "store", shard_sequences=4))
    targets = StoreSource(store, "default")._targets
    assert targets is not None
    targets.ledger.withdraw([2])
    with pytest.raises(IncompleteStoreError, match=r"first 20 rows, but shard 2 of the targets"):
        StoreSource(store, "default", partial=True, rows=20)
    assert StoreSource(store, "default", partial=True).num_rows == 8
    targets.ledger.withdraw([0])
    with pytest.raises(IncompleteStoreError, match=r"shard 0 of the targets 'default' of .* wait"):
        StoreSource(store, "default", partial=True)


def numbered(rows: np.ndarray) -> Batch:
    """A batch whose every array holds its row's number."""
    return Batch(*(np.repeat(rows[:, None], 3, axis=1) for _ in Batch._fields))


def test_each_device_gets_its_rows(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    rows = np.array([5, 3, 8, 1, 9, 2, 7, 0])
    batch = place(rows, numbered, NamedSharding(mesh, P("fsdp")))
    np.testing.assert_array_equal(np.asarray(batch.tokens)[:, 0], rows)
    for shard in batch.entry_id.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data)[:, 0], rows[shard.index[0]])


def test_a_host_reads_only_the_rows_of_its_devices() -> None:
    class HalfSharding:
        """The second of two hosts, with two devices of four rows each."""

        def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[int, object]:
            return {2: (slice(8, 12),), 3: (slice(12, 16),)}

    asked = []

    def read(rows: np.ndarray) -> Batch:
        asked.append(rows)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        place(np.arange(100, 116), read, HalfSharding())  # type: ignore[arg-type]
    np.testing.assert_array_equal(asked[0], np.arange(108, 116))


def test_prefetching_keeps_the_order() -> None:
    found = list(prefetch(lambda step: numbered(np.array([step])), 3, 9))
    assert [step for step, _ in found] == [3, 4, 5, 6, 7, 8]
    assert [int(batch.tokens[0, 0]) for _, batch in found] == [3, 4, 5, 6, 7, 8]


def test_prefetching_raises_where_it_failed() -> None:
    def make(step: int) -> Batch:
        if step == 2:
            raise OSError("disk gone at 2")
        return numbered(np.array([step]))

    batches = prefetch(make, 0, 5)
    assert next(batches)[0] == 0
    assert next(batches)[0] == 1
    with pytest.raises(OSError, match="disk gone at 2"):
        next(batches)


def test_prefetching_stays_bounded_and_ends_with_its_consumer() -> None:
    made = []

    def make(step: int) -> Batch:
        made.append(step)
        return numbered(np.array([step]))

    batches = prefetch(make, 0, 1000, depth=2)
    next(batches)
    time.sleep(0.3)
    assert len(made) <= 4
    batches.close()
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count
