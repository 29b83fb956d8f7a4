"""Checks every byte of a store against its ledger, its manifests and the format's rules.

Finds any flipped, truncated, missing or extra byte and says which file and which shard it is in. It
reads only: what is damaged is mended by deleting the shard's ledger record and running the job
again.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from logit_store import layout, ledger, reader
from logit_store.decode import (
    check_targets,
    check_tokens,
    targets_statistics,
    tokens_statistics,
)
from logit_store.writer import tokens_digest
from schemas.errors import CorruptStoreError, RetortError, StoreNotFoundError
from schemas.manifest import (
    LedgerRecord,
    ShardFile,
    ShardSpec,
    ShardStatistics,
    identity,
)

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the file (relative to the store), its shard if it has one, and what."""

    file: str
    shard: int | None
    what: str

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
    report = Report()
    known = {layout.GROUP_KEY}
    keys = layout.list_keys(layout.open_kvstore(url))
    if not keys:
        raise StoreNotFoundError(
            f"A store must exist to be verified, but there is nothing at {url}; check the path."
        )
    names: list[str | None] = [None, *layout.list_targets(url)]
    targets_group = layout.TARGETS + layout.GROUP_KEY
    if targets_group in keys or len(names) > 1:
        known.add(targets_group)
        _expect(url, report, targets_group, layout.group_json(None))
    for name in names:
        known |= _verify_group(url, name, set(keys), report, progress)
    for key in keys:
        if key not in known and not key.endswith(layout.LOCK_SUFFIX):
            report.problems.append(
                Problem(key, _shard_of(key), "no manifest or ledger record knows this file")
            )
    return report


def _verify_group(
    url: str, name: str | None, keys: set[str], report: Report, progress: Progress
) -> set[str]:
    """Check one group; returns the keys that belong to it."""
    group = layout.group_path(name)
    known = {group + layout.GROUP_KEY}
    try:
        manifest = layout.read_manifest(url, name)
    except RetortError as error:
        report.problems.append(Problem(group + layout.GROUP_KEY, None, str(error)))
        # Without a manifest nothing else of the group can be judged.
        return known | {key for key in keys if key.startswith(group)}
    _expect(url, report, group + layout.GROUP_KEY, layout.group_json(manifest))
    arrays = layout.arrays(manifest)
    for array in arrays.values():
        key = f"{group}{array.name}/{layout.GROUP_KEY}"
        known.add(key)
        _expect(url, report, key, layout.array_json(array))
    contents = _Contents(url, name)
    fingerprint = identity(manifest)
    is_manifest_wrong = False
    committed = ledger.committed_indices(url, name)
    planned = {spec.index: spec for spec in ledger.plan_shards(manifest)}
    report.missing_shards += len(planned.keys() - committed)
    for index, spec in planned.items():
        shard_keys = {group + array.shard_key(index) for array in arrays.values()}
        record_key = group + layout.ledger_key(index)
        known |= shard_keys | {record_key}
        if index not in committed:
            # Data without a record is what a killed writer leaves; it is not part of the store.
            continue
        report.shards += 1
        try:
            record = ledger.read_record(url, name, index)
        except CorruptStoreError as error:
            report.problems.append(Problem(record_key, index, str(error)))
            continue
        if record is None:
            continue
        if record.spec.manifest_fingerprint != fingerprint:
            # The records vouch for themselves, so it is the manifest that changed.
            is_manifest_wrong = True
        elif record.spec != spec:
            report.problems.append(Problem(record_key, index, "the record is of other rows"))
        is_whole = _check_files(url, group, index, record.files, shard_keys, report)
        if is_whole:
            what = contents.fault(record, spec)
            if what is not None:
                report.problems.append(Problem(record_key, index, what))
        progress(report.shards, group + str(index))
    if is_manifest_wrong:
        what = "the manifest is not the one that the ledger's records were written under"
        report.problems.append(Problem(group + layout.GROUP_KEY, None, what))
    return known


def _check_files(
    url: str,
    group: str,
    index: int,
    files: tuple[ShardFile, ...],
    shard_keys: set[str],
    report: Report,
) -> bool:
    """Compare a shard's files with its record; True if all are as recorded."""
    before = len(report.problems)
    store = layout.open_kvstore(url, group)
    recorded = {group + file.key for file in files}
    for key in sorted(shard_keys ^ recorded):
        report.problems.append(Problem(key, index, "the record's files are not the format's"))
    for file in files:
        raw = layout.read_bytes(store, file.key)
        key = group + file.key
        if raw is None:
            report.problems.append(Problem(key, index, "the file is missing"))
            continue
        report.files += 1
        report.bytes += len(raw)
        if len(raw) != file.size_bytes:
            report.problems.append(
                Problem(key, index, f"it has {len(raw)} bytes and not {file.size_bytes}")
            )
        elif hashlib.sha256(raw).hexdigest() != file.sha256:
            report.problems.append(Problem(key, index, "its bytes differ from their SHA-256"))
    return len(report.problems) == before


class _Contents:
    """The decoded rows of one group, held against the format's rules and their records."""

    def __init__(self, url: str, name: str | None):
        self._url, self._name = url, name
        self._tokens: reader.TokensReader | None = None
        self._targets: reader.TargetsReader | None = None

    def fault(self, record: LedgerRecord, spec: ShardSpec) -> str | None:
        """What is wrong with a shard whose files are as recorded, or None."""
        try:
            return self._fault(record, np.arange(spec.first_row, spec.stop_row))
        except (RetortError, ValueError) as error:
            return str(error)

    def _fault(self, record: LedgerRecord, rows: np.ndarray) -> str | None:
        # Opened here, so that a damaged manifest is a problem of each shard that depends on it.
        if self._tokens is None:
            self._tokens = reader.TokensReader(self._url)
        tokens = self._tokens.columns(rows)
        segments, first = tokens["segment_ids"], int(rows[0])
        if tokens_digest(tokens["tokens"]) != record.tokens_sha256:
            return "the tokens are not those that the shard was computed from"
        if self._name is None:
            check_tokens(self._tokens.manifest, tokens["tokens"], segments, first)
            return _difference(record.statistics, tokens_statistics(segments))
        if self._targets is None:
            self._targets = reader.TargetsReader(self._url, self._name)
        manifest = self._targets.manifest
        targets = self._targets.stored(rows)
        check_targets(manifest, segments, targets, first)
        return _difference(record.statistics, targets_statistics(manifest, segments, targets))


def _difference(recorded: ShardStatistics, counted: ShardStatistics) -> str | None:
    for name, value in recorded.model_dump().items():
        found = getattr(counted, name)
        # Sums of floats may differ in the last bits between machines; counts may not.
        tolerance = 1e-6 if isinstance(value, float) else 0.0
        if not math.isclose(value, found, rel_tol=tolerance, abs_tol=tolerance):
            return f"the record's {name} is {value} but the rows give {found}"
    return None


def _expect(url: str, report: Report, key: str, expected: bytes) -> None:
    """A metadata file must be exactly the bytes that the manifest implies."""
    raw = layout.read_bytes(layout.open_kvstore(url), key)
    if raw is None:
        report.problems.append(Problem(key, None, "the file is missing"))
        return
    report.files += 1
    report.bytes += len(raw)
    if raw != expected:
        report.problems.append(Problem(key, None, "its bytes are not those the manifest implies"))


def _shard_of(key: str) -> int | None:
    found = re.search(r"/c/(\d+)/", key)
    return int(found[1]) if found else None
