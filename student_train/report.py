"""What a run tells while it trains: records for the metrics, events for the caller, alarms.

Each step's numbers are read one step late, so that the device never waits for the host.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from schemas.errors import DivergenceError
from schemas.runs import TrainConfig
from student_train.metrics import Metrics
from student_train.step import Norms, StepMetrics
from student_train.throughput import Stopwatch, Work

TARGET_METRICS = ("kd", "kl", "teacher_entropy", "teacher_ce", "alpha")
"""Without stored targets these mean nothing."""


@dataclass(frozen=True)
class TrainEvent:
    """Told to the caller after every step, and while evaluating."""

    step: int
    """Steps done."""
    note: str
    """A few words for a console line."""
    record: dict[str, Any] | None = None
    """The record that was just written to the metrics, if any."""
    notice: str | None = None
    """A sentence that should stay on the console: a step was skipped, an evaluation is done."""


class Reporter:
    """Reads steps' metrics one step late, and writes those of every `log_every`-th step."""

    def __init__(
        self,
        config: TrainConfig,
        work: Work,
        metrics: Metrics,
        rows_of: Callable[[int], dict[str, list[int]]],
        checkpoint_until: Callable[[int], Path | None],
    ):
        """`rows_of` a 0-based step: its batch's rows and their shards, by name.

        `checkpoint_until` n steps: the newest checkpoint whose parameters are those of at most n.
        """
        self._config, self._work, self._metrics = config, work, metrics
        self._rows_of, self._checkpoint_until = rows_of, checkpoint_until
        self._waiting: tuple[int, StepMetrics, Norms | None, float] | None = None
        self._watch = Stopwatch()
        self._rates = ""

    def resume(self) -> None:
        """Leave what happened since the last step (an evaluation) out of the rates."""
        self._watch.resume()

    def is_logged(self, step: int) -> bool:
        """Whether a step gets a record, which has the norms of the state it left."""
        return step % self._config.log_every == 0 or step == self._config.steps

    def add(
        self, step: int, metrics: StepMetrics, norms: Norms | None, waited_seconds: float
    ) -> list[TrainEvent]:
        """Take a step that was just dispatched; returns the events of the one before."""
        events = self.flush()
        self._waiting = (step, metrics, norms, waited_seconds)
        return events

    def flush(self) -> list[TrainEvent]:
        """Wait for the step taken last. Raises DivergenceError after too many skipped ones."""
        if self._waiting is None:
            return []
        step, device_metrics, norms, waited = self._waiting
        self._waiting = None
        values = _values(device_metrics)
        self._watch.step(waited)
        events = []
        bad_in_a_row = int(values.pop("bad_in_a_row"))
        if bad_in_a_row:
            events.append(self._skipped(step, values))
        if bad_in_a_row >= self._config.max_bad_steps:
            raise self._divergence(step, bad_in_a_row, values)
        record = None
        if norms is not None:
            values |= _values(norms)
            if bad_in_a_row:
                values["update_norm"] = 0.0
            record = {"step": step, **self._logged(values), **self._watch.read(self._work)}
            self._rates = _rates_note(record)
            self._metrics.write(record)
        note = f"loss {values['loss']:.4f}{self._rates}"
        return [*events, TrainEvent(step, note, record)]

    def _logged(self, values: dict[str, float]) -> dict[str, float | None]:
        """What is known of a step; None for what JSON has no number for."""
        unused = set() if self._config.targets is not None else set(TARGET_METRICS)
        if not self._config.routing.is_on:
            unused.add("routed_share")
        return {
            name: value if math.isfinite(value) else None
            for name, value in values.items()
            if name not in unused
        }

    def _skipped(self, step: int, values: dict[str, float]) -> TrainEvent:
        reason = why_skipped(values)
        rows = self._rows_of(step - 1)
        record = {"step": step, "skipped": reason, **rows}
        self._metrics.write(record)
        shards = ", ".join(map(str, rows["shards"][:8])) + (" …" if rows["shards"][8:] else "")
        notice = f"step {step} was skipped: {reason} (shards {shards}; its rows are in the metrics)"
        return TrainEvent(step, f"skipped: {reason}", record, notice)

    def _divergence(self, step: int, bad: int, values: dict[str, float]) -> DivergenceError:
        last_good = self._checkpoint_until(step - bad)
        advice = (
            f"the last good checkpoint is {last_good}: export it and start from it with `init` and "
            "a lower optimizer.learning_rate under another `out`."
            if last_good
            else "there is no checkpoint yet; lower optimizer.learning_rate."
        )
        return DivergenceError(
            f"Training must not skip {self._config.max_bad_steps} steps in a row, but steps "
            f"{step - bad + 1} to {step} were skipped, the last as {why_skipped(values)}; {advice}"
        )


def _values(of_device: StepMetrics | Norms) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(of_device)._asdict().items()}


def why_skipped(values: dict[str, float]) -> str:
    """In words, of a skipped step's metrics."""
    loss, norm, limit = values["loss"], values["grad_norm"], values["grad_norm_limit"]
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if not math.isfinite(norm):
        return f"its gradient norm is {norm}"
    return f"its gradient norm {norm:.4g} exceeds {limit:.4g}"


def rows_and_shards(rows: np.ndarray, shard_sequences: int) -> dict[str, list[int]]:
    """Rows [B] of a batch and the shards that they are of, each once, ascending."""
    return {
        "rows": np.unique(rows).tolist(),
        "shards": np.unique(rows // shard_sequences).tolist(),
    }


def _rates_note(record: dict[str, Any]) -> str:
    if record["tokens_per_second"] is None:
        return ""
    text = f", {record['tokens_per_second']:,.0f} tokens/s"
    if record["mfu"] is not None:
        text += f", MFU {record['mfu']:.1%}"
    if record["input_wait_share"] >= 0.05:
        text += f", waiting {record['input_wait_share']:.0%} for data"
    return text
