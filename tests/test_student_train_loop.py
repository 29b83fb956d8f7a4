"""Whole runs: a student learns a known chain; finished, refused, stopped and exported runs."""

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from student_store import MODEL, VOCAB, chain, make_rows, make_store, small_config

from gemma2 import checkpoint as gemma2_checkpoint
from gemma2 import model as gemma2
from schemas.errors import (
    AlignmentError,
    CheckpointError,
    ConfigError,
    DivergenceError,
    ManifestMismatchError,
)
from schemas.model import ModelConfig
from schemas.runs import EvalConfig, OptimizerConfig, RateSchedule, TrainConfig
from student_train.evaluate import evaluate
from student_train.export import export
from student_train.interrupt import TrainingInterrupted
from student_train.loop import TrainEvent, TrainResult, train

ONE = jax.devices()[:1]


pytestmark = pytest.mark.usefixtures("compile_once", "compile_quickly")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `store` and `held-out`."""
    folder = tmp_path_factory.mktemp("stores")
    make_store(folder / "store", rows=64)
    make_store(folder / "held-out", rows=21, seed=2, targets=False)
    return folder


@pytest.fixture(scope="module")
def trained(stores: Path) -> tuple[TrainConfig, TrainResult, list[TrainEvent]]:
    """A run of 150 steps on one device, with a tokenizer beside it."""
    config = small_config(
        stores, stores / "trained", steps=150, eval_every=60, log_every=7, checkpoint_every=50
    )
    tokenizer = stores / "some.model"
    tokenizer.write_bytes(b"pieces")
    events: list[TrainEvent] = []
    result = train(
        config,
        piece_bytes=np.full(VOCAB, 3, np.int32),
        tokenizer=tokenizer,
        on_event=events.append,
        devices=ONE,
    )
    return config, result, events


def records(result: TrainResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.metrics.read_text().splitlines()]


def held_out_entropy() -> tuple[float, int]:
    """(nats per token of the chain itself on the held-out rows, predicted tokens)."""
    successors, probabilities = chain()
    nats, count = 0.0, 0
    for tokens, segments in zip(*make_rows(21, 32, 2), strict=True):
        for t in range(len(tokens) - 1):
            if segments[t] == segments[t + 1] != 0:
                taken = successors[tokens[t]] == tokens[t + 1]
                nats -= math.log(probabilities[tokens[t]][taken][0])
                count += 1
    return nats / count, count


def test_a_student_learns_the_chain_from_its_targets(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]],
) -> None:
    _, result, _ = trained
    first, last = records(result)[0], records(result)[-2]
    assert first["kl"] > 2
    assert 0 <= last["kl"] < 0.1
    assert last["kd"] == pytest.approx(last["kl"] + last["teacher_entropy"], abs=1e-5)
    floor, tokens = held_out_entropy()
    assert result.evaluation is not None
    assert result.evaluation.tokens == tokens
    assert floor < result.evaluation.nats_per_token < floor + 0.1
    assert result.evaluation.text_bytes == 3 * tokens
    assert result.evaluation.bits_per_byte == pytest.approx(
        result.evaluation.nats_per_token / math.log(2) / 3
    )


def test_records_and_events_come_at_their_steps(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]],
) -> None:
    _, result, events = trained
    logged = [record["step"] for record in records(result) if "loss" in record]
    assert logged == [*range(7, 150, 7), 150]
    evaluated = [record["step"] for record in records(result) if "eval_nats_per_token" in record]
    assert evaluated == [60, 120, 150]
    steps = [event.step for event in events if event.note.startswith("loss")]
    assert steps == list(range(1, 151))
    assert [event.record for event in events if event.record] == records(result)
    assert records(result)[0]["tokens_per_second"] > 0


def test_only_the_newest_checkpoints_stay(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]],
) -> None:
    _, result, _ = trained
    assert sorted(path.name for path in result.checkpoint.parent.iterdir()) == ["100", "150"]


def test_a_finished_run_is_reused(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]],
) -> None:
    config, result, _ = trained
    before = result.metrics.read_bytes()
    again = train(config, devices=ONE)
    assert again.reused
    assert again.resumed_from is None
    assert (again.evaluation, again.export) == (result.evaluation, result.export)
    assert again.metrics.read_bytes() == before
    assert again.checkpoint.resolve() == result.checkpoint.resolve()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, r"settings\.seed is 0 there and 5 here"),
        ({"steps": 151}, r"settings\.steps is 150 there and 151 here"),
        ({"alpha": 0.5}, r"settings\.alpha is 1\.0 there and 0\.5 here"),
        ({"targets": None}, r"settings\.alpha is 1\.0 there and 0\.0 here; targets is \w+ there"),
    ],
)
def test_a_run_of_other_settings_is_refused(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]],
    change: dict[str, Any],
    message: str,
) -> None:
    config, _, _ = trained
    with pytest.raises(CheckpointError, match=message):
        train(config.model_copy(update=change), devices=ONE)


def unfinished(folder: Path, stores: Path, **changes: Any) -> TrainConfig:
    """A run that was stopped after two steps."""
    config = small_config(stores, folder / "out", steps=6, **changes)
    stop = threading.Event()

    def on_event(event: TrainEvent) -> None:
        if event.step == 1:
            stop.set()

    with pytest.raises(TrainingInterrupted) as caught:
        train(config, on_event=on_event, stop=stop, devices=ONE)
    assert caught.value.code == 0
    assert caught.value.step == 2
    return config


def test_an_unfinished_run_continues_only_on_its_store_and_model(
    tmp_path: Path, stores: Path
) -> None:
    config = unfinished(tmp_path, stores)
    make_store(tmp_path / "other", rows=64, seed=9)
    moved = config.model_copy(update={"store": str(tmp_path / "other")})
    message = r"in .*checkpoints/2 targets is \w{64} there and \w{64} here; tokens is \w{64} there"
    with pytest.raises(CheckpointError, match=message):
        train(moved, devices=ONE)
    wider = tmp_path / "wider.json"
    wider.write_text(json.dumps(MODEL | {"mlp_width": 65}))
    message = r"checkpoints/2 model\.mlp_width is 64 there and 65 here; use the old settings"
    with pytest.raises(CheckpointError, match=message):
        train(config.model_copy(update={"model": str(wider)}), devices=ONE)
    result = train(config.model_copy(update={"loss_chunk_tokens": 32}), devices=ONE)
    assert result.resumed_from == 2
    assert [record["step"] for record in records(result) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_a_run_continues_on_another_number_of_devices(tmp_path: Path, stores: Path) -> None:
    config = unfinished(tmp_path, stores)
    result = train(config, devices=jax.devices()[:4])
    assert result.resumed_from == 2
    whole = train(config.model_copy(update={"out": tmp_path / "whole"}), devices=ONE)
    losses = [[r["loss"] for r in records(run) if "loss" in r] for run in (result, whole)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


def test_a_damaged_checkpoint_is_named(tmp_path: Path, stores: Path) -> None:
    config = unfinished(tmp_path, stores)
    folder = config.out / "checkpoints" / "2"
    for file in (folder / "run").iterdir():
        file.write_text("{")
    message = r"none is \(step 2: run/\S+ is not what was written\); put one back"
    with pytest.raises(CheckpointError, match=message):
        train(config, devices=ONE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_exit(tmp_path: Path, stores: Path, number: int, code: int) -> None:
    config = small_config(stores, tmp_path / "out", steps=6)

    def on_event(event: TrainEvent) -> None:
        if event.step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        train(config, on_event=on_event, devices=ONE)
    assert caught.value.code == code
    assert signal.getsignal(number) is before
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["4"]
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 4


def test_students_with_and_without_targets_differ_only_in_their_loss(
    tmp_path: Path, stores: Path
) -> None:
    runs = {}
    for name, change in {
        "labels": {"targets": None},
        "alpha 0": {"alpha": 0.0},
        "distilled": {},
    }.items():
        config = small_config(stores, tmp_path / name, steps=6, **change)
        runs[name] = records(train(config, devices=ONE))
    labels, zero, distilled = (
        [record["ce"] for record in runs[name] if "ce" in record] for name in runs
    )
    # The first batch and the first weights are the same; only then do the students part.
    assert labels[0] == pytest.approx(distilled[0], rel=1e-6)
    np.testing.assert_allclose(labels, zero, rtol=1e-5)
    assert abs(labels[2] - distilled[2]) > 1e-3
    assert "kd" not in runs["labels"][0]
    # Two float32 sums of the same terms, in two orders.
    assert runs["labels"][0]["loss"] == pytest.approx(runs["labels"][0]["ce"], rel=1e-6)


def test_an_export_holds_what_was_trained(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]], tmp_path: Path
) -> None:
    config, result, _ = trained
    assert (result.export / "tokenizer.model").read_bytes() == b"pieces"
    assert export(config.out, tmp_path / "again", None) == 150
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (result.export / name).read_bytes()
    assert export(config.out, tmp_path / "older", 100) == 100
    assert (tmp_path / "older" / name).read_bytes() != (result.export / name).read_bytes()
    with pytest.raises(CheckpointError, match=r"has \[100, 150\] and 30 asked for"):
        export(config.out, tmp_path / "none", 30)
    with pytest.raises(CheckpointError, match="nothing is no folder"):
        export(tmp_path / "nothing", tmp_path / "none", None)


def test_an_export_scores_as_the_run_did_and_as_the_dense_model_does(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]], stores: Path
) -> None:
    _, result, _ = trained
    config = EvalConfig(
        store=str(stores / "held-out"), model=result.export, batch_sequences=6, dtype="float32"
    )
    found = evaluate(config)
    assert result.evaluation is not None
    assert found.nats_per_token == pytest.approx(result.evaluation.nats_per_token, rel=1e-6)
    assert found.bits_per_byte is None
    assert found.tokens == result.evaluation.tokens
    assert evaluate(config) == found

    model, params = gemma2_checkpoint.load(result.export)
    tokens, segments = make_rows(21, 32, 2)
    hidden = gemma2.hidden_states(
        params, model, tokens, segments.astype(np.int32), dtype=np.dtype("float32")
    )
    logits = np.asarray(gemma2.logits(params, model, hidden), np.float64)[..., :VOCAB]
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    label = np.take_along_axis(log_softmax[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    assert found.nats_per_token == pytest.approx(-label[mask].mean(), rel=1e-5)


def test_evaluation_needs_the_tokenizer_of_the_store(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]], stores: Path
) -> None:
    config = EvalConfig(store=str(stores / "held-out"), model=trained[1].export)
    with pytest.raises(ManifestMismatchError, match="61 pieces and the one given has 60"):
        evaluate(config, piece_bytes=np.ones(60, np.int32))


def test_a_run_starts_from_an_exported_model(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]], stores: Path, tmp_path: Path
) -> None:
    _, result, _ = trained
    # Long warm-up: the first step must score as the model it starts from.
    config = small_config(
        stores,
        tmp_path / "out",
        steps=2,
        init=result.export,
        optimizer=OptimizerConfig(learning_rate=1e-6),
    )
    model = tmp_path / "same.json"
    stored = gemma2_checkpoint.load_config(result.export)
    model.write_text(stored.model_dump_json())
    continued = train(config.model_copy(update={"model": str(model)}), devices=ONE)
    assert records(continued)[0]["kl"] < 0.1
    model.write_text(stored.model_copy(update={"final_cap": 20.0}).model_dump_json())
    other = config.model_copy(update={"model": str(model), "out": tmp_path / "other"})
    with pytest.raises(ConfigError, match=r"final_cap is 30\.0 there and 20\.0 here; give its"):
        train(other, devices=ONE)


def test_a_run_starts_from_another_runs_checkpoint(
    trained: tuple[TrainConfig, TrainResult, list[TrainEvent]], stores: Path, tmp_path: Path
) -> None:
    """With the very parameters that the other run exported, on other devices."""
    run, result, _ = trained
    config = small_config(
        stores,
        tmp_path / "out",
        steps=1,
        model=run.model,
        init=run.out,
        optimizer=OptimizerConfig(learning_rate=1e-12, weight_decay=0.0),
    )
    continued = train(config, devices=jax.devices()[:2])
    expected = gemma2_checkpoint.load(result.export)[1]
    found = gemma2_checkpoint.load(continued.export)[1]
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-9)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    other = config.model_copy(update={"init": tmp_path / "empty", "out": tmp_path / "other"})
    with pytest.raises(CheckpointError, match="has none and none was asked for"):
        train(other, devices=ONE)


def test_misaligned_targets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    make_store(tmp_path / "store", roll=1)
    config = small_config(tmp_path, tmp_path / "out", steps=2)
    with pytest.raises(AlignmentError, match=r"those of 'default' of .*store put"):
        train(config, devices=ONE)
    assert not config.out.exists()


def test_a_model_with_too_few_rows_is_refused(tmp_path: Path, stores: Path) -> None:
    config = small_config(stores, tmp_path / "out", steps=2)
    small = tmp_path / "small.json"
    small.write_text(ModelConfig(**(MODEL | {"vocab_size": 60})).model_dump_json())
    message = r"it has 60 and the tokenizer of .*store has 61 ids"
    with pytest.raises(ManifestMismatchError, match=message):
        train(config.model_copy(update={"model": str(small)}), devices=ONE)


def test_a_loss_that_stays_no_number_ends_the_run(tmp_path: Path, stores: Path) -> None:
    config = small_config(
        stores,
        tmp_path / "out",
        steps=30,
        optimizer=OptimizerConfig(learning_rate=1e30, schedule=RateSchedule(warmup_steps=0)),
        eval_store=None,
    )
    message = (
        r"must not skip 5 steps in a row, but steps 2 to 6 were skipped, .* norm is nan; there"
    )
    with pytest.raises(DivergenceError, match=message):
        train(config, devices=ONE)
