"""Training from a config to an exported student: the one place where the room's parts meet.

In order: the run is identified, a finished one is reused, targets are checked against tokens, the
state is made or restored, steps run, the last state is evaluated, saved and exported. Everything a
step needs is a function of its number, so a run that was cut off continues bit for bit.
"""

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma2 import checkpoint as gemma2_checkpoint
from gemma2 import presets
from gemma2.placement import check_model
from schemas.base import Document
from schemas.errors import (
    CheckpointError,
    ConfigError,
    RetortError,
    SaveError,
    StorageError,
)
from schemas.model import ModelConfig
from schemas.runs import TrainConfig
from student_train import alignment, export, hosts, trackers
from student_train import mesh as meshes
from student_train.batch import Batch
from student_train.checkpoint import CHECKPOINT_FOLDER, Checkpoints, RunIdentity, load_params
from student_train.data import StoreSource, place, prefetch, row_order
from student_train.dry_run import DryRun, measure
from student_train.evaluate import Evaluation, Evaluator, check_vocabulary
from student_train.interrupt import Interrupt, watch
from student_train.metrics import Metrics
from student_train.report import Reporter, TrainEvent, rows_and_shards
from student_train.routing import definite
from student_train.step import (
    State,
    abstract_state,
    init_state,
    make_head,
    make_norms,
    make_state,
    make_train_step,
)
from student_train.throughput import Work, timed

RESULT_FILE = "result.json"
ALIGNMENT_SEQUENCES = 16


OnEvent = Callable[[TrainEvent], None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind."""

    evaluation: Evaluation | None
    """Of the last step; None without `eval_store`."""
    metrics: Path
    """JSON lines."""
    checkpoint: Path
    """Folder of the last checkpoint."""
    export: Path
    """Hugging Face folder."""
    resumed_from: int | None
    """The step this call continued from; None if it started anew or reused a finished run."""
    reused: bool
    """Whether the run had finished before, so that nothing was computed."""


class _Finished(Document):
    """`result.json`: written last, so that its presence means that all else is there."""

    run: RunIdentity
    eval_store: str | None
    evaluation: Evaluation | None
    metrics: str
    checkpoint: str
    export: str


def train(
    config: TrainConfig,
    *,
    piece_bytes: np.ndarray | None = None,
    tokenizer: Path | None = None,
    on_event: OnEvent | None = None,
    say: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    devices: Sequence[Any] | None = None,
) -> TrainResult:
    """Train, continue or reuse the run in `config.out`.

    Args:
      config: the run.
      piece_bytes: int32 [V], UTF-8 bytes of each id, for bits per byte.
      tokenizer: SentencePiece file that is copied into the export.
      on_event: called after every step.
      say: given a line about what went wrong and was got over; default: to stderr.
      stop: once set, the run is saved and TrainingInterrupted raised, as after SIGTERM.
      devices: default all.

    Raises ConfigError, ManifestMismatchError, IncompleteStoreError, AlignmentError, CheckpointError
    or DivergenceError; HostError if another of several processes failed; TrainingInterrupted (a
    SystemExit) after a signal, the state being saved.
    """
    tell = on_event or (lambda event: None)
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    with watch(stop) as interrupt, hosts.ending_together(), _full_disk_explained(config.out):
        result = _Run(config, piece_bytes, tokenizer, tell, say, interrupt, devices).result()
        if interrupt.requested():
            interrupt.raise_at(config.steps)
        return result


@contextmanager
def _full_disk_explained(out: Path) -> Iterator[None]:
    """What is written beside checkpoints: records, events of TensorBoard, the exported model."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RetortError) or os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise StorageError(
            f"A run needs room for its records and its model, but the disk of {out} is full; make "
            "room and run the same command, which continues from the last checkpoint."
        ) from error


def dry_run(config: TrainConfig, devices: Sequence[Any] | None = None) -> DryRun:
    """What `train` would do, found by a few of its own steps; nothing is written.

    Raises what `train` raises before its first step.
    """
    with watch(None) as interrupt:
        run = _Run(config, None, None, lambda event: None, print, interrupt, devices)
        run.check_alignment()
        train_step = make_train_step(run.model, run.config, run.head, run.mesh)
        return measure(
            run.config,
            run.source,
            run.work(),
            train_step,
            run.abstract,
            run.new_state,
            run.batch,
        )


