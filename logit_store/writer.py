"""Creates stores and commits shards. The driver creates; workers write shards and nothing else.

Order, and the race each step prevents: the list of source files (named by its content), then the
manifest, only where there is none (of two drivers with different configs one wins, and the other is
refused before it has written anything that a reader would take for the store's), then what follows
from the manifest (a driver that was killed in between is continued by the next), then a shard's
data, then its ledger record (a record promises data). Each object is written whole and renamed into
place. All of it may be repeated: equal inputs give equal bytes, so a retry or a second writer
overwrites data with itself. A writer holds one shard in memory, as rows and as files.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from logit_store import layout, manifests, remote, seals, storage
from logit_store.codec import Vocabulary
from logit_store.ledger import Ledger, plan_shards
from logit_store.reader import TokensReader, read_vocabulary
from logit_store.rows import TargetRows, check_targets, check_tokens, tokens_statistics
from schemas.errors import (
    AlignmentError,
    ManifestMismatchError,
    StorageError,
)
from schemas.manifest import (
    Corpus,
    LedgerRecord,
    Manifest,
    ShardFile,
    ShardSpec,
    ShardStatistics,
    TargetsManifest,
    TokensManifest,
    VocabularyInfo,
    identity,
)

__all__ = [
    "Tables",
    "TargetsWriter",
    "TokensWriter",
    "create_targets",
    "create_tokens",
    "plan_shards",
]
_MOST_DIFFERENCES = 12


@dataclass(frozen=True)
class Tables:
    """What is stored once for a set of targets; sampling_order uint32 [V] is a permutation."""

    vocabulary: Vocabulary
    sampling_order: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "vocabulary_order": self.vocabulary.order,
            "bucket_bits": self.vocabulary.bucket_bits,
            "sampling_order": self.sampling_order,
        }

    def info(self) -> VocabularyInfo:
        """What the manifest says of them."""
        return VocabularyInfo(
            num_buckets=len(self.vocabulary.bucket_bits),
            order_sha256=layout.table_digest(self.vocabulary.order),
            buckets_sha256=layout.table_digest(self.vocabulary.bucket_bits),
            sampling_sha256=layout.table_digest(self.sampling_order),
        )


def create_tokens(url: str, manifest: TokensManifest, corpus: Corpus) -> None:
    """Make an empty store, or accept one of the same manifest. Raises ManifestMismatchError."""
    if corpus.summary() != manifest.corpus:
        raise ManifestMismatchError(
            "A tokens manifest must be of the corpus beside it, but it names "
            f"{manifest.corpus.sha256} and the corpus is {corpus.fingerprint()}; plan it again."
        )
    store = storage.open_kvstore(url)
    key = layout.corpus_key(manifest)
    storage.write_new(store, key, corpus.canonical_json().encode())
    _create(url, None, manifest, corpus)
    # Left by drivers that were refused or killed before their manifest was there.
    for other in storage.list_keys(storage.open_kvstore(url, layout.CORPUS)):
        if layout.CORPUS + other != key:
            storage.delete(store, layout.CORPUS + other)


def create_targets(url: str, name: str, manifest: TargetsManifest, tables: Tables) -> None:
    """Make an empty set of targets over a store's tokens, or accept one of the same manifest.

    Raises ManifestMismatchError if it exists with another manifest, or if the manifest is not over
    this store's tokens or of other tables.
    """
    tokens = manifests.read_manifest(url, None)
    if manifest.tokens_fingerprint != identity(tokens):
        raise ManifestMismatchError(
            f"Targets must be over the tokens of their store, but the manifest names tokens "
            f"{manifest.tokens_fingerprint} and {url} holds {identity(tokens)}; plan them again."
        )
    if tables.info() != manifest.vocabulary:
        raise ManifestMismatchError(
            "A targets manifest must be of the tables beside it, but it names others; plan again."
        )
    targets = storage.open_kvstore(url, layout.TARGETS)
    _create(url, name, manifest)
    storage.write_new(targets, layout.GROUP_KEY, layout.group_json(None))
    write_tables(url, name, manifest, tables)


def write_tables(url: str, name: str, manifest: TargetsManifest, tables: Tables) -> None:
    """Write the tables of a set of targets over whatever is there."""
    group = layout.group_path(name)
    root = storage.open_kvstore(url)
    for table, values in tables.arrays().items():
        spec = layout.table_arrays(manifest)[table]
        with remote.explained(url):
            storage.open_array(url, group, spec).write(values).result()
        raw = storage.read_bytes(root, group + spec.shard_key(0))
        if raw is not None:
            storage.write_new(root, layout.table_copy_key(name, table), raw)


def _create(url: str, name: str | None, manifest: Manifest, corpus: Corpus | None = None) -> None:
    path = layout.group_path(name)
    store = storage.open_kvstore(url, path)
    storage.write_new(store, layout.GROUP_KEY, layout.group_json(manifest))
    existing = manifests.read_manifest(url, name)
    if identity(existing) != identity(manifest):
        old, new = existing.model_dump(mode="json"), manifest.model_dump(mode="json")
        if isinstance(existing, TokensManifest) and corpus is not None:
            # Which file it is says more than that the list is another.
            old["corpus"] = manifests.read_corpus(url, existing).model_dump(mode="json")
            new["corpus"] = corpus.model_dump(mode="json")
        _refuse(f"{url} {path}".strip(), old, new)
    copies = storage.open_kvstore(url)
    storage.write_new(copies, layout.manifest_copy_key(name), layout.group_json(existing))
    for spec in layout.arrays(manifest).values():
        storage.write_new(store, f"{spec.name}/{layout.GROUP_KEY}", layout.array_json(spec))


def _refuse(where: str, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = _differences(existing, wanted)
    differences = "; ".join(found[:_MOST_DIFFERENCES])
    if len(found) > _MOST_DIFFERENCES:
        differences += f"; and {len(found) - _MOST_DIFFERENCES} more fields differ"
    raise ManifestMismatchError(
        f"A store is continued only under the config that made it, but at {where} {differences}; "
        "use the old config, another name or a new store."
    )


def _differences(old: object, new: object, field: str = "") -> list[str]:
    """A phrase for every field that differs, with the old value and the new."""
    if old == new or field == "software":
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{field}." if field else ""
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in _differences(old.get(key), new.get(key), f"{prefix}{key}")
        ]
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return [f"{field} is {len(old)} items there and {len(new)} items here"]
        return [
            f"{field} is different in item {index}: {difference}"
            for index, items in enumerate(zip(old, new, strict=True))
            for difference in _differences(*items)
        ]
    return [f"{field} is {old} there and {new} here"]


class _ShardWriter:
    """What both writers share: look up a record, write arrays, hash what was stored, commit."""

    def __init__(self, url: str, name: str | None):
        self._url, self._name = url, name
        self._manifest = manifests.read_manifest(url, name)
        self._ledger = Ledger(url, name, self._manifest)
        self._fingerprint = identity(self._manifest)

    def committed(self, spec: ShardSpec) -> LedgerRecord | None:
        """The shard's record, if any. Raises ManifestMismatchError for another store's spec."""
        if spec.manifest_fingerprint != self._fingerprint:
            raise ManifestMismatchError(
                "A shard must be written under the manifest it was planned for, but the plan "
                f"names {spec.manifest_fingerprint} and {self._url} holds {self._fingerprint}; "
                "plan again."
            )
        return self._ledger.record(spec.index)

    def _check_shapes(self, spec: ShardSpec, columns: dict[str, np.ndarray]) -> None:
        for name, values in columns.items():
            array = layout.row_arrays(self._manifest)[name]
            expected = (spec.stop_row - spec.first_row, *array.row_shape)
            if values.shape != expected or values.dtype != array.dtype:
                raise ValueError(
                    f"{name} must be {array.dtype} {expected}, but it is {values.dtype} "
                    f"{values.shape}."
                )

    def _write(
        self,
        spec: ShardSpec,
        columns: dict[str, np.ndarray],
        row_seals: np.ndarray,
        tokens_sha256: str,
        statistics: ShardStatistics,
    ) -> LedgerRecord:
        group = layout.group_path(self._name)
        specs = layout.row_arrays(self._manifest)
        rows = slice(spec.first_row, spec.stop_row)
        stored = seals.attach(columns, row_seals)
        with remote.explained(self._url):
            writes = {
                name: storage.open_array(self._url, group, specs[name])[rows].write(values)
                for name, values in stored.items()
            }
            for name, write in writes.items():
                self._finish(group, specs[name], rows, stored[name], write)
        record = LedgerRecord(
            spec=spec,
            tokens_sha256=tokens_sha256,
            files=tuple(self._stored(group, specs[name].shard_key(spec.index)) for name in columns),
            statistics=statistics,
        )
        return self._ledger.commit(record)

    def _finish(
        self, group: str, spec: layout.ArraySpec, rows: slice, values: np.ndarray, write: Any
    ) -> None:
        """Await a write. A damaged file in the place of a short last shard is replaced.

        TensorStore merges a write that does not fill its shard with what is stored, and so stops at
        bytes that fail their checksum; no record vouches for them, or nothing would be written.
        """
        try:
            write.result()
        except ValueError as error:
            if not str(error).startswith("DATA_LOSS"):
                raise
            key = spec.shard_key(rows.start // (spec.shard_sequences or 1))
            storage.delete(storage.open_kvstore(self._url, group), key)
            storage.open_array(self._url, group, spec)[rows].write(values).result()

    def _stored(self, group: str, key: str) -> ShardFile:
        raw = storage.read_bytes(storage.open_kvstore(self._url, group), key)
        if raw is None:
            raise StorageError(
                f"A written shard must be readable, but {group}{key} of {self._url} is missing; "
                "check the storage and run again."
            )
        return ShardFile(key=key, size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


class TokensWriter(_ShardWriter):
    """Commits shards of tokens; safe to use from many processes."""

    def __init__(self, url: str):
        super().__init__(url, None)

    @property
    def manifest(self) -> TokensManifest:
        assert isinstance(self._manifest, TokensManifest)
        return self._manifest

    def write(self, spec: ShardSpec, tokens: np.ndarray, segment_ids: np.ndarray) -> LedgerRecord:
        """Write and commit rows [R, L] of token ids (int32) and segment ids (uint16, 0 padding).

        Raises ValueError naming the first row that breaks a rule of the format.
        """
        existing = self.committed(spec)
        if existing is not None:
            return existing
        columns = {"tokens": tokens, "segment_ids": segment_ids}
        self._check_shapes(spec, columns)
        check_tokens(self.manifest, tokens, segment_ids, spec.first_row)
        sealed = seals.seal(np.arange(spec.first_row, spec.stop_row), columns)
        statistics = tokens_statistics(segment_ids)
        return self._write(spec, columns, sealed, tokens_digest(tokens), statistics)


class TargetsWriter(_ShardWriter):
    """Commits shards of one set of targets; safe to use from many processes."""

    def __init__(self, url: str, name: str):
        super().__init__(url, name)

    @property
    def manifest(self) -> TargetsManifest:
        assert isinstance(self._manifest, TargetsManifest)
        return self._manifest

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tables that entries are coded by."""
        assert self._name is not None
        return read_vocabulary(self._url, self._name, self.manifest)

    def write(
        self, spec: ShardSpec, tokens: np.ndarray, segment_ids: np.ndarray, targets: TargetRows
    ) -> LedgerRecord:
        """Check, write and commit the targets of rows [R, L] whose tokens are given beside them.

        Raises ValueError naming the first row that breaks a rule of the format, and AlignmentError
        if the store's tokens of these rows are others.
        """
        existing = self.committed(spec)
        if existing is not None:
            return existing
        columns = targets.columns()
        self._check_shapes(spec, columns)
        tokens_sealed = self._check_alignment(spec, tokens, segment_ids)
        statistics = check_targets(
            self.manifest, self.vocabulary, segment_ids, targets, spec.first_row
        )
        sealed = seals.seal(tokens_sealed, columns)
        return self._write(spec, columns, sealed, tokens_digest(tokens), statistics)

    def _check_alignment(
        self, spec: ShardSpec, tokens: np.ndarray, segment_ids: np.ndarray
    ) -> np.ndarray:
        """The seals of the rows' tokens, uint32 [R]; raises AlignmentError if they are others."""
        rows = np.arange(spec.first_row, spec.stop_row)
        stored = TokensReader(self._url).rows(rows)
        for name, given, there in (
            ("tokens", tokens, stored.tokens),
            ("segment_ids", segment_ids, stored.segment_ids),
        ):
            if not np.array_equal(given, there):
                raise AlignmentError(
                    f"Targets must be computed from the store's own rows, but the {name} given for "
                    f"rows {spec.first_row} to {spec.stop_row - 1} are not those of {self._url}; "
                    "read them from the store."
                )
        return seals.seal(rows, {"tokens": tokens, "segment_ids": segment_ids})


def tokens_digest(tokens: np.ndarray) -> str:
    """SHA-256 of token ids as int32, little-endian, C order."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()
