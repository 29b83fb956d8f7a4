"""Weights & Biases and MLflow, for those who ask for them: thin adapters, imported only then.

They get the numbers of the records that the metrics write. A run keeps its name there: a run that
is continued goes on in the same one.
"""

import importlib
import json
import os
from typing import Any, Protocol

from schemas.errors import MissingDependencyError
from schemas.runs import TrainConfig

RUNS_FILE = "trackers.json"
PROJECT = "retort"


class Tracker(Protocol):
    """Where a run's numbers go."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Record numbers of a step; after a resume, of some steps again."""

    def close(self) -> None:
        """Send what is left."""


class _WeightsAndBiases:
    def __init__(self, module: Any, config: TrainConfig, run_id: str | None):
        self._run = module.init(
            project=PROJECT,
            name=config.out.name,
            id=run_id,
            resume="allow",
            dir=str(config.out),
            config=config.model_dump(mode="json"),
        )
        self.run_id: str = self._run.id

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, module: Any, config: TrainConfig, run_id: str | None):
        self._module = module
        if run_id is None:
            module.set_experiment(PROJECT)
            run = module.start_run(run_name=config.out.name)
            module.log_dict(config.model_dump(mode="json"), "config.json")
        else:
            run = module.start_run(run_id=run_id)
        self.run_id: str = run.info.run_id

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._module.log_metrics(numbers, step=step)

    def close(self) -> None:
        self._module.end_run()


_ADAPTERS: dict[str, Any] = {"wandb": _WeightsAndBiases, "mlflow": _MLflow}


def check(config: TrainConfig) -> None:
    """Raise MissingDependencyError naming the first of the config's trackers not installed."""
    for name in config.trackers:
        _module(name)


def open_trackers(config: TrainConfig) -> list[Tracker]:
    """The config's trackers, each in the run that it was in before, if there was one."""
    path = config.out / RUNS_FILE
    runs: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    found: list[Tracker] = []
    for name in config.trackers:
        tracker = _ADAPTERS[name](_module(name), config, runs.get(name))
        runs[name] = tracker.run_id
        found.append(tracker)
    if found:
        work = path.with_suffix(".tmp")
        work.write_text(json.dumps(runs))
        os.replace(work, path)
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"The tracker {name} needs its package, but it cannot be imported ({error}); run "
            f"`pip install {name}` or leave it out of trackers."
        ) from error
