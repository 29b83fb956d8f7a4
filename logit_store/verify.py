"""Checks every byte of a store against its ledger, its manifests and the format's rules.

Finds any flipped, truncated, missing, misplaced or extra byte and says which object and which shard
it is in. Reads only; `logit_store.repair` mends. Threads check several shards at once: hashing and
decoding let go of the interpreter. Memory is that of a few rows for each, and of the list of the
store's keys, about 100 bytes each.
"""

import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import tensorstore as ts

from logit_store import layout, manifests, reader, remote, storage
from logit_store.codec import Vocabulary
from logit_store.ledger import Ledger, shard_spec
from logit_store.rows import TargetRows, check_targets, check_tokens, tokens_statistics
from schemas.errors import CorruptStoreError, RetortError, StoreNotFoundError
from schemas.manifest import (
    Corpus,
    LedgerRecord,
    Manifest,
    ShardSpec,
    ShardStatistics,
    TargetsManifest,
    TokensManifest,
    identity,
)

Progress = Callable[[int, str], None]
Kind = Literal["manifest", "metadata", "table", "ledger", "data", "stray"]
_ROWS_AT_ONCE = 64
_REMOTE_WORKERS = 8


@dataclass(frozen=True)
class Problem:
    """One thing wrong: what kind of object, its key in the store, its shard if it has one."""

    kind: Kind
    file: str
    what: str
    targets: str | None = None
    """The set of targets that it belongs to; None for the tokens and for the whole store."""
    shard: int | None = None

    def __str__(self) -> str:
        place = self.file if self.shard is None else f"shard {self.shard}: {self.file}"
        return f"{place}: {self.what}"


@dataclass
class Report:
    """What a verification found; `ok` if nothing is wrong with what is committed."""

    files: int = 0
    bytes: int = 0
    shards: int = 0
    missing_shards: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    url: str, progress: Progress = lambda done, note: None, workers: int | None = None
) -> Report:
    """Check a whole store; `progress` gets the number of shards checked so far.

    `workers` threads share the shards: as many as there are processors by default, and eight for a
    bucket, where most of the time is waiting. What is found, and its order, are the same for any.
    Raises StoreNotFoundError if there is no store. Shards that are not committed are counted, and
    are no problem.
    """
    keys = set(storage.list_keys(storage.open_kvstore(url)))
    if not keys:
        raise StoreNotFoundError(
            f"A store must exist to be verified, but there is nothing at {url}; check the path."
        )
    if workers is None:
        workers = max(os.cpu_count() or 1, _REMOTE_WORKERS if "://" in url else 1)
    check = _Check(url, keys, progress, workers)
    names = target_names(keys)
    for name in (None, *names):
        check.group(name)
    if names:
        check.targets_group()
    check.strays()
    return check.report


def metadata_problems(url: str) -> list[Problem]:
    """What is wrong with manifests, metadata and tables alone: a few small objects are read.

    Damage of the ledger is not among it: to read its summary is to check it.
    """
    keys = set(storage.list_keys(storage.open_kvstore(url, layout.COPIES)))
    check = _Check(url, set(), lambda done, note: None, 1)
    for name in (None, *target_names({layout.COPIES + key for key in keys})):
        check.metadata(name)
    return check.report.problems


def target_names(keys: set[str]) -> list[str]:
    """The sets of targets that any of a store's keys speaks of, sorted."""
    found = set()
    for key in keys:
        match = re.fullmatch(rf"{layout.COPIES}{layout.TARGETS}([^/]+)\.json", key)
        match = match or re.match(rf"{layout.TARGETS}([^/]+)/", key)
        if match is not None:
            found.add(match[1])
    return sorted(found)


