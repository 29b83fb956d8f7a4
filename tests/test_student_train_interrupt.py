"""Signals are heard at any moment, also where Python itself would not hear them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from student_train import interrupt

ROOT = Path(__file__).parents[1]

# For minutes this neither returns to the interpreter nor keeps other threads from it, as XLA does.
DEAF = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"

SCRIPT = """
import hashlib, sys
from student_train.interrupt import watch
with watch(None) as asked:
    {before}
        print("ready", flush=True)
        {deaf}
"""


def start(before: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(before=before, deaf=DEAF)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_during_compilation_ends_the_run_at_once(number: int, status: int) -> None:
    process = start("with asked.nothing_to_save(12):")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert "stopped at step 12" in errors


def test_a_second_signal_is_heard_where_python_is_deaf() -> None:
    process = start("if True:")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    process.communicate()


def test_a_signal_asks_and_everything_is_put_back() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    threads = threading.active_count()
    with interrupt.watch(None) as asked:
        assert asked.agreed() is None
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 5
        while not asked.requested() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked.agreed() == 130
        with pytest.raises(interrupt.TrainingInterrupted) as caught:
            asked.raise_at(7, asked.agreed())
        assert (caught.value.step, caught.value.code) == (7, 130)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert threading.active_count() == threads
    # What is waited for elsewhere still is.
    assert signal.set_wakeup_fd(-1) == -1
