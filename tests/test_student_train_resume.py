"""A run that is killed again and again ends as one that never was, to the last bit."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from student_processes import finish, records, start
from student_store import make_store, small_config

from student_train.throughput import NO_RATES

STEPS = 45


def steps_done(out: Path) -> int:
    return max((record["step"] for record in records(out)), default=0)


def end_at(process: "subprocess.Popen[str]", out: Path, step: int, number: int) -> None:
    """Send a signal at a random moment after `step` was reported."""
    deadline = time.monotonic() + 300
    while steps_done(out) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        # What it reads grows: more often it would take as much of a core as the run does.
        time.sleep(0.03)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(number)


def write_config(folder: Path, name: str) -> Path:
    config = small_config(folder, folder / name, steps=STEPS).model_copy(
        update={"checkpoint_every": 7, "eval_every": 15, "ema_decay": 0.9, "accumulate": 2}
    )
    path = folder / f"{name}.json"
    path.write_text(config.model_dump_json())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `whole`, a run that nothing interrupted, and `compiled`, all its programs."""
    folder = tmp_path_factory.mktemp("resume")
    make_store(folder / "store", rows=24)
    make_store(folder / "held-out", rows=6, seed=2, targets=False)
    finish([start(write_config(folder, "whole"))])
    return folder


@pytest.fixture
def compiled(folder: Path, tmp_path: Path) -> Path:
    """A copy: who is killed may leave half a program."""
    return shutil.copytree(folder / "compiled", tmp_path / "compiled")


def test_a_killed_run_ends_as_an_uninterrupted_one(folder: Path, compiled: Path) -> None:
    config, out = write_config(folder, "killed"), folder / "killed"
    # Killed before the first evaluation, with what it saved by itself alone; told to stop between
    # two checkpoints, after one; killed when it went on from what it saved at that signal. A
    # SIGTERM that comes from outside is of test_student_train_multihost.py.
    kills = [
        (random.randint(8, 13), signal.SIGKILL, -signal.SIGKILL),
        (random.randint(22, 27), signal.SIGINT, 130),
        (random.randint(35, 40), signal.SIGKILL, -signal.SIGKILL),
    ]
    for step, number, status in kills:
        process = start(config, 0.02, compiled=compiled)
        end_at(process, out, step, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        if number != signal.SIGKILL:
            stopped_at = steps_done(out)
            assert (out / "checkpoints" / str(stopped_at)).is_dir()
            assert stopped_at < STEPS
    [(output, _)] = finish([start(config, compiled=compiled)], seconds=120)
    assert int(output.split("resumed_from=")[1].split()[0]) >= 28

    expected, found = records(folder / "whole"), records(out)
    for record in (*expected, *found):
        for name in NO_RATES:
            record.pop(name, None)
    assert [r["step"] for r in expected if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in expected if "eval_nats_per_token" in r] == [15, 30, 45]
    key = lambda record: (record["step"], "loss" not in record)  # noqa: E731
    assert sorted(found, key=key) == sorted(expected, key=key)
    weights = "export/model.safetensors"
    assert (out / weights).read_bytes() == (folder / "whole" / weights).read_bytes()


def test_a_second_signal_ends_the_run_at_once(folder: Path, compiled: Path) -> None:
    process = start(write_config(folder, "ended"), 60, compiled=compiled)
    end_at(process, folder / "ended", 1, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    process.communicate()