class _Check:
    """The state of one verification: what exists, what is accounted for, what is wrong."""

    def __init__(self, url: str, keys: set[str], progress: Progress, workers: int):
        self.report = Report()
        self._url, self._progress, self._workers = url, progress, workers
        self._store = storage.open_kvstore(url)
        self._keys, self._known = keys, set[str]()
        self._tokens: TokensManifest | None = None
        self._sound_tokens = np.zeros(0, bool)
        """Shards of tokens that are as recorded, so that targets can be held against them."""

    def group(self, name: str | None) -> None:
        """Check the tokens or one set of targets."""
        manifest = self.metadata(name)
        if manifest is not None:
            self._shards(name, manifest)

    def metadata(self, name: str | None) -> Manifest | None:
        """Check a group's manifest, metadata and tables; the manifest to go by, or None."""
        group = layout.group_path(name)
        keys = group + layout.GROUP_KEY, layout.manifest_copy_key(name)
        found, faults = sound_manifests(self._url, name)
        for key, what in faults.items():
            self._problem("manifest", key, what, name)
        if not found:
            # Without a manifest nothing else of the group can be judged.
            others = (f"{group}", keys[1].removesuffix(".json"))
            self._known |= {key for key in self._keys if key.startswith(others)}
            return None
        # By a copy all else can be judged as well.
        manifest = next(iter(found.values()))
        for key in found:
            self._expect("manifest", key, layout.group_json(manifest), name)
        for array in layout.arrays(manifest).values():
            key = f"{group}{array.name}/{layout.GROUP_KEY}"
            self._expect("metadata", key, layout.array_json(array), name)
        if isinstance(manifest, TokensManifest):
            self._tokens = manifest
            self._corpus(manifest)
        else:
            assert name is not None
            self._tables(name, manifest)
            if self._tokens and manifest.tokens_fingerprint != identity(self._tokens):
                what = f"it is over tokens {manifest.tokens_fingerprint}, which are not the store's"
                self._problem("manifest", group + layout.GROUP_KEY, what, name)
        return manifest

    def targets_group(self) -> None:
        """Check the group that holds the sets of targets, which says nothing itself."""
        self._expect("manifest", layout.TARGETS + layout.GROUP_KEY, layout.group_json(None))

    def strays(self) -> None:
        """Whatever nothing accounts for. TensorStore itself hides the locks of its local driver."""
        for key in sorted(self._keys - self._known):
            if not key.endswith(storage.LOCK_SUFFIX) and not key.startswith(layout.REPORTS):
                what = "no manifest or ledger record knows this file"
                self._problem("stray", key, what, shard=_shard_of(key))

    def _problem(
        self,
        kind: Kind,
        key: str,
        what: str,
        name: str | None = None,
        shard: int | None = None,
    ) -> None:
        self._known.add(key)
        self.report.problems.append(Problem(kind, key, what, name, shard))

    def _expect(self, kind: Kind, key: str, expected: bytes, name: str | None = None) -> None:
        """An object must be exactly these bytes."""
        self._known.add(key)
        what = storage.fault(self._store, key, len(expected), hashlib.sha256(expected).hexdigest())
        if what is not None:
            self._problem(kind, key, f"{what}, by what the manifest implies", name)
            return
        self.report.files += 1
        self.report.bytes += len(expected)

    def _corpus(self, manifest: TokensManifest) -> None:
        key = layout.corpus_key(manifest)
        raw = storage.read_bytes(self._store, key)
        self._known.add(key)
        if raw is None or hashlib.sha256(raw).hexdigest() != manifest.corpus.sha256:
            self._problem("metadata", key, "it is missing or not the manifest's list of sources")
            return
        self.report.files += 1
        self.report.bytes += len(raw)
        for file, sha256 in manifests.corpus_files(Corpus.parse(json.loads(raw), key)).items():
            self._known.add(file)
            found = storage.read_bytes(self._store, file)
            if found is None or hashlib.sha256(found).hexdigest() != sha256:
                what = "it is missing or another than the list of sources says"
                self._problem("metadata", file, what)
                continue
            self.report.files += 1
            self.report.bytes += len(found)

    def _tables(self, name: str, manifest: TargetsManifest) -> None:
        """Each table must be the manifest's, and its copy the same bytes."""
        values: dict[str, np.ndarray] = {}
        for table in layout.table_arrays(manifest):
            keys = table_keys(name, manifest, table)
            found = [storage.read_bytes(self._store, key) for key in keys]
            read = [read_table(manifest, table, raw) for raw in found]
            sound = [raw for raw, got in zip(found, read, strict=True) if got is not None]
            values.update((table, got) for got in read if got is not None)
            for key, raw in zip(keys, found, strict=True):
                self._known.add(key)
                if raw is None:
                    self._problem("table", key, "the file is missing", name)
                elif raw not in sound:
                    self._problem("table", key, "its values are not the manifest's", name)
                elif raw != sound[0]:
                    self._problem("table", key, f"its bytes are not those of {keys[0]}", name)
                else:
                    self.report.files += 1
                    self.report.bytes += len(raw)
        if "vocabulary_order" in values and "bucket_bits" in values:
            found_tables = Vocabulary(values["vocabulary_order"], values["bucket_bits"])
            what = found_tables.fault(manifest.teacher.vocab_size)
            if what is not None:
                key = layout.group_path(name) + layout.GROUP_KEY
                self._problem("manifest", key, f"of its tables, {what}", name)

    def _shards(self, name: str | None, manifest: Manifest) -> None:
        group = layout.group_path(name)
        ledger = Ledger(self._url, name, manifest)
        self._known |= set(ledger.keys())
        specs = layout.row_arrays(manifest).values()
        for index in range(manifest.num_shards):
            # Data without a record is what a killed writer leaves; it is not part of the store.
            self._known |= {group + spec.shard_key(index) for spec in specs}
        contents = Contents(self._url, name, manifest, self._tokens or manifest)
        can_judge = not contents.is_blind
        seen = np.zeros(manifest.num_shards, bool)
        sound = np.zeros(manifest.num_shards, bool)

        def check(index: int, key: str, raw: bytes) -> tuple[int, Report, bool]:
            report = Report(shards=1)
            is_sound = self._shard(report, ledger, contents if can_judge else None, index, key, raw)
            return index, report, is_sound

        def take(found: tuple[int, Report, bool]) -> None:
            index, report, is_sound = found
            seen[index], sound[index] = True, is_sound
            self._add(report)
            self._progress(self.report.shards, group + str(index))

        with ThreadPoolExecutor(self._workers) as pool:
            # In order, and so few at a time that only their records are in memory.
            asked: deque[Future[tuple[int, Report, bool]]] = deque()
            for index, key, raw in ledger.lines():
                asked.append(pool.submit(check, index, key, raw))
                if len(asked) > 2 * self._workers:
                    take(asked.popleft().result())
            for future in asked:
                take(future.result())
        if name is None:
            self._sound_tokens = sound
        for index, key in ledger.superseded():
            fault = ledger.superseded_fault(index)
            if fault is not None:
                self._problem("ledger", key, fault, name, index)
        self._summary(name, manifest, ledger, np.flatnonzero(~seen))

    def _shard(
        self,
        report: Report,
        ledger: Ledger,
        contents: "Contents | None",
        index: int,
        key: str,
        raw: bytes,
    ) -> bool:
        """Check one shard into a report of its own; True if it is as recorded.

        Without `contents` its rows cannot be judged.
        """
        name, manifest = ledger.name, ledger.manifest
        group = layout.group_path(name)
        try:
            record = ledger.parse(raw, index, key)
        except CorruptStoreError as error:
            report.problems.append(Problem("ledger", key, str(error), name, index))
            self._unrecorded(report, name, manifest, index)
            return False
        if record.spec != shard_spec(manifest, index):
            what = "the record was written under another manifest or for other rows"
            report.problems.append(Problem("ledger", key, what, name, index))
            return False
        keys = {group + spec.shard_key(index) for spec in layout.row_arrays(manifest).values()}
        if not self._files(report, name, index, record, keys):
            return False
        if contents is None or not self._has_sound_tokens(name, record.spec):
            return True
        fault = contents.fault(record)
        if fault is not None:
            report.problems.append(Problem("data", key, fault, name, index))
        return fault is None

    def _add(self, part: Report) -> None:
        """Take up what was found of one shard."""
        self.report.files += part.files
        self.report.bytes += part.bytes
        self.report.shards += part.shards
        self._known |= {problem.file for problem in part.problems}
        self.report.problems += part.problems

    def _has_sound_tokens(self, name: str | None, spec: ShardSpec) -> bool:
        """Whether the tokens of a shard's rows are sound, so that what is wrong is its own."""
        if name is None:
            return True
        if self._tokens is None:
            return False
        step = self._tokens.shard_sequences
        first, stop = spec.first_row // step, -(-spec.stop_row // step)
        return stop <= len(self._sound_tokens) and bool(self._sound_tokens[first:stop].all())

    def _summary(
        self, name: str | None, manifest: Manifest, ledger: Ledger, unseen: np.ndarray
    ) -> None:
        """The summary, if the ledger has come so far, must be the sum of the records."""
        summary = None
        try:
            summary = ledger.summary()
            there = summary is not None
        except CorruptStoreError as error:
            self._problem("ledger", ledger.summary_key, str(error), name)
            # Also what can no longer be read was only written when every shard was committed.
            there = True
        if not there:
            self.report.missing_shards += len(unseen)
            if ledger.is_compacted():
                what = "the file is missing, though every shard is committed"
                self._problem("ledger", ledger.summary_key, what, name)
            return
        for index in unseen.tolist():
            what = "the record is missing, though the summary counts it"
            self._problem("ledger", ledger.segment_key_of(index), what, name, index)
            part = Report()
            self._unrecorded(part, name, manifest, index)
            self._add(part)
        if not any(p.kind == "ledger" and p.targets == name for p in self.report.problems):
            if summary != ledger.sum_up():
                what = "it is not the sum of the records"
                self._problem("ledger", ledger.summary_key, what, name)
            else:
                self.report.files += 1

    def _files(
        self,
        report: Report,
        name: str | None,
        index: int,
        record: LedgerRecord,
        keys: set[str],
    ) -> bool:
        """Compare a shard's files with its record; True if all are as recorded."""
        group = layout.group_path(name)
        recorded = {group + file.key for file in record.files}
        for key in sorted(keys ^ recorded):
            what = "the record's files are not the format's"
            report.problems.append(Problem("ledger", key, what, name, index))
        for file in record.files:
            key = group + file.key
            what_is_wrong = storage.fault(self._store, key, file.size_bytes, file.sha256)
            if what_is_wrong is not None:
                report.problems.append(Problem("data", key, what_is_wrong, name, index))
                continue
            report.files += 1
            report.bytes += file.size_bytes
        return not report.problems

    def _unrecorded(self, report: Report, name: str | None, manifest: Manifest, index: int) -> None:
        """Hold a shard whose record is damaged against the checksums of its own chunks."""
        spec = shard_spec(manifest, index)
        for array in layout.row_arrays(manifest).values():
            try:
                stored = _open_array(self._url, layout.group_path(name), array)
                stored[spec.first_row : spec.stop_row].read().result()
            except (ValueError, OSError) as error:
                remote.raise_if_unanswered(self._url, error)
                key = layout.group_path(name) + array.shard_key(index)
                what = "it is missing, or its bytes do not match their checksums"
                report.problems.append(Problem("data", key, what, name, index))


