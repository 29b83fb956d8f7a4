"""SIGTERM and SIGINT during training: the first asks for a clean end, the second kills at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_EXIT_STATUS = {signal.SIGTERM: 0, signal.SIGINT: 128 + signal.SIGINT}


class TrainingInterrupted(SystemExit):
    """Training was asked to stop; its state was saved before this was raised.

    `code` is the process's exit status: 0 after SIGTERM (a preemption is no failure) or a `stop`
    event, 130 after SIGINT.
    """

    def __init__(self, step: int, code: int):
        super().__init__(code)
        self.step = step


class Interrupt:
    """Whether someone asked for the end of training."""

    def __init__(self, stop: threading.Event | None):
        self._stop = stop
        self._signal: int | None = None

    def requested(self) -> bool:
        return self._signal is not None or (self._stop is not None and self._stop.is_set())

    def agreed(self) -> bool:
        """Whether any host was asked; every host must call this at the same step."""
        if jax.process_count() == 1:
            return self.requested()
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.requested()))))

    def raise_at(self, step: int) -> None:
        """Raise TrainingInterrupted; the state of `step` must be on disk."""
        code = 0 if self._signal is None else _EXIT_STATUS[signal.Signals(self._signal)]
        raise TrainingInterrupted(step, code)

    def _handle(self, number: int, _: Any) -> None:
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = number


@contextmanager
def watch(stop: threading.Event | None) -> Iterator[Interrupt]:
    """Watch both signals and `stop`; signals only in the main thread, where Python allows it."""
    interrupt = Interrupt(stop)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt._handle) for number in _EXIT_STATUS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
