"""SIGTERM and SIGINT during training: the first asks for a clean end, the second ends at once.

Python runs a signal's handler only between two of its own instructions, and a compilation or a wait
for the device is one that takes minutes. So signals are read by a thread, from the file descriptor
that Python writes their numbers to.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax

from student_train import hosts

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
        self._asked: int | None = None
        self._signal: int | None = None
        self._unsaved = threading.Lock()
        self._saved_step: int | None = None

    def requested(self) -> bool:
        return self._number() is not None or (self._stop is not None and self._stop.is_set())

    def agreed(self) -> int | None:
        """The exit status to stop with if any process was asked to; all must call this together."""
        said = hosts.agree(str(self._code()) if self.requested() else None)
        return max(map(int, said.values()), default=None)

    def raise_at(self, step: int, code: int | None = None) -> NoReturn:
        """Raise TrainingInterrupted; the state of `step` must be on disk."""
        raise TrainingInterrupted(step, self._code() if code is None else code)

    @contextmanager
    def nothing_to_save(self, step: int) -> Iterator[None]:
        """In here a first signal ends the process at once: `step` is on disk, or 0.

        For what cannot be interrupted, such as compilation. Of several processes none leaves alone.
        """
        if jax.process_count() > 1:
            yield
            return
        with self._unsaved:
            self._saved_step = step
            self._leave_if_asked()
        try:
            yield
        finally:
            with self._unsaved:
                self._saved_step = None

    def _number(self) -> int | None:
        return self._asked if self._signal is None else self._signal

    def _code(self) -> int:
        number = self._number()
        return 0 if number is None else _EXIT_STATUS[signal.Signals(number)]

    def _handle(self, number: int, _: Any) -> None:
        """Of Python's own, sooner than the thread where the main thread is not deaf."""
        self._asked = number

    def _receive(self, number: int) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        with self._unsaved:
            self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self._signal is None or self._saved_step is None:
            return
        sys.stdout.flush()
        print(
            f"\nstopped at step {self._saved_step} while compiling; nothing had to be saved, run "
            "again to continue",
            file=sys.stderr,
            flush=True,
        )
        os._exit(self._code())


@contextmanager
def watch(stop: threading.Event | None) -> Iterator[Interrupt]:
    """Watch both signals and `stop`; signals only in the main thread, where Python allows it."""
    interrupt = Interrupt(stop)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while numbers := reader.recv(1):
            if numbers[0] in set(_EXIT_STATUS):
                interrupt._receive(numbers[0])

    thread = threading.Thread(target=listen, daemon=True, name="signals")
    thread.start()
    before = {number: signal.signal(number, interrupt._handle) for number in _EXIT_STATUS}
    before_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield interrupt
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            # None: one that was not set from Python, and cannot be set again from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        writer.close()
        thread.join()
        reader.close()
