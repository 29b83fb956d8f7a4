"""Runs the trainer for the command line and the quickstart: progress, tokenizer and messages."""

from pathlib import Path

from rich.console import Console

from logit_store.reader import TokensReader, check_tokenizer
from pipelines import progress
from schemas.errors import ConfigError
from schemas.model import TOKENIZER_FILE
from schemas.runs import EvalConfig, ExportConfig, TrainConfig
from student_train import evaluate as evaluation
from student_train import export as exporting
from student_train import hosts
from student_train.dry_run import DryRun
from student_train.interrupt import TrainingInterrupted
from student_train.loop import TrainResult
from student_train.loop import dry_run as measure_run
from student_train.loop import train as run_training
from student_train.report import TrainEvent
from teacher_dump.tokenizer import Tokenizer


def train(config: TrainConfig, console: Console, label: str = "train") -> TrainResult:
    """Train, or continue, or reuse a finished run, saying which; raises what the trainer raises.

    The tokenizer, if there is one, is copied into the exported model and counts bits per byte. Of
    several processes, found by the environment, only the first says anything but its errors.
    """
    hosts.join()
    console.quiet = console.quiet or not hosts.is_first()
    tokenizer = _tokenizer(config.tokenizer, config.store)
    piece_bytes = None if tokenizer is None else tokenizer.piece_bytes()
    try:
        with progress.bar(console, label, config.steps, "steps") as advance:

            def on_event(event: TrainEvent) -> None:
                advance(event.step, event.note)
                if event.notice is not None:
                    console.print(f"{label}: {event.notice}")

            result = run_training(
                config,
                piece_bytes=piece_bytes,
                tokenizer=config.tokenizer,
                on_event=on_event,
                say=lambda line: console.print(f"{label}: {line}"),
            )
            if result.reused:
                advance(config.steps, "reused")
    except TrainingInterrupted as stop:
        console.print(f"{label}: stopped and saved at step {stop.step}; run again to continue")
        raise
    if result.reused:
        console.print(f"{label}: finished before, all {config.steps} steps reused")
    elif result.resumed_from is not None:
        console.print(f"{label}: was resumed from step {result.resumed_from}")
    return result


def dry_run(config: TrainConfig) -> DryRun:
    """What `train` would do, without doing it; raises what the trainer raises before it starts."""
    _tokenizer(config.tokenizer, config.store)
    return measure_run(config)


def evaluate(config: EvalConfig, console: Console) -> evaluation.Evaluation:
    """Score a model on a store; bits per byte need the tokenizer, by default the model's own."""
    path = config.tokenizer or config.model / TOKENIZER_FILE
    tokenizer = _tokenizer(path if path.is_file() or config.tokenizer else None, config.store)
    total = TokensReader(config.store).manifest.num_sequences
    with progress.bar(console, "eval", total, "sequences") as advance:
        return evaluation.evaluate(
            config,
            piece_bytes=None if tokenizer is None else tokenizer.piece_bytes(),
            on_rows=lambda done, total: advance(done, ""),
        )


def export(config: ExportConfig) -> int:
    """Write a checkpointed step as a Hugging Face folder; returns the step.

    Raises ConfigError if the folder exists, so that nothing is lost by a slip of the pen.
    """
    assert config.run is not None
    if config.out.exists():
        raise ConfigError(
            f"--out must not exist yet, but {config.out} does; choose another folder or remove it."
        )
    beside = config.run / exporting.EXPORT_FOLDER / TOKENIZER_FILE
    tokenizer = beside if beside.is_file() else None
    return exporting.export(config.run, config.out, config.step, tokenizer, config.averaged)


def _tokenizer(path: Path | None, store: str) -> Tokenizer | None:
    """The tokenizer at `path`, checked to be the store's."""
    if path is None:
        return None
    tokenizer = Tokenizer.load(path)
    check_tokenizer(TokensReader(store).manifest, tokenizer.info.sha256, tokenizer.info.vocab_size)
    return tokenizer
