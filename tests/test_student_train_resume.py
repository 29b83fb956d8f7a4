"""A run that is killed again and again ends as one that never was, to the last bit."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from student_processes import records, start
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
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(number)


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    make_store(tmp_path / "store", rows=24)
    make_store(tmp_path / "held-out", rows=6, seed=2, targets=False)
    paths = {}
    for name in ("whole", "killed"):
        config = small_config(tmp_path, tmp_path / name, steps=STEPS).model_copy(
            update={"checkpoint_every": 7, "eval_every": 15, "ema_decay": 0.9, "accumulate": 2}
        )
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(config.model_dump_json())
    whole = start(paths["whole"])

    out = tmp_path / "killed"
    kills = [
        (random.randint(8, 13), signal.SIGKILL, -signal.SIGKILL),
        (random.randint(17, 20), signal.SIGTERM, 0),
        (random.randint(24, 28), signal.SIGINT, 130),
        (random.randint(35, 40), signal.SIGKILL, -signal.SIGKILL),
    ]
    for step, number, status in kills:
        process = start(paths["killed"], 0.02)
        end_at(process, out, step, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        if number != signal.SIGKILL:
            stopped_at = steps_done(out)
            assert (out / "checkpoints" / str(stopped_at)).is_dir()
            assert stopped_at < STEPS
    process = start(paths["killed"])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert int(output.split("resumed_from=")[1].split()[0]) >= 28

    _, errors = whole.communicate(timeout=60)
    assert whole.returncode == 0, errors
    expected, found = records(tmp_path / "whole"), records(out)
    for record in (*expected, *found):
        for name in NO_RATES:
            record.pop(name, None)
    assert [r["step"] for r in expected if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in expected if "eval_nats_per_token" in r] == [15, 30, 45]
    key = lambda record: (record["step"], "loss" not in record)  # noqa: E731
    assert sorted(found, key=key) == sorted(expected, key=key)
    weights = "export/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    make_store(tmp_path / "store", rows=24)
    config = tmp_path / "config.json"
    config.write_text(small_config(tmp_path, tmp_path / "out", steps=STEPS).model_dump_json())
    process = start(config, 60)
    end_at(process, tmp_path / "out", 1, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    process.communicate()