def sound_manifests(url: str, name: str | None) -> tuple[dict[str, Manifest], dict[str, str]]:
    """By key, a group's manifest and its copy, as far as they are whole, and what is wrong if not.

    The one to go by comes first: of two that are whole and differ, that under which the ledger's
    records were written.
    """
    store = storage.open_kvstore(url)
    found: dict[str, Manifest] = {}
    faults = {}
    for key in (layout.group_path(name) + layout.GROUP_KEY, layout.manifest_copy_key(name)):
        raw = storage.read_bytes(store, key)
        if raw is None:
            faults[key] = "the file is missing"
            continue
        try:
            found[key] = manifests.parse_manifest(raw, url, name, key)
        except RetortError as error:
            faults[key] = str(error)
    if len({identity(manifest) for manifest in found.values()}) == 2:
        order = sorted(found, key=lambda key: not is_vouched_for(url, name, found[key]))
        found = {key: found[key] for key in order}
    return found, faults


def is_vouched_for(url: str, name: str | None, manifest: Manifest) -> bool:
    """Whether the first whole record of the group's ledger was written under this manifest."""
    ledger = Ledger(url, name, manifest)
    for index, key, raw in ledger.lines():
        try:
            record = ledger.parse(raw, index, key)
        except CorruptStoreError:
            continue
        return record.spec == shard_spec(manifest, index)
    return False


