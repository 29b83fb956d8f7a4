"""Trackers get the numbers of every record, in one run, and are imported only when asked for."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from schemas.errors import MissingDependencyError
from schemas.runs import TrainConfig
from student_train import trackers
from student_train.metrics import Metrics


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Any:
        self.opened.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or "run-1",
            log=lambda numbers, step: self.logged.append((numbers, step)),
            finish=self._finish,
        )

    def _finish(self) -> None:
        self.finished += 1


class FakeMlflow(ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[str, Any]] = []

    def set_experiment(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> Any:
        self.calls.append(("start", run_id or run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "run-2"))

    def log_dict(self, data: dict[str, Any], name: str) -> None:
        self.calls.append((name, data["steps"]))

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.calls.append(("metrics", (numbers, step)))

    def end_run(self) -> None:
        self.calls.append(("end", None))


def write(config: TrainConfig, records: list[dict[str, Any]], restored: int = 0) -> None:
    opener = lambda: trackers.open_trackers(config)  # noqa: E731
    with Metrics(config.out, restored, open_trackers=opener) as metrics:
        for record in records:
            metrics.write(record)


RECORDS: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.0, "mfu": None},
    {"step": 2, "skipped": "its loss is nan", "rows": [1, 2]},
    {"step": 2, "loss": None, "grad_norm": 3},
]


def test_trackers_get_the_numbers_and_continue_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    config = TrainConfig(store="s", out=tmp_path / "student", steps=7, trackers=("wandb", "mlflow"))
    write(config, RECORDS)
    assert wandb.logged == [({"loss": 2.0}, 1), ({"grad_norm": 3.0}, 2)]
    assert wandb.opened[0]["name"] == "student"
    assert wandb.opened[0]["config"]["steps"] == 7
    assert mlflow.calls == [
        ("experiment", "retort"),
        ("start", "student"),
        ("config.json", 7),
        ("metrics", ({"loss": 2.0}, 1)),
        ("metrics", ({"grad_norm": 3.0}, 2)),
        ("end", None),
    ]
    write(config, [{"step": 3, "loss": 1.0}], restored=2)
    assert [opened["id"] for opened in wandb.opened] == [None, "run-1"]
    assert mlflow.calls[6:] == [
        ("start", "run-2"),
        ("metrics", ({"loss": 1.0}, 3)),
        ("end", None),
    ]
    assert wandb.finished == 2


def test_a_missing_tracker_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = TrainConfig(store="s", out=Path("o"), trackers=("wandb",))
    with pytest.raises(MissingDependencyError, match=r"run `pip install wandb` or leave it out"):
        trackers.check(config)


def test_nothing_is_imported_that_was_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = TrainConfig(store="s", out=tmp_path)
    trackers.check(config)
    write(config, RECORDS)
    assert not (tmp_path / trackers.RUNS_FILE).exists()
