"""Creates stores and commits shards. The driver creates; workers write shards and nothing else.

Order, and the race each step prevents: array metadata, then the group's manifest (a manifest that
can be read promises arrays that can be opened), then a shard's data, then its ledger record (a
record promises data). Each object is written whole and renamed into place. All of it may be
repeated: equal inputs give equal bytes, so a retry or a second writer overwrites data with itself.
"""

import hashlib
from dataclasses import fields

import numpy as np

from logit_store import layout, ledger
from logit_store.decode import TargetRows, check_targets, entry_masses
from schemas.errors import (
    CorruptStoreError,
    ManifestMismatchError,
    StoreNotFoundError,
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


def sweep_locks(url: str) -> int:
    """Delete lock files that killed writers left; returns how many. Only the driver may call it."""
    store = layout.open_kvstore(url)
    locks = [key for key in layout.list_keys(store) if key.endswith(layout.LOCK_SUFFIX)]
    for key in locks:
        store.write(key, None).result()
    return len(locks)


def _create(url: str, name: str | None, manifest: Manifest) -> None:
    path = layout.group_path(name)
    store = layout.open_kvstore(url, path)
    try:
        existing = layout.read_manifest(url, name)
    except StoreNotFoundError:
        existing = None
    if existing is not None:
        _compare(f"{url} {path}".strip(), existing, manifest)
        return
    if name is not None:
        targets = layout.open_kvstore(url, layout.TARGETS)
        targets.write(layout.GROUP_KEY, layout.group_json(None)).result()
    for spec in layout.arrays(manifest).values():
        store.write(f"{spec.name}/{layout.GROUP_KEY}", layout.array_json(spec)).result()
    store.write(layout.GROUP_KEY, layout.group_json(manifest)).result()


def _compare(where: str, existing: Manifest, wanted: Manifest) -> None:
    if identity(existing) == identity(wanted):
        return
    differences = "; ".join(
        f"{field} is {old} there and {new} here"
        for field, old, new in _differences(
            existing.model_dump(mode="json"), wanted.model_dump(mode="json")
        )
    )
    raise ManifestMismatchError(
        f"A store is continued only under the config that made it, but at {where} {differences}; "
        "use the old config, another name or a new store."
    )


def _differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, str, str]]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        if (prefix + key) == "software" or old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            found += _differences(old[key], new[key], f"{prefix}{key}.")
        else:
            found.append((prefix + key, _short(old.get(key)), _short(new.get(key))))
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


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

    def _write(
        self,
        spec: ShardSpec,
        columns: dict[str, np.ndarray],
        tokens_sha256: str,
        statistics: ShardStatistics,
    ) -> LedgerRecord:
        group = layout.group_path(self._name)
        specs = layout.arrays(self._manifest)
        rows = spec.stop_row - spec.first_row
        for name, values in columns.items():
            expected = (rows, specs[name].shape[1])
            if values.shape != expected or values.dtype != specs[name].dtype:
                raise ValueError(
                    f"{name} must be {specs[name].dtype} {expected}, but it is {values.dtype} "
                    f"{values.shape}."
                )
        writes = [
            layout.open_array(self._url, group, specs[name])[spec.first_row : spec.stop_row].write(
                values
            )
            for name, values in columns.items()
        ]
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

        Raises ValueError if a token is not an id of the tokenizer.
        """
        existing = self.committed(spec)
        if existing is not None:
            return existing
        vocab_size = self.manifest.tokenizer.vocab_size
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise ValueError(
                f"Tokens must be ids in [0, {vocab_size}), but they span [{tokens.min()}, "
                f"{tokens.max()}]; check that the tokenizer is the manifest's."
            )
        statistics = ShardStatistics(
            tokens=int(np.count_nonzero(segment_ids)),
            predicted_tokens=int(np.count_nonzero(layout.predicted_mask(segment_ids))),
        )
        columns = {"tokens": tokens, "segment_ids": segment_ids}
        return self._write(spec, columns, tokens_digest(tokens), statistics)


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

        Raises ValueError naming the first row that breaks a rule of the format.
        """
        existing = self.committed(spec)
        if existing is not None:
            return existing
        check_targets(self.manifest, segment_ids, targets, spec.first_row)
        predicted = layout.predicted_mask(segment_ids)
        masses = entry_masses(self.manifest, targets)
        statistics = ShardStatistics(
            tokens=int(np.count_nonzero(segment_ids)),
            predicted_tokens=int(np.count_nonzero(predicted)),
            entries=int(targets.entry_count.sum(dtype=np.int64)),
            max_entries=int(targets.entry_count.max(initial=0)),
            mass_sum=float(masses[predicted].sum(dtype=np.float64)),
            entropy_sum_nats=float(targets.teacher_entropy[predicted].sum(dtype=np.float64)),
            label_logprob_sum_nats=float(targets.label_logprob[predicted].sum(dtype=np.float64)),
        )
        columns = {field.name: getattr(targets, field.name) for field in fields(targets)}
        return self._write(spec, columns, tokens_digest(tokens), statistics)


def tokens_digest(tokens: np.ndarray) -> str:
    """SHA-256 of token ids as int32, little-endian, C order."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()
