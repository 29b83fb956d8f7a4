"""Creates stores and commits shards. The driver creates; workers write shards and nothing else.

Order, and the race each step prevents: the manifest, only where there is none (of two drivers with
different configs one wins, and the other is refused before it has written anything else), then
array metadata (which follows from the manifest; a driver that was killed in between is continued by
the next), then a shard's data, then its ledger record (a record promises data). Each object is
written whole and renamed into place. All of it may be repeated: equal inputs give equal bytes, so a
retry or a second writer overwrites data with itself.
"""

import hashlib
from dataclasses import fields

import numpy as np

from logit_store import layout, ledger, remote
from logit_store.decode import (
    TargetRows,
    check_targets,
    check_tokens,
    targets_statistics,
    tokens_statistics,
)
from logit_store.reader import TokensReader
from schemas.errors import (
    AlignmentError,
    CorruptStoreError,
    ManifestMismatchError,
)
from schemas.manifest import (
    LedgerRecord,
    Manifest,
    ShardFile,
    ShardSpec,
    ShardStatistics,
    TargetsManifest,
    TokensManifest,
    identity,
)

plan_shards = ledger.plan_shards
committed = ledger.read_committed
pending = ledger.pending
sweep_locks = layout.sweep_locks
_MOST_DIFFERENCES = 12


def create_tokens(url: str, manifest: TokensManifest) -> None:
    """Make an empty store, or accept one of the same manifest. Raises ManifestMismatchError."""
    _create(url, None, manifest)


def create_targets(url: str, name: str, manifest: TargetsManifest) -> None:
    """Make an empty set of targets over a store's tokens, or accept one of the same manifest.

    Raises ManifestMismatchError if it exists with another manifest or if the manifest is not over
    this store's tokens.
    """
    tokens = layout.read_manifest(url, None)
    if manifest.tokens_fingerprint != identity(tokens):
        raise ManifestMismatchError(
            f"Targets must be over the tokens of their store, but the manifest names tokens "
            f"{manifest.tokens_fingerprint} and {url} holds {identity(tokens)}; plan them again."
        )
    _create(url, name, manifest)


def _create(url: str, name: str | None, manifest: Manifest) -> None:
    path = layout.group_path(name)
    store = layout.open_kvstore(url, path)
    layout.write_new(store, layout.GROUP_KEY, layout.group_json(manifest))
    _compare(f"{url} {path}".strip(), layout.read_manifest(url, name), manifest)
    if name is not None:
        targets = layout.open_kvstore(url, layout.TARGETS)
        layout.write_new(targets, layout.GROUP_KEY, layout.group_json(None))
    for spec in layout.arrays(manifest).values():
        layout.write_new(store, f"{spec.name}/{layout.GROUP_KEY}", layout.array_json(spec))


def _compare(where: str, existing: Manifest, wanted: Manifest) -> None:
    if identity(existing) == identity(wanted):
        return
    found = _differences(existing.model_dump(mode="json"), wanted.model_dump(mode="json"))
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
        self._manifest = layout.read_manifest(url, name)
        self._fingerprint = identity(self._manifest)

    def committed(self, spec: ShardSpec) -> LedgerRecord | None:
        """The shard's record, if any. Raises ManifestMismatchError for another store's spec."""
        if spec.manifest_fingerprint != self._fingerprint:
            raise ManifestMismatchError(
                "A shard must be written under the manifest it was planned for, but the plan "
                f"names {spec.manifest_fingerprint} and {self._url} holds {self._fingerprint}; "
                "plan again."
            )
        return ledger.read_record(self._url, self._name, spec.index)

    def _check_shapes(self, spec: ShardSpec, columns: dict[str, np.ndarray]) -> None:
        for name, values in columns.items():
            array = layout.arrays(self._manifest)[name]
            expected = (spec.stop_row - spec.first_row, array.shape[1])
            if values.shape != expected or values.dtype != array.dtype:
                raise ValueError(
                    f"{name} must be {array.dtype} {expected}, but it is {values.dtype} "
                    f"{values.shape}."
                )

    def _write(
        self,
        spec: ShardSpec,
        columns: dict[str, np.ndarray],
        tokens_sha256: str,
        statistics: ShardStatistics,
    ) -> LedgerRecord:
        group = layout.group_path(self._name)
        specs = layout.arrays(self._manifest)
        writes = [
            layout.open_array(self._url, group, specs[name])[spec.first_row : spec.stop_row].write(
                values
            )
            for name, values in columns.items()
        ]
        with remote.explained(self._url):
            for write in writes:
                write.result()
        record = LedgerRecord(
            spec=spec,
            tokens_sha256=tokens_sha256,
            files=tuple(self._stored(group, specs[name].shard_key(spec.index)) for name in columns),
            statistics=statistics,
        )
        return ledger.commit(self._url, self._name, record)

    def _stored(self, group: str, key: str) -> ShardFile:
        raw = layout.read_bytes(layout.open_kvstore(self._url, group), key)
        if raw is None:
            raise CorruptStoreError(
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
        return self._write(spec, columns, tokens_digest(tokens), tokens_statistics(segment_ids))


class TargetsWriter(_ShardWriter):
    """Commits shards of one set of targets; safe to use from many processes."""

    def __init__(self, url: str, name: str):
        super().__init__(url, name)

    @property
    def manifest(self) -> TargetsManifest:
        assert isinstance(self._manifest, TargetsManifest)
        return self._manifest

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
        columns = {field.name: getattr(targets, field.name) for field in fields(targets)}
        self._check_shapes(spec, columns)
        self._check_alignment(spec, tokens, segment_ids)
        check_targets(self.manifest, segment_ids, targets, spec.first_row)
        statistics = targets_statistics(self.manifest, segment_ids, targets)
        return self._write(spec, columns, tokens_digest(tokens), statistics)

    def _check_alignment(
        self, spec: ShardSpec, tokens: np.ndarray, segment_ids: np.ndarray
    ) -> None:
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


def tokens_digest(tokens: np.ndarray) -> str:
    """SHA-256 of token ids as int32, little-endian, C order."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()