class _Run:
    """One call of `train`: what is fixed before the first step."""

    def __init__(
        self,
        config: TrainConfig,
        piece_bytes: np.ndarray | None,
        tokenizer: Path | None,
        tell: OnEvent,
        say: Callable[[str], None],
        interrupt: Interrupt,
        devices: Sequence[Any] | None,
    ):
        self.config = config = definite(config)
        self.tell, self.say, self.interrupt = tell, say, interrupt
        self.tokenizer, self.piece_bytes = tokenizer, piece_bytes
        trackers.check(config)
        self.model = presets.resolve(config.model)
        with Checkpoints(config.out, None) as checkpoints:
            rows = checkpoints.rows()
        self.source = StoreSource(
            config.store, config.targets, partial=config.partial_store, rows=rows
        )
        vocab_size = self.source.tokens_manifest.tokenizer.vocab_size
        check_vocabulary(self.model, vocab_size, config.store)
        self.mesh = meshes.make_mesh(config.mesh, devices)
        check_model(self.model, self.mesh)
        meshes.check_batch(self.mesh, config.batch_sequences, config.accumulate)
        self.identity = RunIdentity.of(config, self.model, self.source)
        self.order = row_order(self.source, config.seed)
        self._read = self._checked_read()
        self.abstract = abstract_state(self.model, config, self.mesh)
        self.head = make_head(
            self.model, vocab_size, self.source.targets_manifest, config.loss_chunk_tokens
        )

    def result(self) -> TrainResult:
        hosts.check_shared(self.config.out)
        finished = self._finished()
        if finished is not None:
            return finished
        self.check_alignment()
        with Checkpoints(self.config.out, self.config.keep_checkpoints) as checkpoints:
            state, resumed_from = self._first_state(checkpoints)
            with Metrics(
                self.config.out,
                resumed_from or 0,
                silent=not hosts.is_first(),
                open_trackers=partial(trackers.open_trackers, self.config),
            ) as metrics:
                state, evaluation = self._run(state, checkpoints, metrics)
            self._save_now(state, checkpoints)
            return self._finish(state, evaluation, checkpoints, metrics, resumed_from)

    def _finished(self) -> TrainResult | None:
        """The result of an earlier call that finished. Raises CheckpointError if it differs."""
        path = self.config.out / RESULT_FILE
        if not path.exists():
            return None
        found = _Finished.parse(json.loads(path.read_text()), str(path))
        self.identity.check(found.run, path)
        out = self.config.out
        if found.eval_store != self.config.eval_store or not (out / found.export).is_dir():
            return None
        return TrainResult(
            evaluation=found.evaluation,
            metrics=out / found.metrics,
            checkpoint=out / found.checkpoint,
            export=out / found.export,
            resumed_from=None,
            reused=True,
        )

    def _finish(
        self,
        state: State,
        evaluation: Evaluation | None,
        checkpoints: Checkpoints,
        metrics: Metrics,
        resumed_from: int | None,
    ) -> TrainResult:
        out = self.config.out
        folder = out / export.EXPORT_FOLDER
        export.write(folder, self.model, state.result, self.tokenizer)
        checkpoint = checkpoints.folder_of(self.config.steps)
        finished = _Finished(
            run=self.identity,
            eval_store=self.config.eval_store,
            evaluation=evaluation,
            metrics=metrics.path.name,
            checkpoint=str(checkpoint.relative_to(out.absolute())),
            export=folder.name,
        )
        if hosts.is_first():
            _write_atomically(out / RESULT_FILE, finished.model_dump_json(indent=2))
        hosts.agree()  # nobody leaves before all is written
        return TrainResult(evaluation, metrics.path, checkpoint, folder, resumed_from, reused=False)

    def check_alignment(self) -> None:
        """Raise AlignmentError if there are targets and they do not belong to their tokens."""
        if self.source.targets_manifest is None:
            return
        count = min(ALIGNMENT_SEQUENCES, self.order.num_rows)
        batch = self.source.read(np.unique(self.order.rows(0, count)))
        sampler = self.source.targets_manifest.sampler
        alignment.check_alignment(batch, sampler, f"'{self.config.targets}' of {self.config.store}")

    def _first_state(self, checkpoints: Checkpoints) -> tuple[State, int | None]:
        """The newest whole checkpoint's state and its step, or a new state and None."""
        checkpoints.sweep()
        newest = self._newest_whole(checkpoints)
        if newest is not None:
            return checkpoints.restore(newest, self.abstract), newest
        return self.new_state(), None

    def new_state(self) -> State:
        """The state before the first step."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        if self.config.init is None:
            make = partial(make_state, self.model, self.config)
            return jax.jit(make, out_shardings=shardings)(jax.random.key(self.config.seed))
        params = self._initial_params(self.config.init)
        make = partial(init_state, config=self.config)
        return jax.jit(make, out_shardings=shardings)(params)

    def _initial_params(self, init: Path) -> Any:
        """The parameters that the run starts from, of another run or of a Hugging Face folder."""

        def placed(found: ModelConfig) -> Any:
            _check_init(found, self.model, init)
            return self.abstract.params

        if (init / CHECKPOINT_FOLDER).is_dir():
            return load_params(init, None, placed)[2]
        found, params = gemma2_checkpoint.load(init, dtype=np.float32)
        where = jax.tree.map(lambda leaf: leaf.sharding, placed(found))
        return jax.device_put(params, where)

    def _newest_whole(self, checkpoints: Checkpoints) -> int | None:
        """The newest whole checkpoint's step, or None if there is none of any kind.

        Newer ones that are damaged are set aside. Raises CheckpointError if all there are.
        """
        known = checkpoints.steps()
        faults: dict[int, str] = {}
        for step in reversed(known):
            fault = checkpoints.fault(step)
            if fault is not None:
                faults[step] = fault
                continue
            where = checkpoints.folder_of(step)
            self.identity.check(checkpoints.identity(step), where)
            for damaged, what in faults.items():
                aside = checkpoints.set_aside(damaged)
                self.say(
                    f"The checkpoint of step {damaged} is damaged ({what}) and was moved to "
                    f"{aside}; the run continues from that of step {step}."
                )
            return step
        if faults:
            listed = "; ".join(f"step {step}: {what}" for step, what in faults.items())
            raise CheckpointError(
                f"A run continues from a whole checkpoint, but in {checkpoints.folder} none is "
                f"({listed}); put one back from a copy, or move the folder away to begin again."
            )
        return None

    def _run(
        self, state: State, checkpoints: Checkpoints, metrics: Metrics
    ) -> tuple[State, Evaluation | None]:
        """All remaining steps; returns the last state and its evaluation."""
        config = self.config
        train_step = make_train_step(self.model, config, self.head, self.mesh)
        norms_of = make_norms(config)
        reporter = self._reporter(checkpoints, metrics)
        evaluator = self._evaluator()
        checkpoints.reserve(self.abstract)

        first = int(state.step)
        # A run that was cut off between a checkpoint and its evaluation makes up for it here.
        evaluation = self._evaluate(evaluator, first, state, checkpoints, metrics)
        batches = prefetch(self.batch, first, config.steps)
        waits = timed(batches)
        try:
            for step in range(first, config.steps):
                batch, waited_seconds = self._next_batch(waits, step, state, checkpoints, reporter)
                if step == first:
                    with self.interrupt.nothing_to_save(step):
                        state, step_metrics = train_step(state, batch)
                else:
                    state, step_metrics = train_step(state, batch)
                done = step + 1
                norms = norms_of(state) if reporter.is_logged(done) else None
                # One step is under way while the one before it is read: the device never waits.
                self._tell_all(reporter.add(done, step_metrics, norms, waited_seconds))
                if done % config.checkpoint_every == 0 or done == config.steps:
                    self._tell_all(reporter.flush())
                    self._save(state, checkpoints)
                if self._is_evaluated(done):
                    self._tell_all(reporter.flush())
                    evaluation = self._evaluate(evaluator, done, state, checkpoints, metrics)
                    reporter.resume()
        finally:
            batches.close()
        return state, evaluation

    def batch(self, step: int) -> Batch:
        """The batch of a step, over the mesh."""
        rows = self.order.rows(step, self.config.batch_sequences)
        return place(rows, self._read, meshes.rows_sharding(self.mesh))

    def work(self) -> Work:
        length = self.source.tokens_manifest.sequence_tokens
        return Work.of(self.config, self.model, length, list(self.mesh.devices.flat))

    def _reporter(self, checkpoints: Checkpoints, metrics: Metrics) -> Reporter:
        config, manifest = self.config, self.source.tokens_manifest

        def rows_of(step: int) -> dict[str, list[int]]:
            rows = self.order.rows(step, config.batch_sequences)
            return rows_and_shards(rows, manifest.shard_sequences)

        def checkpoint_until(step: int) -> Path | None:
            known = checkpoints.steps()
            if not known:
                return None
            # Where all from before are gone, the oldest: skipped steps changed no parameters.
            before = [number for number in known if number <= step]
            return checkpoints.folder / str(before[-1] if before else known[0])

        return Reporter(config, self.work(), metrics, rows_of, checkpoint_until)

    def _checked_read(self) -> Callable[[np.ndarray], Batch]:
        """Reads rows, and refuses those of a shard whose targets are not of its tokens."""
        manifest = self.source.targets_manifest
        if manifest is None:
            return self.source.read
        where = f"'{self.config.targets}' of {self.config.store}"
        shards = alignment.ShardAlignment(manifest.sampler, manifest.shard_sequences, where)

        def read(rows: np.ndarray) -> Batch:
            batch = self.source.read(rows)
            shards.check(rows, batch)
            return batch

        return read

    def _next_batch(
        self,
        waits: Iterator[tuple[tuple[int, Batch], float]],
        step: int,
        state: State,
        checkpoints: Checkpoints,
        reporter: Reporter,
    ) -> tuple[Batch, float]:
        """The batch of `step`, and the seconds it was waited for.

        Once every process has its part of it and none was asked to stop. Otherwise the state is
        saved and TrainingInterrupted or the error is raised: no step is taken on rows that one of
        them could not read.
        """
        found, error = None, None
        try:
            (_, batch), waited_seconds = next(waits)
            found = batch, waited_seconds
        except RetortError as raised:
            error = raised
        code = None
        try:
            hosts.agree_on(error)
            code = self.interrupt.agreed()
            if code is None:
                assert found is not None
                return found
        except RetortError:
            self._tell_all(reporter.flush())
            self._save_now(state, checkpoints)
            self.say(f"The run's state is saved at step {step}; once that is mended, run again.")
            raise
        self._tell_all(reporter.flush())
        self._save_now(state, checkpoints)
        self.interrupt.raise_at(step, code)

    def _save(self, state: State, checkpoints: Checkpoints) -> None:
        """Begin a save; one that fails is said, and ends the run only if that is wished."""
        for begin in (checkpoints.wait, partial(checkpoints.save, state, self.identity)):
            try:
                begin()
            except SaveError as error:
                if self.config.on_failed_save == "stop":
                    raise
                self.say(f"{error} Training goes on.")

    def _save_now(self, state: State, checkpoints: Checkpoints) -> None:
        """Save, and return when it is on disk. Raises SaveError."""
        self._save(state, checkpoints)
        checkpoints.save(state, self.identity)
        checkpoints.wait()

    def _evaluator(self) -> Evaluator | None:
        if self.config.eval_store is None:
            return None
        return Evaluator(
            self.config.eval_store,
            self.model,
            self.mesh,
            batch_sequences=self.config.batch_sequences,
            dtype=self.config.dtype,
            piece_bytes=self.piece_bytes,
        )

    def _is_evaluated(self, step: int) -> bool:
        every = self.config.eval_every
        return step == self.config.steps or (every > 0 and step > 0 and step % every == 0)

    def _evaluate(
        self,
        evaluator: Evaluator | None,
        step: int,
        state: State,
        checkpoints: Checkpoints,
        metrics: Metrics,
    ) -> Evaluation | None:
        """Evaluate, if `step` is one to evaluate, and report it unless it was reported before."""
        if evaluator is None or not self._is_evaluated(step):
            return None

        def on_rows(done: int, total: int) -> None:
            self.tell(TrainEvent(step, f"evaluating {done}/{total}"))
            code = self.interrupt.agreed()
            if code is not None:
                self._save_now(state, checkpoints)
                self.interrupt.raise_at(step, code)

        try:
            evaluation = evaluator(state.result, on_rows)
        except RetortError:
            # Of several processes the others know nothing of it, and a save is made by all.
            if jax.process_count() == 1:
                self._save_now(state, checkpoints)
            raise
        record = {
            "step": step,
            "eval_nats_per_token": evaluation.nats_per_token,
            "eval_bits_per_byte": evaluation.bits_per_byte,
        }
        metrics.write(record)
        text = f"held out {evaluation.nats_per_token:.4f}"
        self.tell(TrainEvent(step, text, record, f"step {step}: {text} nats per token"))
        return evaluation

    def _tell_all(self, events: list[TrainEvent]) -> None:
        for event in events:
            self.tell(event)


def _check_init(found: ModelConfig, wanted: ModelConfig, folder: Path) -> None:
    ours, theirs = wanted.model_dump(), found.model_dump()
    differing = [
        f"{name} is {theirs[name]} there and {ours[name]} here"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if differing:
        raise ConfigError(
            f"init must be a checkpoint of the run's model, but in {folder} "
            f"{'; '.join(differing)}; give its config as the model."
        )


def _write_atomically(path: Path, text: str) -> None:
    work = path.with_suffix(".tmp")
    work.write_text(text)
    os.replace(work, path)