def _open_array(url: str, group: str, spec: layout.ArraySpec) -> Any:
    """An array for reading as the manifest implies it, whatever its own metadata says."""
    array = {
        "driver": "zarr3",
        "kvstore": storage.kvstore_spec(url, f"{group}{spec.name}/"),
        "metadata": spec.metadata(),
        "assume_metadata": True,
        "fill_missing_data_reads": False,
    }
    return ts.open(array, context=remote.CONTEXT).result()


class _StoredRows(reader._Rows):
    """All rows by a manifest, whatever a ledger and metadata say that may be damaged themselves."""

    def __init__(self, url: str, name: str | None, manifest: Manifest):
        self.url, self._name, self._manifest = url, name, manifest
        self.committed = np.ones(manifest.num_shards, bool)
        group = layout.group_path(name)
        specs = layout.row_arrays(manifest)
        self._arrays = {array: _open_array(url, group, spec) for array, spec in specs.items()}


class Contents:
    """The decoded rows of one group, held against the format's rules and their records."""

    def __init__(self, url: str, name: str | None, manifest: Manifest, tokens: Manifest):
        self._url, self._name, self._manifest = url, name, manifest
        self._tokens = _StoredRows(url, None, tokens)
        self._targets = None if name is None else _StoredRows(url, name, manifest)

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        """The tables, each from where it is whole, or None if one is lost."""
        assert self._name is not None
        assert isinstance(self._manifest, TargetsManifest)
        store = storage.open_kvstore(self._url)
        found = {}
        for table in ("vocabulary_order", "bucket_bits"):
            for key in table_keys(self._name, self._manifest, table):
                values = read_table(self._manifest, table, storage.read_bytes(store, key))
                if values is not None:
                    found[table] = values
        if len(found) < 2:
            return None
        return Vocabulary(found["vocabulary_order"], found["bucket_bits"])

    @property
    def is_blind(self) -> bool:
        """Whether nothing can be decoded, because a table is lost or fits no other."""
        if not isinstance(self._manifest, TargetsManifest):
            return False
        vocabulary = self._vocabulary
        return vocabulary is None or vocabulary.fault(self._manifest.teacher.vocab_size) is not None

    def fault(self, record: LedgerRecord) -> str | None:
        """What is wrong with a shard whose files are as recorded, or None."""
        try:
            digest, statistics = self.describe(record.spec.first_row, record.spec.stop_row)
        except (RetortError, ValueError) as error:
            return str(error)
        if digest != record.tokens_sha256:
            return "the tokens are not those that the shard was computed from"
        return _difference(record.statistics, statistics)

    def describe(self, first_row: int, stop_row: int) -> tuple[str, ShardStatistics]:
        """SHA-256 of the rows' tokens, and the sums over rows that obey the format's rules.

        Raises ValueError or a RetortError for what is wrong with them.
        """
        digest = hashlib.sha256()
        statistics = ShardStatistics(tokens=0)
        for rows in _pieces(first_row, stop_row):
            tokens = self._tokens.request(rows)(rows)
            digest.update(np.ascontiguousarray(tokens.columns["tokens"], "<i4").tobytes())
            statistics = statistics.plus(self._sums(tokens, rows))
        return digest.hexdigest(), statistics

    def _sums(self, tokens: reader.Sealed, rows: np.ndarray) -> ShardStatistics:
        first, segments = int(rows[0]), tokens.columns["segment_ids"]
        if isinstance(self._manifest, TokensManifest):
            check_tokens(self._manifest, tokens.columns["tokens"], segments, first)
            return tokens_statistics(segments)
        assert self._targets is not None
        assert self._vocabulary is not None
        targets = TargetRows(**self._targets.request(rows)(tokens.seals).columns)
        return check_targets(self._manifest, self._vocabulary, segments, targets, first)


