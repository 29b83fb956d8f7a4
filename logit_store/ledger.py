"""The ledger: which shards of a group are whole, and what they hold.

Three kinds of object, each written once. A *record* proves one shard; its writer commits it after
the shard's data, so that a reader never meets half a shard and a writer that was killed leaves
nothing that is taken for data. A *segment* holds the records of SEGMENT_SHARDS consecutive shards,
and replaces them; the *summary* says that every shard is there, with their sums. Both are written
by the driver alone: they keep opening a store as cheap at a million shards as at ten.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
from pydantic import ValidationError

from logit_store import layout, remote, storage
from schemas.errors import CorruptStoreError, StorageError
from schemas.manifest import (
    SEGMENT_SHARDS,
    LedgerRecord,
    LedgerSummary,
    Manifest,
    ShardSpec,
    ShardStatistics,
    identity,
)

_SUMMARY_KEY = "summary.json"
# Records that are read or deleted at once.
_AT_ONCE = 256


def plan_shards(manifest: Manifest) -> list[ShardSpec]:
    """A spec for every shard, in order."""
    return [shard_spec(manifest, index) for index in range(manifest.num_shards)]


def shard_spec(manifest: Manifest, index: int) -> ShardSpec:
    """The rows of shard `index`."""
    rows, step = manifest.num_sequences, manifest.shard_sequences
    return ShardSpec(
        manifest_fingerprint=identity(manifest),
        index=index,
        first_row=index * step,
        stop_row=min((index + 1) * step, rows),
    )


def record_key(index: int) -> str:
    """Key of a shard's record, relative to the ledger's folder."""
    return f"{index:08d}.json"


def segment_key(number: int) -> str:
    """Key of a segment, relative to the ledger's folder."""
    return f"segment-{number:06d}.jsonl"


def record_bytes(record: LedgerRecord) -> bytes:
    """The exact bytes of a stored record, and of its line in a segment."""
    return (record.canonical_json() + "\n").encode()


