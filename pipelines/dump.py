"""`retort dump`: a teacher's sparse targets for every token of a store, as a Beam job.

The driver checks and writes the manifest, submits the shards that have no ledger record, and waits.
A worker reads its rows from the store, runs the teacher in one fixed batch shape, and commits the
shard whole. Running the same command again continues; a finished dump is left as it is.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console

from gemma2 import checkpoint
from logit_store import reader, writer
from pipelines import progress, runner, software
from schemas.errors import IncompleteStoreError, ManifestMismatchError
from schemas.manifest import (
    LedgerRecord,
    ShardSpec,
    TargetsManifest,
    TeacherInfo,
    identity,
)
from schemas.runs import DumpConfig
from teacher_dump.targets import compute_rows
from teacher_dump.teacher import Gemma2Teacher

_teachers: dict[tuple[str, str, int], Gemma2Teacher] = {}
_teachers_lock = threading.Lock()


def dump(config: DumpConfig, console: Console, options: PipelineOptions | None = None) -> str:
    """Compute every missing shard of the set of targets `config.name`; returns what was done.

    Raises ManifestMismatchError if the set exists under another config, IncompleteStoreError if the
    tokens themselves are not complete, and whatever RetortError a worker met.
    """
    manifest = plan(config)
    writer.create_targets(config.store, config.name, manifest)
    writer.sweep_locks(config.store)
    pending = writer.pending(config.store, config.name)
    total = manifest.num_shards
    if not pending:
        return f"targets '{config.name}' are complete: all {total} shards reused"
    done = total - len(pending)
    if done:
        console.print(f"dump: resuming, {done} of {total} shards are committed")
    with progress.watch(
        console,
        "dump",
        total,
        "shards",
        lambda: total - len(writer.pending(config.store, config.name)),
    ):
        runner.run(pending, WriteTargets(config), "WriteTargets", options)
    left = writer.pending(config.store, config.name)
    if left:
        raise IncompleteStoreError(
            f"Every shard must be committed when the job ends, but {len(left)} of {total} are not "
            f"(first: {left[0].index}); run the same command again."
        )
    return f"targets '{config.name}': {len(pending)} shards computed, {done} reused"


def plan(config: DumpConfig) -> TargetsManifest:
    """The manifest that `config` asks for over the store's tokens; reads no weights into memory."""
    tokens = reader.TokensReader(config.store)
    manifest = tokens.manifest
    missing = manifest.num_shards - len(tokens.committed)
    if missing:
        raise IncompleteStoreError(
            f"A dump needs all tokens, but {missing} of {manifest.num_shards} token shards of "
            f"{config.store} are not committed; run `retort tokenize` again first."
        )
    config_sha256, weights_sha256 = checkpoint.fingerprint(config.teacher)
    return TargetsManifest(
        tokens_fingerprint=identity(manifest),
        num_sequences=manifest.num_sequences,
        sequence_tokens=manifest.sequence_tokens,
        shard_sequences=manifest.shard_sequences,
        teacher=TeacherInfo(
            name=Path(config.teacher).resolve().name,
            config_sha256=config_sha256,
            weights_sha256=weights_sha256,
            vocab_size=manifest.tokenizer.vocab_size,
        ),
        sampler=config.sampler,
        weight_code=config.weight_code,
        seed=config.seed,
        batch_sequences=config.batch_sequences,
        software=software.versions(),
    )


class WriteTargets(beam.DoFn):
    """A shard's name in, its committed ledger record out."""

    def __init__(self, config: DumpConfig):
        self._config = config

    def process(self, element: str) -> Iterator[str]:
        spec = ShardSpec.model_validate_json(element)
        yield write_shard(self._config, spec).canonical_json()


def write_shard(config: DumpConfig, spec: ShardSpec) -> LedgerRecord:
    """Compute and commit one shard; a shard that is already committed is returned untouched."""
    target_writer = writer.TargetsWriter(config.store, config.name)
    existing = target_writer.committed(spec)
    if existing is not None:
        return existing
    manifest = target_writer.manifest
    teacher = _teacher(config, manifest)
    rows = np.arange(spec.first_row, spec.stop_row)
    tokens = reader.TokensReader(config.store).rows(rows)
    targets = compute_rows(
        teacher,
        tokens.tokens,
        tokens.segment_ids,
        rows,
        spec=manifest.sampler,
        seed=manifest.seed,
        weight_code=manifest.weight_code,
        batch_sequences=manifest.batch_sequences,
    )
    return target_writer.write(spec, tokens.tokens, tokens.segment_ids, targets)


def _teacher(config: DumpConfig, manifest: TargetsManifest) -> Gemma2Teacher:
    """This process's teacher, loaded once however many threads ask."""
    key = (str(config.teacher), config.dtype, manifest.teacher.vocab_size)
    with _teachers_lock:
        if key not in _teachers:
            teacher = Gemma2Teacher(
                config.teacher, dtype=config.dtype, vocab_size=manifest.teacher.vocab_size
            )
            if teacher.info.weights_sha256 != manifest.teacher.weights_sha256:
                raise ManifestMismatchError(
                    "A worker's teacher must be the manifest's, but its weights hash to "
                    f"{teacher.info.weights_sha256} and not {manifest.teacher.weights_sha256}; "
                    f"give every worker the same files at {config.teacher}."
                )
            _teachers[key] = teacher
        return _teachers[key]
