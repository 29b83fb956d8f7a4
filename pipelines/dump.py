"""`retort dump`: a teacher's sparse targets for every token of a store, as Beam jobs.

The driver checks and writes the manifest, submits the shards that have no ledger record, and waits.
A worker reads its rows from the store, runs the teacher in one fixed batch shape, and commits the
shard whole. Where the number of points is not given, a first small job lets the teacher read a
sample of the rows, from which it follows. Running the same command again continues; a finished dump
is left as it is.
"""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from pydantic import Field
from rich.console import Console

from logit_store import codec, manifests, reader, storage, writer
from logit_store.ledger import Ledger
from pipelines import devices, progress, reports, runner, software
from pipelines.answers import Answer, Answers
from pipelines.overlap import Overlap
from pipelines.shards import write_and_sum_up
from schemas.base import Document
from schemas.errors import CorruptStoreError, IncompleteStoreError, ManifestMismatchError
from schemas.manifest import (
    LedgerRecord,
    ShardSpec,
    TargetsManifest,
    TeacherInfo,
    identity,
)
from schemas.runs import DumpConfig, SamplerConfig
from teacher_dump import backends, vocabulary
from teacher_dump.audit import Audit, audit
from teacher_dump.targets import begin_rows
from teacher_dump.teacher import Teacher

# Rows from which the number of points follows: enough for 3 % of the mean number of entries.
_PILOT_ROWS = 64
_PILOT_TOKENS = 2**16
# Points whose expected entries are counted; what lies between is interpolated.
_PILOT_POINTS = np.unique(np.geomspace(1, 4096, 64).round().astype(np.int32))
# Shards that a worker has in hand: while the device computes one, the one before is written and the
# tokens of the one after are read.
_SHARDS_AT_ONCE = 2
# Rows whose tokens tell how often each id occurs.
_COUNTED_ROWS = 4096

_teachers: dict[tuple[str, str, str, int, int], Teacher] = {}
_teachers_lock = threading.Lock()
_handing_lock = threading.Lock()
_drivers = threading.Event()
"""Set in a process that is the driver of a dump; others are its workers, many to a machine."""


def dump(config: DumpConfig, console: Console, options: PipelineOptions | None = None) -> str:
    """Compute every missing shard of the set of targets `config.name`; returns what was done.

    Raises ManifestMismatchError if the set exists under another config, IncompleteStoreError if the
    tokens themselves are not complete, and whatever RetortError a worker met.
    """
    ledger = prepare(config, console, options)
    work = write_and_sum_up(
        ledger, WriteTargets(config), console, options, verb="dump", stage="dump"
    )
    if not work.computed:
        return f"targets '{config.name}' are complete: all {work.reused} shards reused"
    manifest = manifests.read_manifest(config.store, config.name)
    assert isinstance(manifest, TargetsManifest)
    report = reports.make(config.name, manifest, runner.name_of(options), work)
    reports.keep(config.store, report)
    return (
        f"targets '{config.name}': {work.computed} shards computed, {work.reused} reused\n"
        f"{report.text()}"
    )


def prepare(config: DumpConfig, console: Console, options: PipelineOptions | None = None) -> Ledger:
    """Make the set of targets, or accept it if it is the same; its ledger. As `dump` raises."""
    _drivers.set()
    manifest, tables = plan(config, console, options)
    writer.create_targets(config.store, config.name, manifest, tables)
    # The manifest holds what it said.
    _pilot(config).forget()
    storage.sweep_locks(config.store)
    return Ledger(config.store, config.name, manifest)


def dump_missing(store: str, name: str, teacher: Path, console: Console) -> str:
    """Compute the missing shards of a set of targets by what its manifest says; as `dump`.

    Raises ManifestMismatchError if the teacher is not the manifest's.
    """
    return dump(_config_of(store, name, teacher), console)


