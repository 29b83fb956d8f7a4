"""A few tasks at a time, each in a thread, for work that waits on devices and storage in turn."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Overlap:
    """Runs tasks, `most` of them at once; an error of one is raised by a later `add`, or by `join`.

    Threads do not hold up the end of the process: what they commit, they commit whole.
    """

    def __init__(self, most: int):
        self._most = most
        self._running: deque[Future[Any]] = deque()

    def add(self, task: Callable[[], Any]) -> None:
        """Start a task, once fewer than `most` run. Raises what an earlier one raised."""
        while len(self._running) >= self._most:
            self._wait_for_oldest()
        future: Future[Any] = Future()
        threading.Thread(target=_run, args=(task, future), daemon=True).start()
        self._running.append(future)

    def join(self) -> None:
        """Wait for all. Raises what the first that failed raised, when none runs any more."""
        while self._running:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        try:
            self._running.popleft().result()
        except Exception:
            # Whoever is told tries again, and should not meet those that are left.
            while self._running:
                self._running.popleft().exception()
            raise


def _run(task: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(task())
    except BaseException as error:  # noqa: BLE001  # Whoever waits for it is told.
        future.set_exception(error)
