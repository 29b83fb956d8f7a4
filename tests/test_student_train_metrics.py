"""Records on disk: one a step, whatever was cut off."""

import json
from pathlib import Path

from student_train.metrics import METRICS_FILE, Metrics


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]


def test_records_after_the_restored_step_are_cut_away(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0) as metrics:
        for step in range(1, 8):
            metrics.write({"step": step, "loss": 1 / step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "lo')
    with Metrics(tmp_path, 5) as metrics:
        assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5]
        metrics.write({"step": 6, "loss": 0.5})
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path)[-1]["loss"] == 0.5
    assert lines(tmp_path)[2]["loss"] == 1 / 3


def test_a_new_run_begins_with_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        with Metrics(tmp_path, 0) as metrics:
            metrics.write({"step": 1, "loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_what_was_kept_is_not_written_twice(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0) as metrics:
        metrics.write({"step": 4, "loss": 2.0})
        metrics.write({"step": 4, "eval_nats_per_token": 3.0})
    with Metrics(tmp_path, 4) as metrics:
        metrics.write({"step": 4, "eval_nats_per_token": 3.0})
        metrics.write({"step": 4, "other": 1.0})
    assert [sorted(record)[0] for record in lines(tmp_path)] == [
        "loss",
        "eval_nats_per_token",
        "other",
    ]


def test_every_number_is_on_the_board(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0) as metrics:
        metrics.write({"step": 1, "loss": 2.0, "tokens_per_second": None})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert b"tokens_per_second" not in events.read_bytes()


def test_a_silent_host_writes_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path / "out", 0, silent=True) as metrics:
        metrics.write({"step": 1, "loss": 2.0})
    assert not (tmp_path / "out").exists()