class Ledger:
    """The ledger of a store's tokens (name None) or of one set of targets."""

    def __init__(self, url: str, name: str | None, manifest: Manifest):
        self._url, self._path = url, layout.group_path(name) + layout.LEDGER
        self.name = name
        self.manifest = self._manifest = manifest
        self._store = storage.open_kvstore(url, self._path)

    @property
    def _num_segments(self) -> int:
        return -(-self._manifest.num_shards // SEGMENT_SHARDS)

    def _span(self, number: int) -> range:
        first = number * SEGMENT_SHARDS
        return range(first, min(first + SEGMENT_SHARDS, self._manifest.num_shards))

    # Reading

    def summary(self) -> LedgerSummary | None:
        """The summary of a finished group, or None. Raises CorruptStoreError."""
        raw = storage.read_bytes(self._store, _SUMMARY_KEY)
        if raw is None:
            return None
        try:
            found = LedgerSummary.model_validate_json(raw)
            intact = found.is_intact() and summary_bytes(found) == raw
        except (ValidationError, UnicodeDecodeError):
            intact = False
        if not intact or found.manifest_fingerprint != identity(self._manifest):
            raise CorruptStoreError(
                f"A ledger's summary must match its checksum and its manifest, but "
                f"{self._path}{_SUMMARY_KEY} of {self._url} does not; run `retort repair "
                f"{self._url}`."
            )
        return found

    def committed(self) -> np.ndarray:
        """bool [num_shards], True for a shard that is whole; one listing at most, no records."""
        if self.summary() is not None:
            return np.ones(self._manifest.num_shards, bool)
        mask = np.zeros(self._manifest.num_shards, bool)
        records, segments = self._list()
        mask[sorted(records)] = True
        for number in segments:
            mask[self._span(number)] = True
        return mask

    def pending(self) -> list[ShardSpec]:
        """The shards that are not whole yet."""
        missing = np.flatnonzero(~self.committed())
        return [shard_spec(self._manifest, int(index)) for index in missing]

    def record(self, index: int) -> LedgerRecord | None:
        """A shard's record, or None. Raises CorruptStoreError if it fails its own checksum."""
        raw = storage.read_bytes(self._store, record_key(index))
        if raw is not None:
            return self.parse(raw, index, record_key(index))
        number = index // SEGMENT_SHARDS
        lines = self._segment_lines(number)
        if lines is None:
            return None
        return self.parse(lines[index - self._span(number)[0]], index, segment_key(number))

    def records(self) -> Iterator[LedgerRecord]:
        """Every committed shard's record, in order, a segment's worth in memory at a time."""
        for index, key, raw in self.lines():
            yield self.parse(raw, index, key)

    def lines(self) -> Iterator[tuple[int, str, bytes]]:
        """(index, key, bytes) of every committed shard's record, in order and not yet parsed.

        Keys are relative to the store. Of a segment that is torn, each shard has empty bytes.
        """
        loose, segments = self._list()
        for number in range(self._num_segments):
            span = self._span(number)
            there = [index for index in span if index in loose]
            found = [] if number in segments else list(self._read_records(there))
            # Also if a compaction came between the listing and the reads.
            if number in segments or len(found) < len(there):
                try:
                    lines = self._segment_lines(number)
                except CorruptStoreError:
                    lines = [b""] * len(span)
                if lines is not None:
                    for index, line in zip(span, lines, strict=True):
                        yield index, self._path + segment_key(number), line
                    continue
            for index, raw in found:
                yield index, self._path + record_key(index), raw

    def lines_of(self, number: int) -> Iterator[tuple[int, str, bytes]]:
        """As `lines`, of the shards of one segment alone, and without a listing."""
        span = self._span(number)
        try:
            lines = self._segment_lines(number)
            if lines is None:
                found = list(self._read_records(list(span)))
                # Records that are missing may have gone into a segment since it was looked for.
                if len(found) < len(span):
                    lines = self._segment_lines(number)
        except CorruptStoreError:
            lines = [b""] * len(span)
        if lines is not None:
            for index, line in zip(span, lines, strict=True):
                yield index, self._path + segment_key(number), line
            return
        for index, raw in found:
            yield index, self._path + record_key(index), raw

    def superseded(self) -> list[tuple[int, str]]:
        """Shards and keys of records that lie beside the segment that replaces them."""
        loose, segments = self._list()
        return [
            (index, self._path + record_key(index))
            for index in sorted(loose)
            if index // SEGMENT_SHARDS in segments
        ]

    def superseded_fault(self, index: int) -> str | None:
        """How a shard's own record differs from that in its segment, or None."""
        try:
            self._check_superseded(index // SEGMENT_SHARDS, [index])
        except CorruptStoreError as error:
            return str(error)
        return None

    def is_compacted(self) -> bool:
        """Whether every segment is there, so that only the summary can be missing."""
        return len(self._list()[1]) == self._num_segments

    @property
    def summary_key(self) -> str:
        """Relative to the store."""
        return self._path + _SUMMARY_KEY

    def segment_key_of(self, index: int) -> str:
        """Key of the segment that holds, or will hold, a shard's record; relative to the store."""
        return self._path + segment_key(index // SEGMENT_SHARDS)

    def keys(self) -> list[str]:
        """Every key that a ledger of this manifest may have, relative to the store."""
        records = [record_key(index) for index in range(self._manifest.num_shards)]
        segments = [segment_key(number) for number in range(self._num_segments)]
        return [self._path + key for key in (*records, *segments, _SUMMARY_KEY)]

    def sum_up(self) -> LedgerSummary:
        """What the summary of these records is. Raises CorruptStoreError for a damaged record."""
        statistics = ShardStatistics(tokens=0)
        array_bytes: dict[str, int] = {}
        record_total = 0
        for record in self.records():
            statistics = statistics.plus(record.statistics)
            record_total += len(record_bytes(record))
            for file in record.files:
                array = file.key.split("/")[0]
                array_bytes[array] = array_bytes.get(array, 0) + file.size_bytes
        segments = [
            storage.read_bytes(self._store, segment_key(n)) for n in range(self._num_segments)
        ]
        return LedgerSummary(
            manifest_fingerprint=identity(self._manifest),
            num_shards=self._manifest.num_shards,
            segments_sha256=tuple(hashlib.sha256(raw or b"").hexdigest() for raw in segments),
            statistics=statistics,
            array_bytes=array_bytes,
            record_bytes=record_total,
        ).sealed()

    # Writing

    def commit(self, record: LedgerRecord) -> LedgerRecord:
        """Write a record; the caller has written and read back all its data before.

        If another writer was first, its record stands and is returned. Raises CorruptStoreError if
        it vouches for other bytes: then the two have overwritten each other's data.
        """
        sealed = record.sealed()
        index = sealed.spec.index
        first = self.record(index)
        if first is None:
            self._write_if_absent(record_key(index), record_bytes(sealed))
            # The first writer's may have come and gone into a segment since it was looked for.
            self._check_superseded(index // SEGMENT_SHARDS, [index])
            first = self.record(index)
        if first is None:
            raise StorageError(
                f"A record that was written must be there, but that of shard {index} of "
                f"{self._url} is not; check the bucket and run again."
            )
        if _data(first) != _data(sealed):
            raise CorruptStoreError(
                f"Writers of one shard must produce equal bytes, but two of shard {index} of "
                f"{self._url} did not; use one kind of hardware, and run `retort repair "
                f"{self._url}`."
            )
        return first

    def compact(self) -> int:
        """Put full runs of records into segments; once all are, write the summary.

        For the driver alone. Returns the number of shards committed. Interrupted at any point it
        leaves a ledger that says the same, and the next call goes on.
        """
        loose, segments = self._list()
        for number in range(self._num_segments):
            span = self._span(number)
            there = [index for index in span if index in loose]
            if number not in segments and len(there) == len(span):
                found = [self.parse(raw, i, record_key(i)) for i, raw in self._read_records(there)]
                lines = b"".join(record_bytes(record) for record in found)
                storage.write_new(self._store, segment_key(number), lines)
                segments.add(number)
            if number in segments and there:
                # Only after the segment is there: at every moment each record exists somewhere.
                self._check_superseded(number, there)
                self._delete([record_key(index) for index in there])
        if len(segments) == self._num_segments and self.summary() is None:
            storage.write_new(self._store, _SUMMARY_KEY, summary_bytes(self.sum_up()))
        return sum(len(self._span(number)) for number in segments) + sum(
            index // SEGMENT_SHARDS not in segments for index in loose
        )

    def withdraw(self, indices: Iterable[int], instead: Iterable[LedgerRecord] = ()) -> None:
        """Take back the records of some shards, which then count as not written. Driver only.

        `instead` replaces the records of other shards. The summary goes first and a segment last,
        so that what is interrupted withdraws nothing but what was asked for. A segment that is torn
        is only deleted: withdraw or replace all of its shards.
        """
        withdrawn = set(indices)
        replaced = {record.spec.index: record_bytes(record.sealed()) for record in instead}
        wanted = withdrawn | set(replaced)
        self._delete([_SUMMARY_KEY])
        for index, raw in replaced.items():
            storage.write_bytes(self._store, record_key(index), raw)
        for number in sorted({index // SEGMENT_SHARDS for index in wanted}):
            try:
                lines = self._segment_lines(number) or []
            except CorruptStoreError:
                lines = []
            for index, line in zip(self._span(number), lines, strict=False):
                if index not in wanted:
                    storage.write_new(self._store, record_key(index), line)
            self._delete([segment_key(number)])
        self._delete([record_key(index) for index in sorted(withdrawn)])

    # Parts

    def _list(self) -> tuple[set[int], set[int]]:
        """Indices of the shards with a record of their own, and numbers of the segments."""
        records, segments = set(), set()
        for key in storage.list_keys(self._store):
            found = re.fullmatch(r"(segment-)?([0-9]{6,})\.jsonl?", key)
            number = -1 if found is None else int(found[2])
            # Only under its own key is an object found again: 000000001.json is a stranger.
            if key == record_key(number):
                records.add(number)
            elif key == segment_key(number):
                segments.add(number)
        shards = self._manifest.num_shards
        return (
            {index for index in records if index < shards},
            {number for number in segments if number < self._num_segments},
        )

    def _segment_lines(self, number: int) -> list[bytes] | None:
        raw = storage.read_bytes(self._store, segment_key(number))
        if raw is None:
            return None
        lines = raw.splitlines(keepends=True)
        if len(lines) != len(self._span(number)):
            raise CorruptStoreError(
                f"A ledger segment must hold a line for each of its {len(self._span(number))} "
                f"shards, but {self._path}{segment_key(number)} of {self._url} holds {len(lines)}; "
                f"run `retort repair {self._url}`."
            )
        return lines

    def _read_records(self, indices: list[int]) -> Iterator[tuple[int, bytes]]:
        for start in range(0, len(indices), _AT_ONCE):
            some = indices[start : start + _AT_ONCE]
            with remote.explained(self._store):
                reads = [self._store.read(record_key(index)) for index in some]
                results = [read.result() for read in reads]
            for index, result in zip(some, results, strict=True):
                if result.state == "value":
                    yield index, result.value

    def parse(self, raw: bytes, index: int, key: str) -> LedgerRecord:
        """The record in these bytes. Raises CorruptStoreError unless whole and in its place."""
        try:
            record = LedgerRecord.model_validate_json(raw)
            # Byte for byte, so that not even white space can change unseen.
            intact = record.is_intact() and record_bytes(record) == raw
        except (ValidationError, UnicodeDecodeError):
            intact = False
        if not intact:
            raise CorruptStoreError(
                f"A ledger record must match its own checksum, but that of shard {index} in "
                f"{self._path}{key} of {self._url} does not; run `retort repair {self._url}`."
            )
        if record.spec.index != index:
            raise CorruptStoreError(
                f"A ledger record must be of the shard that its place says, but {self._path}{key} "
                f"of {self._url} holds shard {record.spec.index} in the place of {index}; run "
                f"`retort repair {self._url}`."
            )
        return record

    def _check_superseded(self, number: int, indices: list[int]) -> None:
        """Raise CorruptStoreError unless these shards' own records say what their segment says."""
        lines = self._segment_lines(number)
        if lines is None:
            return
        first = self._span(number)[0]
        for index, raw in self._read_records(indices):
            kept = self.parse(lines[index - first], index, segment_key(number))
            if _data(self.parse(raw, index, record_key(index))) != _data(kept):
                raise CorruptStoreError(
                    f"Writers of one shard must produce equal bytes, but two of shard {index} of "
                    f"{self._url} did not; use one kind of hardware, and run `retort repair "
                    f"{self._url}`."
                )

    def _write_if_absent(self, key: str, raw: bytes) -> None:
        """Write an object unless it exists; by the next moment the driver may have compacted it."""
        with remote.explained(self._store):
            found = self._store.read(key).result()
            if found.state == "missing":
                self._store.write(key, raw, if_equal=found.stamp.generation).result()

    def _delete(self, keys: list[str]) -> None:
        for start in range(0, len(keys), _AT_ONCE):
            with remote.explained(self._store):
                writes = [self._store.write(key, None) for key in keys[start : start + _AT_ONCE]]
                for write in writes:
                    write.result()


def _data(record: LedgerRecord) -> tuple[object, ...]:
    """What a record says of the stored bytes; sums may differ in the last bit between machines."""
    return record.spec, record.tokens_sha256, record.files


def summary_bytes(summary: LedgerSummary) -> bytes:
    """The exact bytes of a stored summary."""
    return (summary.canonical_json() + "\n").encode()
