"""Reading ahead: slow reads cost a run next to nothing, and many readers at once read the same."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small_store

from logit_store import reader
from student_train.batch import Batch, label_batch
from student_train.data import AHEAD, RowOrder, StoreSource, prefetch, row_order

READ_S, STEP_S = 0.05, 0.02


def slowly(rows: np.ndarray) -> Batch:
    """A read that takes as long as one from a bucket."""
    time.sleep(READ_S)
    tokens = np.broadcast_to(rows[:, None], (len(rows), 4)).astype(np.int32)
    return label_batch(tokens, np.ones_like(tokens))


def seconds(make, steps: int, depth: int) -> float:
    """Of a run whose step takes STEP_S, from its first batch on."""
    batches = prefetch(make, 0, steps, depth=depth)
    next(batches)
    start = time.monotonic()
    for _ in range(steps - 1):
        time.sleep(STEP_S)
        next(batches)
    return time.monotonic() - start


def test_reads_of_50_ms_cost_less_than_a_tenth_of_the_throughput() -> None:
    steps = 40
    order = RowOrder(64, 0, "tokens")

    def read(step: int) -> Batch:
        return slowly(order.rows(step, 2))

    at_once = seconds(lambda step: label_batch(np.zeros((2, 4)), np.ones((2, 4))), steps, AHEAD)
    slow = seconds(read, steps, AHEAD)
    assert slow < at_once / 0.9
    # One read at a time does not keep up: the number of them is what hides the latency.
    assert seconds(read, steps, 1) > 1.5 * slow


def test_as_many_reads_are_under_way_as_asked_for_and_no_more() -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def make(step: int) -> Batch:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        batch = slowly(np.array([step]))
        with lock:
            under_way -= 1
        return batch

    found = [step for step, _ in prefetch(make, 0, 12, depth=3)]
    assert found == list(range(12))
    assert most == 3


def test_batches_come_in_order_whichever_read_ends_first() -> None:
    def make(step: int) -> Batch:
        time.sleep(0.03 * (3 - step % 4))
        return slowly(np.array([step]))

    for step, batch in prefetch(make, 5, 17, depth=4):
        assert int(batch.tokens[0, 0]) == step


def test_nothing_is_begun_after_a_failure_was_raised() -> None:
    begun = []

    def make(step: int) -> Batch:
        begun.append(step)
        if step == 2:
            raise OSError("gone")
        return slowly(np.array([step]))

    batches = prefetch(make, 0, 1000, depth=2)
    with pytest.raises(OSError, match="gone"):
        list(batches)
    count = len(begun)
    time.sleep(3 * READ_S)
    assert len(begun) == count < 6


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("read") / "store")
    small_store.write_store(url)
    return url


def test_many_hosts_at_once_read_what_one_reads(store: str) -> None:
    """Eight readers of their own with four reads each under way, beside one that is alone."""
    rows = row_order(StoreSource(store, "default"), seed=3)
    alone = StoreSource(store, "default")
    expected = [alone.read(rows.rows(step, 4)) for step in range(12)]

    def host(_: int) -> None:
        source = StoreSource(store, "default")
        for step, batch in prefetch(lambda s: source.read(rows.rows(s, 4)), 0, 12, depth=4):
            for found, wanted in zip(batch, expected[step], strict=True):
                np.testing.assert_array_equal(found, wanted)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(host, range(8)))


def test_threads_share_one_reader(store: str) -> None:
    targets = reader.TargetsReader(store, "default")
    expected = targets.rows(range(small_store.ROWS))
    random = np.random.default_rng(0)
    orders = [random.permutation(small_store.ROWS) for _ in range(40)]

    def check(order: np.ndarray) -> None:
        found = targets.rows(order)
        for name in expected.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[order])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, orders))