def audit_targets(
    store: str, name: str, teacher: Path, *, rows: int, seed: int, model_devices: int
) -> Audit:
    """Have a teacher compute some rows of a set of targets again, as its manifest says.

    Raises what loading the teacher raises, and ManifestMismatchError for another tokenizer.
    """
    config = _config_of(store, name, teacher).model_copy(update={"model_devices": model_devices})
    tokenizer = reader.TokensReader(store).manifest.tokenizer
    backends.check_tokenizer(teacher, tokenizer)
    backend = backends.choose(config.backend, teacher)
    found = backends.describe(backend, teacher, tokenizer.vocab_size)
    return audit(store, name, load_teacher(config, found), rows, seed)


def _config_of(store: str, name: str, teacher: Path) -> DumpConfig:
    """The config of a dump that continues a set of targets with a teacher."""
    manifest = manifests.read_manifest(store, name)
    assert isinstance(manifest, TargetsManifest)
    spec = manifest.sampler
    sampler = SamplerConfig(
        name=spec.name,
        points=spec.points if SamplerConfig(name=spec.name).has_points else None,
        slots_per_token=spec.slots_per_token,
        block_tokens=spec.block_tokens,
        temperature=spec.temperature,
    )
    return DumpConfig(
        store=store,
        teacher=teacher,
        backend=manifest.teacher.backend,
        name=name,
        sampler=sampler,
        seed=manifest.seed,
        batch_sequences=manifest.batch_sequences,
        dtype=manifest.dtype,
    )


def plan(
    config: DumpConfig, console: Console, options: PipelineOptions | None = None
) -> tuple[TargetsManifest, writer.Tables]:
    """The manifest that `config` asks for over the store's tokens, and its tables.

    What a set of targets has that exists already, and that the config leaves open, is kept.
    """
    tokens = reader.TokensReader(config.store)
    missing = int((~tokens.committed).sum())
    if missing:
        raise IncompleteStoreError(
            f"A dump needs all tokens, but {missing} of {tokens.manifest.num_shards} token shards "
            f"of {config.store} are not committed; run `retort tokenize` again first."
        )
    tokenizer = tokens.manifest.tokenizer
    backends.check_tokenizer(config.teacher, tokenizer)
    backend = backends.choose(config.backend, config.teacher)
    backends.check_dtype(backend, config.dtype)
    teacher = backends.describe(backend, config.teacher, tokenizer.vocab_size)
    existing = _existing(config)
    points = existing.sampler.points if existing is not None else None
    if config.sampler.has_points and config.sampler.points is None and points is None:
        points = _pilot_points(config, tokens, teacher, console, options)
    length, vocab_size = tokens.manifest.sequence_tokens, teacher.vocab_size
    sampler = config.sampler.spec(points, length, vocab_size).model_copy(
        update={"entries_per_token": _entries_asked(config.sampler, existing)}
    )
    tables = _tables(config, tokens, teacher, existing, sampler.slots_per_token)
    manifest = TargetsManifest.parse(
        {
            "tokens_fingerprint": identity(tokens.manifest),
            "num_sequences": tokens.manifest.num_sequences,
            "sequence_tokens": length,
            "shard_sequences": tokens.manifest.shard_sequences,
            "teacher": teacher,
            "sampler": sampler,
            "vocabulary": tables.info(),
            "seed": config.seed,
            "dtype": config.dtype,
            "batch_sequences": config.batch_sequences,
            "software": software.versions(),
        },
        "dump",
    )
    return manifest, tables


def _existing(config: DumpConfig) -> TargetsManifest | None:
    if config.name not in manifests.list_targets(config.store):
        return None
    found = manifests.read_manifest(config.store, config.name)
    assert isinstance(found, TargetsManifest)
    return found


def _entries_asked(config: SamplerConfig, existing: TargetsManifest | None) -> int | None:
    """What the number of points follows from, so that another wish is not taken for the same.

    Where the number itself is given, now or when the set was made, it decides.
    """
    if not config.has_points:
        return None
    if existing is None:
        return None if config.points else config.entries_per_token
    kept = existing.sampler.entries_per_token
    return kept if config.points or kept is None else config.entries_per_token


