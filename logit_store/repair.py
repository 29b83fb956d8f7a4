"""Mends a damaged store, and makes sure that only what is lost is computed again.

What the manifest implies is written anew; manifests and tables come back from their copies; a
ledger record is derived again from data that is whole; a shard whose data is damaged is withdrawn,
so that the job that writes it finds it missing. Nothing that is intact is touched.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from logit_store import layout, storage
from logit_store.ledger import Ledger, shard_spec
from logit_store.verify import (
    Contents,
    Problem,
    Report,
    is_vouched_for,
    read_table,
    sound_manifests,
    table_keys,
    target_names,
    verify,
)
from schemas.errors import RetortError
from schemas.manifest import (
    LedgerRecord,
    Manifest,
    ShardFile,
    TargetsManifest,
    identity,
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

    Returns what was found before anything was mended.

    Withdrawn shards are missing afterwards, and `retort tokenize` or `retort dump` with the config
    that made them writes just those. Raises StoreNotFoundError if there is nothing.
    """
    report = verify(url, progress)
    work = _Repair(url, apply)
    work.manifests([p for p in report.problems if p.kind == "manifest"])
    work.rest([p for p in report.problems if p.kind != "manifest"])
    return report, work.outcome


class _Repair:
    def __init__(self, url: str, apply: bool):
        self._url, self._apply = url, apply
        self._store = storage.open_kvstore(url)
        self.outcome = Outcome()
        self._sound: dict[str | None, Manifest] = {}

    def _put(self, key: str, raw: bytes, how: str) -> None:
        if storage.read_bytes(self._store, key) == raw:
            return
        self.outcome.mended.append(f"{key}: {how}")
        if self._apply:
            storage.write_bytes(self._store, key, raw)

    def _delete(self, key: str) -> None:
        storage.delete(self._store, key)

    def manifests(self, problems: list[Problem]) -> None:
        """Write each damaged manifest from its copy, or the copy from the manifest."""
        names = target_names(set(storage.list_keys(self._store)))
        for name in (None, *names):
            key, copy = layout.group_path(name) + layout.GROUP_KEY, layout.manifest_copy_key(name)
            sound, _ = sound_manifests(self._url, name)
            if not sound:
                self.outcome.left.append(f"{key}: both it and {copy} are damaged")
                continue
            manifest = next(iter(sound.values()))
            if len({identity(m) for m in sound.values()}) == 2 and not is_vouched_for(
                self._url, name, manifest
            ):
                self.outcome.left.append(f"{key}: it and {copy} differ, and both are whole")
                continue
            self._sound[name] = manifest
            raw = layout.group_json(manifest)
            if storage.read_bytes(self._store, key) == raw:
                # It is whole, and what is wrong is what it says.
                self.outcome.left += [f"{key}: {p.what}" for p in problems if p.file == key]
            self._put(key, raw, f"written again from {copy}")
            self._put(copy, raw, f"written again from {key}")
        if names:
            key = layout.TARGETS + layout.GROUP_KEY
            self._put(key, layout.group_json(None), "written again")

    def rest(self, problems: list[Problem]) -> None:
        """All but manifests, group by group."""
        for name in sorted({p.targets for p in problems}, key=lambda name: name or ""):
            mine = [p for p in problems if p.targets == name and p.kind != "stray"]
            manifest = self._sound.get(name)
            if not mine or manifest is None:
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
                of_corpus = problem.file.startswith(layout.CORPUS)
                remedy = (
                    "`retort tokenize` needs it" if of_corpus else "`retort tokenize` writes it"
                )
                self.outcome.left.append(f"{problem.file}: {problem.what}; {remedy}")

    def _tables(self, manifest: TargetsManifest, problems: list[Problem]) -> None:
        for problem in problems:
            name = problem.targets
            assert name is not None
            for table in layout.table_arrays(manifest):
                key, copy = keys = table_keys(name, manifest, table)
                if problem.file not in keys:
                    continue
                other = copy if problem.file == key else key
                raw = storage.read_bytes(self._store, other)
                if raw is not None and read_table(manifest, table, raw) is not None:
                    self._put(problem.file, raw, f"written again from {other}")
                elif problem.file == key:
                    self.outcome.left.append(f"{key}: both it and {copy} are damaged")

    def _shards(self, name: str | None, manifest: Manifest, problems: list[Problem]) -> None:
        if not problems:
            return
        ledger = Ledger(self._url, name, manifest)
        lost = sorted({p.shard for p in problems if p.kind == "data" and p.shard is not None})
        doubted = sorted(
            {p.shard for p in problems if p.kind == "ledger" and p.shard is not None} - set(lost)
        )
        tokens = self._sound.get(None)
        contents = None if tokens is None else Contents(self._url, name, manifest, tokens)
        if doubted and (contents is None or contents.is_blind):
            # Nothing is given up that may be whole.
            self.outcome.left.append(
                f"{layout.group_path(name)}{layout.LEDGER}: records are damaged that can only be "
                "derived again when the manifest of the tokens and the tables are back"
            )
            return
        records = {}
        for index in doubted:
            assert contents is not None
            record = derive_record(self._url, name, manifest, contents, index)
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
        for index in lost:
            # Also what looks whole: of two shards that were swapped, both are lost. Data goes
            # before its record: if it ends here, the next verification finds the same shards lost.
            for spec in layout.row_arrays(manifest).values():
                self._delete(layout.group_path(name) + spec.shard_key(index))
        ledger.withdraw(lost, records.values())
        ledger.compact()


def derive_record(
    url: str, name: str | None, manifest: Manifest, contents: Contents, index: int
) -> LedgerRecord | None:
    """A shard's record from its stored data, or None if any of that is damaged or missing."""
    spec = shard_spec(manifest, index)
    try:
        tokens_sha256, statistics = contents.describe(spec.first_row, spec.stop_row)
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
