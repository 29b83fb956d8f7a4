"""Whole runs that skip steps, average parameters and evaluate: resumed bit for bit, and told of."""

import json
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from student_store import MODEL, make_store, small_config

from gemma2 import checkpoint as gemma2_checkpoint
from schemas.errors import DivergenceError
from schemas.model import ModelConfig
from schemas.runs import RoutingConfig, TrainConfig
from student_train import data
from student_train import mesh as meshes
from student_train.batch import Batch
from student_train.checkpoint import Checkpoints
from student_train.data import StoreSource, row_order
from student_train.export import export
from student_train.interrupt import TrainingInterrupted
from student_train.loop import TrainEvent, TrainResult, train
from student_train.routing import definite
from student_train.step import State, abstract_state
from student_train.throughput import NO_RATES

ONE = jax.devices()[:1]
STEPS = 12
pytestmark = pytest.mark.usefixtures("compile_once", "compile_quickly")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `store`, of more rows than a run of 12 steps takes, and `held-out`."""
    folder = tmp_path_factory.mktemp("stores")
    make_store(folder / "store", rows=128)
    make_store(folder / "held-out", rows=21, seed=2, targets=False)
    return folder


def config(stores: Path, out: Path, **changes: Any) -> TrainConfig:
    fields = {"steps": STEPS, "checkpoint_every": 4, "ema_decay": 0.9, "eval_store": None}
    return small_config(stores, out, **(fields | changes))


def records(result: TrainResult | Path) -> list[dict[str, Any]]:
    path = result / "metrics.jsonl" if isinstance(result, Path) else result.metrics
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of_step(stores: Path, step: int) -> np.ndarray:
    """Of the 1-based step."""
    order = row_order(StoreSource(str(stores / "store"), "default"), 0)
    return order.rows(step - 1, 8)


def poison(monkeypatch: pytest.MonkeyPatch, stores: Path, rows: np.ndarray) -> None:
    """Stored weights of these rows are read as NaN."""
    real, poisoned = StoreSource.read, set(rows.tolist())

    def read(self: StoreSource, rows: np.ndarray) -> Batch:
        batch = real(self, rows)
        if self.targets_manifest is not None:
            batch.entry_weight[[row in poisoned for row in rows.tolist()]] = np.nan
        return batch

    monkeypatch.setattr(data.StoreSource, "read", read)


def state_of(config: TrainConfig, step: int) -> State:
    mesh = meshes.make_mesh(config.mesh, ONE)
    abstract = abstract_state(ModelConfig(**MODEL), config, mesh)
    with Checkpoints(config.out, keep=None) as checkpoints:
        return jax.device_get(checkpoints.restore(step, abstract))


def assert_same(found: Any, wanted: Any) -> None:
    leaves, others = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert len(leaves) == len(others) > 20
    for a, b in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(a, b)


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in NO_RATES} for record in found]


def test_a_poisoned_row_costs_one_step_and_is_named(
    tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_step(stores, 6)
    poison(monkeypatch, stores, rows[2:3])
    events: list[TrainEvent] = []
    whole = config(stores, tmp_path / "whole")
    result = train(whole, on_event=events.append, devices=ONE)
    skipped = [record for record in records(result) if "skipped" in record]
    assert skipped == [
        {
            "step": 6,
            "skipped": "its loss is nan",
            "rows": sorted(rows.tolist()),
            "shards": sorted({row // 8 for row in rows.tolist()}),
        }
    ]
    notices = [event.notice for event in events if event.notice]
    assert len(notices) == 1
    assert notices[0].startswith("step 6 was skipped: its loss is nan (shards ")
    logged = {record["step"]: record for record in records(result) if "loss" in record}
    assert sorted(logged) == list(range(1, STEPS + 1))
    assert (logged[6]["loss"], logged[6]["update_norm"]) == (None, 0)
    assert logged[7]["loss"] < logged[1]["loss"]

    # The same run, stopped right after the bad step and continued.
    parts = config(stores, tmp_path / "parts")
    stop = threading.Event()

    def on_event(event: TrainEvent) -> None:
        if event.step == 5:
            stop.set()

    with pytest.raises(TrainingInterrupted) as caught:
        train(parts, on_event=on_event, stop=stop, devices=ONE)
    assert caught.value.step == 6
    assert int(state_of(parts, 6).guard.bad_in_a_row) == 1
    resumed = train(parts, devices=ONE)
    assert resumed.resumed_from == 6
    assert without_times(records(resumed)) == without_times(records(result))
    assert_same(state_of(parts, STEPS), state_of(whole, STEPS))
    name = "model.safetensors"
    assert (resumed.export / name).read_bytes() == (result.export / name).read_bytes()


def test_too_many_bad_steps_end_the_run_at_its_last_good_checkpoint(
    tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, stores, np.concatenate([rows_of_step(stores, n)[:1] for n in (7, 8, 9)]))
    run = config(stores, tmp_path / "out", max_bad_steps=3)
    message = (
        r"must not skip 3 steps in a row, but steps 7 to 9 were skipped, the last as its loss is "
        rf"nan; the last good checkpoint is {run.out}/checkpoints/4: export it"
    )
    with pytest.raises(DivergenceError, match=message):
        train(run, devices=ONE)
    assert [r["step"] for r in records(run.out) if "skipped" in r] == [7, 8, 9]
    # It was told why it ended; one more bad step is allowed, and the run goes on.
    result = train(run.model_copy(update={"max_bad_steps": 4}), devices=ONE)
    assert result.resumed_from == 8
    assert [r["step"] for r in records(result) if "skipped" in r] == [7, 8, 9]


def test_the_average_is_what_is_evaluated_and_exported(tmp_path: Path, stores: Path) -> None:
    run = config(stores, tmp_path / "out", eval_store=str(stores / "held-out"))
    result = train(run, devices=ONE)
    state = state_of(run, STEPS)
    _, exported = gemma2_checkpoint.load(result.export)
    assert_same_params(exported, state.ema)
    export(run.out, tmp_path / "averaged", None)
    export(run.out, tmp_path / "last", None, averaged=False)
    assert_same_params(gemma2_checkpoint.load(tmp_path / "averaged")[1], state.ema)
    assert_same_params(gemma2_checkpoint.load(tmp_path / "last")[1], state.params)
    assert not np.array_equal(state.ema["embedding"], state.params["embedding"])
    raw = train(run.model_copy(update={"ema_decay": None, "out": tmp_path / "raw"}), devices=ONE)
    assert raw.evaluation is not None
    assert result.evaluation is not None
    assert raw.evaluation.nats_per_token < result.evaluation.nats_per_token - 1e-3
    # The average is beside the training, which it does not touch.
    assert [r.get("loss") for r in records(raw)] == [r.get("loss") for r in records(result)]


def assert_same_params(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluations_leave_the_training_alone(tmp_path: Path, stores: Path) -> None:
    held_out = str(stores / "held-out")
    runs = [
        config(stores, tmp_path / "often", eval_store=held_out, eval_every=3, log_every=2),
        config(stores, tmp_path / "never", log_every=2),
    ]
    results = [train(run, devices=ONE) for run in runs]
    often, never = ([r for r in records(result) if "loss" in r] for result in results)
    assert sum("eval_nats_per_token" in r for r in records(results[0])) == 4
    assert without_times(often) == without_times(never)
    assert [sorted(record) for record in often] == [sorted(record) for record in never]
    # Not even a rate is missing: the first step is the only one without.
    assert all(record["tokens_per_second"] > 0 for record in often)
    assert_same(state_of(runs[0], STEPS), state_of(runs[1], STEPS))


def test_an_evaluation_takes_no_time_of_the_steps(
    tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes a second and each batch of an evaluation a hundred."""
    clock = [0.0]

    def read() -> float:
        clock[0] += 1e-3
        return clock[0]

    monkeypatch.setattr("student_train.throughput.time.perf_counter", read)

    def on_event(event: TrainEvent) -> None:
        clock[0] += 100.0 if event.note.startswith("evaluating") else 1.0

    run = config(
        stores, tmp_path / "out", eval_store=str(stores / "held-out"), eval_every=3, steps=8
    )
    found = [r for r in records(train(run, on_event=on_event, devices=ONE)) if "loss" in r]
    slowest = min(r["tokens_per_second"] for r in found[1:])
    assert slowest > 8 * 32 / 10


def test_a_share_is_a_cut_in_nats_of_the_store(tmp_path: Path, stores: Path) -> None:
    run = definite(config(stores, tmp_path, routing=RoutingConfig(drop_share=0.3)))
    below = run.routing.below_nats
    batch = StoreSource(str(stores / "store"), "default").read(np.arange(128))
    segments = batch.segment_ids
    mask = np.zeros(segments.shape, bool)
    mask[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != 0)
    entropies = batch.teacher_entropy[mask]
    shares = {float(cut): float((entropies < cut).mean()) for cut in np.unique(entropies)}
    assert below == min(shares, key=lambda cut: abs(shares[cut] - 0.3))
    assert 0.25 < shares[below] < 0.35
    assert definite(config(stores, tmp_path)).routing.below_nats is None
