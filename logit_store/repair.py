"""Mends a damaged store, and makes sure that only what is lost is computed again.

What the manifest implies is written anew; manifests and tables come back from their copies; a
ledger record is derived again from data that is whole; a shard whose data is damaged is withdrawn,
so that the job that writes it finds it missing. Nothing that is intact is touched.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from logit_store import layout, manifests, storage
from logit_store.ledger import Ledger, shard_spec
from logit_store.verify import Contents, Problem, Report, target_names, verify
from schemas.errors import RetortError
from schemas.manifest import (
    LedgerRecord,
    Manifest,
    ShardFile,
    TargetsManifest,
)

Progress = Callable[[int, str], None]


@dataclass
class Outcome:
    """What a repair did, or would do: one line each, and the shards to be written again."""

    mended: list[str] = field(default_factory=list)
    withdrawn: dict[str | None, list[int]] = field(default_factory=dict)
    """Shards of the tokens (None) and of each set of targets."""
    left: list[str] = field(default_factory=list)
    """What only a person can decide."""


def repair(
    url: str, apply: bool, progress: Progress = lambda done, note: None
) -> tuple[Report, Outcome]:
    """Verify a store and mend what can be mended; without `apply` only say how.

    Withdrawn shards are missing afterwards, and `retort tokenize` or `retort dump` with the config
    that made them writes just those. Raises StoreNotFoundError if there is nothing.
    """
    report = verify(url, progress)
    work = _Repair(url, apply)
    # A manifest that came back from its copy lets all that depends on it be judged.
    if any(problem.kind == "manifest" for problem in report.problems):
        work.manifests(report.problems)
        if apply:
            report = verify(url, progress)
    work.rest([p for p in report.problems if p.kind != "manifest"])
    return report, work.outcome


class _Repair:
    def __init__(self, url: str, apply: bool):
        self._url, self._apply = url, apply
        self._store = storage.open_kvstore(url)
        self.outcome = Outcome()

    def _put(self, key: str, raw: bytes, how: str) -> None:
        if storage.read_bytes(self._store, key) == raw:
            return
        self.outcome.mended.append(f"{key}: {how}")
        if self._apply:
            self._store.write(key, raw).result()

    def _delete(self, key: str) -> None:
        if self._apply:
            self._store.write(key, None).result()

    def manifests(self, problems: list[Problem]) -> None:
        """Write each damaged manifest from its copy, or the copy from the manifest."""
        names = target_names(set(storage.list_keys(self._store)))
        for name in (None, *names):
            key, copy = layout.group_path(name) + layout.GROUP_KEY, layout.manifest_copy_key(name)
            if not any(problem.file in (key, copy) for problem in problems):
                continue
            sound = self._sound_manifest(name, key) or self._sound_manifest(name, copy)
            if sound is None:
                self.outcome.left.append(f"{key}: both it and {copy} are damaged")
                continue
            raw = layout.group_json(sound)
            self._put(key, raw, f"written again from {copy}")
            self._put(copy, raw, f"written again from {key}")
        if names:
            key = layout.TARGETS + layout.GROUP_KEY
            self._put(key, layout.group_json(None), "written again")

    def _sound_manifest(self, name: str | None, key: str) -> Manifest | None:
        raw = storage.read_bytes(self._store, key)
        if raw is None:
            return None
        try:
            manifest = manifests.parse_manifest(raw, self._url, name, key)
        except RetortError:
            return None
        return manifest

    def rest(self, problems: list[Problem]) -> None:
        """All but manifests, group by group."""
        for name in sorted({p.targets for p in problems}, key=lambda name: name or ""):
            mine = [p for p in problems if p.targets == name and p.kind not in ("stray",)]
            if not mine:
                continue
            try:
                manifest = manifests.read_manifest(self._url, name)
            except RetortError:
                continue
            self._metadata(name, manifest, [p for p in mine if p.kind == "metadata"])
            if isinstance(manifest, TargetsManifest):
                self._tables(manifest, [p for p in mine if p.kind == "table"])
            self._shards(name, manifest, [p for p in mine if p.kind in ("data", "ledger")])
        for problem in problems:
            if problem.kind == "stray":
                self.outcome.left.append(
                    f"{problem.file}: {problem.what}; delete it if it is no use"
                )

    def _metadata(self, name: str | None, manifest: Manifest, problems: list[Problem]) -> None:
        group = layout.group_path(name)
        known = {
            f"{group}{spec.name}/{layout.GROUP_KEY}": layout.array_json(spec)
            for spec in layout.arrays(manifest).values()
        }
        for problem in problems:
            if problem.file in known:
                self._put(problem.file, known[problem.file], "written again from the manifest")
            else:
                self.outcome.left.append(
                    f"{problem.file}: {problem.what}; `retort tokenize` needs it"
                )

    def _tables(self, manifest: TargetsManifest, problems: list[Problem]) -> None:
        for problem in problems:
            name = problem.targets
            assert name is not None
            for table, spec in layout.table_arrays(manifest).items():
                key = layout.group_path(name) + spec.shard_key(0)
                copy = layout.table_copy_key(name, table)
                if problem.file == copy:
                    raw = storage.read_bytes(self._store, key)
                    assert raw is not None
                    self._put(copy, raw, f"written again from {key}")
                elif problem.file == key:
                    raw = storage.read_bytes(self._store, copy)
                    if raw is None:
                        self.outcome.left.append(f"{key}: both it and {copy} are damaged")
                    else:
                        # A copy that is damaged too fails its checksum at the next verification.
                        self._put(key, raw, f"written again from {copy}")

    def _shards(self, name: str | None, manifest: Manifest, problems: list[Problem]) -> None:
        if not problems:
            return
        ledger = Ledger(self._url, name, manifest)
        lost = sorted({p.shard for p in problems if p.kind == "data" and p.shard is not None})
        doubted = sorted(
            {p.shard for p in problems if p.kind == "ledger" and p.shard is not None} - set(lost)
        )
        records = {}
        for index in doubted:
            record = derive_record(self._url, name, manifest, index)
            if record is None:
                lost.append(index)
            else:
                records[index] = record
        if lost:
            self.outcome.withdrawn[name] = sorted(lost)
        for index in records:
            self.outcome.mended.append(
                f"{layout.group_path(name)}{layout.LEDGER}: the record of shard {index}, derived "
                "again from its data"
            )
        if not lost and not records:
            self.outcome.mended.append(f"{ledger.summary_key}: written again from the records")
        if not self._apply:
            return
        ledger.withdraw([*lost, *records])
        for index in lost:
            # Also what looks whole: of two shards that were swapped, both are lost.
            for spec in layout.row_arrays(manifest).values():
                self._delete(layout.group_path(name) + spec.shard_key(index))
        for record in records.values():
            ledger.commit(record)
        ledger.compact()


def derive_record(
    url: str, name: str | None, manifest: Manifest, index: int
) -> LedgerRecord | None:
    """A shard's record from its stored data, or None if any of that is damaged or missing."""
    spec = shard_spec(manifest, index)
    try:
        tokens_sha256, statistics = Contents(url, name).describe(spec.first_row, spec.stop_row)
    except (RetortError, ValueError, LookupError):
        return None
    store = storage.open_kvstore(url, layout.group_path(name))
    files = []
    for array in layout.row_arrays(manifest).values():
        raw = storage.read_bytes(store, array.shard_key(index))
        if raw is None:
            return None
        digest = hashlib.sha256(raw).hexdigest()
        files.append(ShardFile(key=array.shard_key(index), size_bytes=len(raw), sha256=digest))
    return LedgerRecord(
        spec=spec, tokens_sha256=tokens_sha256, files=tuple(files), statistics=statistics
    )