def _tables(
    config: DumpConfig,
    tokens: reader.TokensReader,
    teacher: TeacherInfo,
    existing: TargetsManifest | None,
    slots_per_token: int,
) -> writer.Tables:
    """The tables that exist, or new ones from the store's tokens and the teacher's embedding."""
    if existing is not None:
        try:
            return writer.Tables(
                reader.read_vocabulary(config.store, config.name, existing),
                reader.read_table(config.store, config.name, existing, "sampling_order"),
            )
        except CorruptStoreError:
            # A driver that was killed before it wrote them; what is made anew must be the same.
            pass
    counts = id_counts(tokens)
    if config.sampler.name == "systematic":
        embedding = backends.load_embedding(teacher.backend, config.teacher)[: len(counts)]
        order = vocabulary.similarity_order(embedding)
    else:
        order = np.arange(len(counts), dtype=np.uint32)
    return writer.Tables(codec.make_vocabulary(counts, slots_per_token), order)


def id_counts(tokens: reader.TokensReader) -> np.ndarray:
    """int64 [V]: how often each id occurs in rows that are spread evenly over the store."""
    counts = np.zeros(tokens.manifest.tokenizer.vocab_size, np.int64)
    rows = _spread(tokens.manifest.num_sequences, _COUNTED_ROWS)
    for some in np.array_split(rows, -(-len(rows) // 64)):
        found = tokens.rows(some)
        counts += np.bincount(found.tokens[found.segment_ids > 0], minlength=len(counts))
    return counts


def _spread(total: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(most, total)).astype(np.int64))


# The pilot: how many points give the number of entries that is asked for.


class PilotSpec(Document):
    """Some rows that the teacher reads to tell how many entries a number of points gives."""

    index: int = Field(ge=0)
    rows: tuple[int, ...]


class PilotCount(Answer):
    """What the teacher said: expected entries for each of the pilot's numbers of points.

    `run` is of the config, the teacher and the rows.
    """

    entries: tuple[float, ...]
    tokens: int


def _pilot_points(
    config: DumpConfig,
    tokens: reader.TokensReader,
    teacher: TeacherInfo,
    console: Console,
    options: PipelineOptions | None,
) -> int:
    """The number of points whose expected entries per token are nearest to what is asked for."""
    length = tokens.manifest.sequence_tokens
    rows = _spread(tokens.manifest.num_sequences, max(_PILOT_ROWS, _PILOT_TOKENS // length))
    size = config.batch_sequences
    specs = [
        PilotSpec(index=i, rows=tuple(rows[i * size : (i + 1) * size].tolist()))
        for i in range(-(-len(rows) // size))
    ]
    pilot = _pilot(config)
    runs = {spec.index: _pilot_run(config, teacher, spec) for spec in specs}
    known = pilot.get(runs)
    missing = [spec for spec in specs if spec.index not in known]
    with progress.watch(console, "dump: pilot", len(specs), "batches", pilot.count):
        runner.run(missing, CountPilot(config, teacher), "CountPilot", options)
    known = pilot.get(runs)
    total = sum(count.tokens for count in known.values())
    entries = np.sum([count.entries for count in known.values()], axis=0) / max(total, 1)
    return points_for(config.sampler.entries_per_token, _PILOT_POINTS, entries)


def points_for(wanted: float, points: np.ndarray, entries: np.ndarray) -> int:
    """The whole number of points nearest to `wanted` entries, on the curve through the counts.

    The curve is straight between neighbours on logarithmic scales; beyond its ends, they stand.
    """
    nearest = np.interp(np.log(wanted), np.log(entries), np.log(points))
    return max(1, round(float(np.exp(nearest))))


class CountPilot(beam.DoFn):
    """Some rows' numbers in, their number out; what the teacher said goes to the store."""

    def __init__(self, config: DumpConfig, teacher: TeacherInfo):
        self._config, self._teacher = config, teacher

    def process(self, element: str) -> Iterator[int]:
        spec = PilotSpec.model_validate_json(element)
        config = self._config
        teacher = load_teacher(config, self._teacher)
        tokens = reader.TokensReader(config.store)
        # Padded with rows whose segments are cleared, so that there is one shape to compile.
        rows = np.resize(np.asarray(spec.rows), config.batch_sequences)
        found = tokens.rows(rows)
        segments = found.segment_ids.copy()
        segments[len(spec.rows) :] = 0
        entries = teacher.expected_entries(
            found.tokens, segments, config.sampler.name, config.sampler.temperature, _PILOT_POINTS
        )
        count = PilotCount(
            run=_pilot_run(config, self._teacher, spec),
            entries=tuple(entries.tolist()),
            tokens=int(np.count_nonzero(segments)),
        )
        _pilot(config).put(spec.index, count)
        yield spec.index


def _pilot_run(config: DumpConfig, teacher: TeacherInfo, spec: PilotSpec) -> str:
    return f"{config.fingerprint()}-{teacher.fingerprint()}-{spec.fingerprint()}"


def _pilot(config: DumpConfig) -> Answers[PilotCount]:
    return Answers(config.store, f"pilot/{config.name}/", PilotCount)


# Shards


class WriteTargets(beam.DoFn):
    """A shard's name in; when the bundle is done, all its shards are committed."""

    def __init__(self, config: DumpConfig):
        self._config = config

    def start_bundle(self) -> None:
        self._shards = Overlap(_SHARDS_AT_ONCE)

    def process(self, element: str) -> None:
        spec = ShardSpec.model_validate_json(element)
        self._shards.add(partial(write_shard, self._config, spec))

    def finish_bundle(self) -> None:
        self._shards.join()


def write_shard(config: DumpConfig, spec: ShardSpec) -> LedgerRecord:
    """Compute and commit one shard; a shard that is already committed is returned untouched."""
    target_writer = writer.TargetsWriter(config.store, config.name)
    existing = target_writer.committed(spec)
    if existing is not None:
        return existing
    manifest = target_writer.manifest
    teacher = load_teacher(config, manifest.teacher)
    order = reader.read_table(config.store, config.name, manifest, "sampling_order")
    rows = np.arange(spec.first_row, spec.stop_row)
    tokens = reader.TokensReader(config.store).rows(rows)
    # Not the lock of the teachers: this shard is read while another is handed over.
    with _handing_lock:
        # A teacher's order is the set's; of several sets in one process, one at a time.
        teacher.arrange(order)
        finish = begin_rows(
            teacher,
            target_writer.vocabulary,
            tokens.tokens,
            tokens.segment_ids,
            rows,
            spec=manifest.sampler,
            seed=manifest.seed,
            batch_sequences=manifest.batch_sequences,
        )
    segment_ids = tokens.segment_ids.astype(np.uint16)
    return target_writer.write(spec, tokens.tokens, segment_ids, finish())


def load_teacher(config: DumpConfig, expected: TeacherInfo) -> Teacher:
    """This process's teacher, loaded once however many threads ask."""
    about = expected.backend, config.dtype, expected.vocab_size, config.model_devices
    key = (str(config.teacher), *about)
    with _teachers_lock:
        if key not in _teachers:
            if not _drivers.is_set():
                devices.claim(config.model_devices)
            teacher = backends.load(
                expected.backend,
                config.teacher,
                dtype=config.dtype,
                vocab_size=expected.vocab_size,
                devices=config.model_devices,
            )
            if teacher.info.weights_sha256 != expected.weights_sha256:
                raise ManifestMismatchError(
                    "A worker's teacher must be the manifest's, but its weights hash to "
                    f"{teacher.info.weights_sha256} and not {expected.weights_sha256}; "
                    f"give every worker the same files at {config.teacher}."
                )
            _teachers[key] = teacher
        return _teachers[key]
