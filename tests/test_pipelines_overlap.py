"""Tasks that overlap: how many at once, and what becomes of errors."""

import threading
import time
from functools import partial

import pytest

from pipelines.overlap import Overlap


class Watched:
    """Counts how many of its tasks run at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self.most = 0
        self.done: list[int] = []

    def task(self, number: int, seconds: float = 0.05, error: Exception | None = None) -> None:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(seconds)
        with self._lock:
            self._running -= 1
            self.done.append(number)
        if error:
            raise error


def test_so_many_run_at_once_and_all_are_done_when_joined() -> None:
    watched, overlap = Watched(), Overlap(2)
    for number in range(6):
        overlap.add(partial(watched.task, number))
    overlap.join()
    assert watched.most == 2
    assert sorted(watched.done) == list(range(6))


def test_an_error_is_raised_when_nothing_runs_any_more() -> None:
    watched, overlap = Watched(), Overlap(2)
    overlap.add(partial(watched.task, 0, 0.01, ValueError("of the first")))
    overlap.add(partial(watched.task, 1, 0.2))
    with pytest.raises(ValueError, match="of the first"):
        overlap.add(partial(watched.task, 2))
    assert watched.done == [0, 1]
    overlap.join()


def test_the_last_ones_error_is_not_lost() -> None:
    watched, overlap = Watched(), Overlap(2)
    overlap.add(partial(watched.task, 0))
    overlap.add(partial(watched.task, 1, 0.0, ValueError("of the last")))
    with pytest.raises(ValueError, match="of the last"):
        overlap.join()
