"""Checks every byte of a store against its ledger, its manifests and the format's rules.

Finds any flipped, truncated, missing, misplaced or extra byte and says which object and which shard
it is in. Reads only; `logit_store.repair` mends. Memory is that of a few rows and of the list of
the store's keys, about 100 bytes each.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from logit_store import layout, manifests, reader, storage
from logit_store.ledger import Ledger, shard_spec
from logit_store.rows import check_targets, check_tokens, tokens_statistics
from schemas.errors import CorruptStoreError, RetortError, StoreNotFoundError
from schemas.manifest import (
    LedgerRecord,
    Manifest,
    ShardStatistics,
    TargetsManifest,
    TokensManifest,
)

Progress = Callable[[int, str], None]
Kind = Literal["manifest", "metadata", "table", "ledger", "data", "stray"]
_ROWS_AT_ONCE = 64


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


def verify(url: str, progress: Progress = lambda done, note: None) -> Report:
    """Check a whole store; `progress` gets the number of shards checked so far.

    Raises StoreNotFoundError if there is no store. Shards that are not committed are counted, and
    are no problem.
    """
    keys = set(storage.list_keys(storage.open_kvstore(url)))
    if not keys:
        raise StoreNotFoundError(
            f"A store must exist to be verified, but there is nothing at {url}; check the path."
        )
    check = _Check(url, keys, progress)
    for name in (None, *target_names(keys)):
        check.group(name)
    check.strays()
    return check.report


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

    def __init__(self, url: str, keys: set[str], progress: Progress):
        self.report = Report()
        self._url, self._progress = url, progress
        self._store = storage.open_kvstore(url)
        self._keys, self._known = keys, set[str]()

    def group(self, name: str | None) -> None:
        """Check the tokens or one set of targets."""
        group = layout.group_path(name)
        try:
            manifest = manifests.read_manifest(self._url, name)
        except RetortError as error:
            self._problem("manifest", group + layout.GROUP_KEY, str(error), name)
            # Without a manifest nothing else of the group can be judged.
            copy = layout.manifest_copy_key(name)
            others = (f"{group}", copy.removesuffix(".json"))
            self._known |= {key for key in self._keys if key.startswith(others)}
            return
        raw = layout.group_json(manifest)
        self._expect("manifest", group + layout.GROUP_KEY, raw, name)
        self._expect("manifest", layout.manifest_copy_key(name), raw, name)
        if name is not None:
            self._expect("manifest", layout.TARGETS + layout.GROUP_KEY, layout.group_json(None))
        for array in layout.arrays(manifest).values():
            key = f"{group}{array.name}/{layout.GROUP_KEY}"
            self._expect("metadata", key, layout.array_json(array), name)
        if isinstance(manifest, TokensManifest):
            self._corpus(manifest)
        else:
            assert name is not None
            self._tables(name, manifest)
        self._shards(name, manifest)

    def strays(self) -> None:
        """Whatever nothing accounts for. TensorStore itself hides the locks of its local driver."""
        for key in sorted(self._keys - self._known):
            if not key.endswith(storage.LOCK_SUFFIX):
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

    def _tables(self, name: str, manifest: TargetsManifest) -> None:
        """Each table must be the manifest's, and its copy the same bytes."""
        for table, spec in layout.table_arrays(manifest).items():
            key = layout.group_path(name) + spec.shard_key(0)
            copy = layout.table_copy_key(name, table)
            self._known |= {key, copy}
            try:
                reader.read_table(self._url, name, manifest, table)
            except CorruptStoreError as error:
                self._problem("table", key, str(error), name)
                continue
            raw = storage.read_bytes(self._store, key)
            assert raw is not None
            self._expect("table", copy, raw, name)
            self.report.files += 1
            self.report.bytes += len(raw)

    def _shards(self, name: str | None, manifest: Manifest) -> None:
        group = layout.group_path(name)
        ledger = Ledger(self._url, name, manifest)
        self._known |= set(ledger.keys())
        specs = layout.row_arrays(manifest).values()
        for index in range(manifest.num_shards):
            # Data without a record is what a killed writer leaves; it is not part of the store.
            self._known |= {group + spec.shard_key(index) for spec in specs}
        contents = Contents(self._url, name)
        seen = np.zeros(manifest.num_shards, bool)
        for index, key, raw in ledger.lines():
            seen[index] = True
            self.report.shards += 1
            self._progress(self.report.shards, group + str(index))
            try:
                record = ledger.parse(raw, index, key)
            except CorruptStoreError as error:
                self._problem("ledger", key, str(error), name, index)
                continue
            if record.spec != shard_spec(manifest, index):
                what = "the record was written under another manifest or for other rows"
                self._problem("ledger", key, what, name, index)
                continue
            if self._files(name, index, record, {group + spec.shard_key(index) for spec in specs}):
                fault = contents.fault(record)
                if fault is not None:
                    self._problem("data", key, fault, name, index)
        for index, key in ledger.superseded():
            fault = ledger.superseded_fault(index)
            if fault is not None:
                self._problem("ledger", key, fault, name, index)
        self._summary(name, ledger, np.flatnonzero(~seen))

    def _summary(self, name: str | None, ledger: Ledger, unseen: np.ndarray) -> None:
        """The summary, if the ledger has come so far, must be the sum of the records."""
        try:
            summary = ledger.summary()
        except CorruptStoreError as error:
            self._problem("ledger", ledger.summary_key, str(error), name)
            return
        if summary is None:
            self.report.missing_shards += len(unseen)
            if ledger.is_compacted():
                what = "the file is missing, though every shard is committed"
                self._problem("ledger", ledger.summary_key, what, name)
            return
        for index in unseen.tolist():
            what = "the record is missing, though the summary counts it"
            self._problem("ledger", ledger.segment_key_of(index), what, name, index)
        if not any(p.kind == "ledger" and p.targets == name for p in self.report.problems):
            if summary != ledger.sum_up():
                what = "it is not the sum of the records"
                self._problem("ledger", ledger.summary_key, what, name)
            else:
                self.report.files += 1

    def _files(self, name: str | None, index: int, record: LedgerRecord, keys: set[str]) -> bool:
        """Compare a shard's files with its record; True if all are as recorded."""
        group = layout.group_path(name)
        before = len(self.report.problems)
        recorded = {group + file.key for file in record.files}
        for key in sorted(keys ^ recorded):
            what = "the record's files are not the format's"
            self._problem("ledger", key, what, name, index)
        for file in record.files:
            key = group + file.key
            what_is_wrong = storage.fault(self._store, key, file.size_bytes, file.sha256)
            if what_is_wrong is not None:
                self._problem("data", key, what_is_wrong, name, index)
                continue
            self.report.files += 1
            self.report.bytes += file.size_bytes
        return len(self.report.problems) == before


class Contents:
    """The decoded rows of one group, held against the format's rules and their records."""

    def __init__(self, url: str, name: str | None):
        self._url, self._name = url, name
        self._tokens: reader.TokensReader | None = None
        self._targets: reader.TargetsReader | None = None

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
        # Opened here, so that a damaged manifest is a problem of each shard that depends on it.
        if self._tokens is None:
            self._tokens = reader.TokensReader(self._url)
        if self._targets is None and self._name is not None:
            self._targets = reader.TargetsReader(self._url, self._name)
        digest = hashlib.sha256()
        statistics = ShardStatistics(tokens=0)
        for rows in _pieces(first_row, stop_row):
            tokens = self._tokens.columns(rows)
            digest.update(np.ascontiguousarray(tokens["tokens"], "<i4").tobytes())
            first = int(rows[0])
            if self._targets is None:
                segments = tokens["segment_ids"]
                check_tokens(self._tokens.manifest, tokens["tokens"], segments, first)
                found = tokens_statistics(segments)
            else:
                found = check_targets(
                    self._targets.manifest,
                    self._targets.vocabulary,
                    tokens["segment_ids"],
                    self._targets.stored(rows),
                    first,
                )
            statistics = statistics.plus(found)
        return digest.hexdigest(), statistics


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