def table_keys(name: str, manifest: TargetsManifest, table: str) -> tuple[str, str]:
    """Keys of a table's only chunk and of its copy, relative to the store."""
    spec = layout.table_arrays(manifest)[table]
    return layout.group_path(name) + spec.shard_key(0), layout.table_copy_key(name, table)


def read_table(manifest: TargetsManifest, table: str, raw: bytes | None) -> np.ndarray | None:
    """The values in the only chunk of the manifest's table, or None if they are any others."""
    if raw is None:
        return None
    spec = layout.table_arrays(manifest)[table]
    context = ts.Context()
    ts.KvStore.open({"driver": "memory"}, context=context).result().write("c/0", raw).result()
    array = {
        "driver": "zarr3",
        "kvstore": {"driver": "memory"},
        "metadata": spec.metadata(),
        "assume_metadata": True,
    }
    try:
        values = ts.open(array, context=context).result().read().result()
    except ValueError:
        return None
    is_right = layout.table_digest(values) == layout.table_digests(manifest)[table]
    return values if is_right else None


def _pieces(first_row: int, stop_row: int) -> Iterator[np.ndarray]:
    for start in range(first_row, stop_row, _ROWS_AT_ONCE):
        yield np.arange(start, min(start + _ROWS_AT_ONCE, stop_row))


def _difference(recorded: ShardStatistics, counted: ShardStatistics) -> str | None:
    for name, value in recorded.model_dump().items():
        found = getattr(counted, name)
        # Sums of floats may differ in the last bits between machines; counts may not.
        tolerance = 1e-6 if isinstance(value, float) else 0.0
        if not math.isclose(value, found, rel_tol=tolerance, abs_tol=tolerance):
            return f"the record's {name} is {value} but the rows give {found}"
    return None


def _shard_of(key: str) -> int | None:
    found = re.search(r"/c/(\d+)", key)
    return int(found[1]) if found else None
