"""A store driven at random against a model of it that knows every byte of every file."""

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import small_store
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from logit_store import ledger as ledgers
from logit_store import reader, storage, writer
from logit_store.ledger import Ledger, plan_shards
from logit_store.repair import repair
from logit_store.verify import verify
from schemas.errors import (
    CorruptStoreError,
    FormatVersionError,
    IncompleteStoreError,
    ManifestMismatchError,
    StoreNotFoundError,
)
from schemas.manifest import Manifest

NAMES = ("default", "other")
GROUPS = (None, *NAMES)
SHARDS = 3
SPANS = ((0, 1), (2,))
"""Shards of each ledger segment."""
SHARED_MEMORY = Path("/dev/shm")
TOKENS, SEGMENTS = small_store.token_rows()
TARGETS = small_store.target_rows()
groups = st.sampled_from(GROUPS)
shards = st.integers(0, SHARDS - 1)


def manifest(name: str | None) -> Manifest:
    if name is None:
        return small_store.tokens_manifest()
    return small_store.targets_manifest(seed=NAMES.index(name))


def other_manifest(name: str | None) -> Manifest:
    """Of another config, which a store of the first must refuse."""
    if name is None:
        return small_store.tokens_manifest(sequence_tokens=8)
    return small_store.targets_manifest(seed=99)


def path_of(name: str | None) -> str:
    return "" if name is None else f"targets/{name}/"


def group_of(key: str) -> str | None:
    parts = key.removeprefix("copies/").split("/")
    is_named = parts[0] == "targets" and parts[1] != "zarr.json"
    return parts[1].removesuffix(".json") if is_named else None


def shard_of(key: str) -> int | None:
    """The shard whose data a file is."""
    if "/c/" not in key or any(f"/{table}/" in key for table in small_store.tables().arrays()):
        return None
    return int(key.split("/c/")[1].split("/")[0])


def files(url: str) -> dict[str, bytes]:
    root = Path(url)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def create(url: str, name: str | None, made: Manifest) -> None:
    if name is None:
        writer.create_tokens(url, made, small_store.CORPUS)
    else:
        writer.create_targets(url, name, made, small_store.tables())


def write(url: str, name: str | None, index: int, flip: bool = False) -> None:
    spec = plan_shards(manifest(name))[index]
    rows = slice(spec.first_row, spec.stop_row)
    tokens, segments = TOKENS[rows], SEGMENTS[rows]
    if flip:
        segments = segments[:, ::-1]
    if name is None:
        writer.TokensWriter(url).write(spec, tokens, segments)
    else:
        targets = small_store.part(TARGETS, spec)
        writer.TargetsWriter(url, name).write(spec, tokens, segments, targets)


class Golden:
    """Every file that a store can have, by key; learned from one that was written calmly."""

    def __init__(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in GROUPS:
                create(folder, name, manifest(name))
            self.metadata = files(folder)
            for name in GROUPS:
                for index in range(SHARDS):
                    write(folder, name, index)
            self.loose = files(folder)
            for name in GROUPS:
                Ledger(folder, name, manifest(name)).compact()
            self.all = files(folder) | self.loose
            batch = reader.TargetsReader(folder, "default").rows(range(small_store.ROWS))
            self.rows = {field: getattr(batch, field) for field in batch.__dataclass_fields__}

    def of(self, name: str | None) -> set[str]:
        """Keys of what creating a group writes."""
        return {
            key
            for key in self.metadata
            if group_of(key) == name and not (name is None and key == "targets/zarr.json")
        } | ({"targets/zarr.json"} if name else set())

    def data(self, name: str | None, index: int) -> set[str]:
        return {k for k in self.loose if group_of(k) == name and shard_of(k) == index}


class Group:
    """What there is of the tokens or of one set of targets."""

    def __init__(self, name: str | None):
        self.folder = f"{path_of(name)}ledger/"
        self.data: set[int] = set()
        self.loose: set[int] = set()
        self.segments: set[int] = set()
        self.has_summary = False

    @property
    def committed(self) -> set[int]:
        return self.loose | {i for number in self.segments for i in SPANS[number]}

    def ledger_keys(self) -> set[str]:
        keys = {f"{self.folder}{index:08d}.json" for index in self.loose}
        keys |= {f"{self.folder}segment-{number:06d}.jsonl" for number in self.segments}
        return keys | ({f"{self.folder}summary.json"} if self.has_summary else set())

    def compact(self) -> None:
        for number, span in enumerate(SPANS):
            if set(span) <= self.committed:
                self.segments.add(number)
                self.loose -= set(span)
        self.has_summary |= len(self.segments) == len(SPANS)

    def withdraw(self, indices: set[int]) -> None:
        self.has_summary = False
        for number, span in enumerate(SPANS):
            if number in self.segments and indices & set(span):
                self.segments.remove(number)
                self.loose |= set(span)
        self.loose -= indices


class StoreMachine(RuleBasedStateMachine):
    golden: Golden

    def __init__(self):
        super().__init__()
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.folder = tempfile.mkdtemp(dir=place)
        self.url = f"{self.folder}/store"
        self.groups: dict[str | None, Group] = {}
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def ledger(self, name: str | None) -> Ledger:
        return Ledger(self.url, name, manifest(name))

    def expected(self) -> dict[str, bytes]:
        keys: set[str] = set()
        for name, group in self.groups.items():
            keys |= self.golden.of(name) | group.ledger_keys()
            for index in group.data:
                keys |= self.golden.data(name, index)
        return {key: self.golden.all[key] for key in keys}

    @initialize(
        names=st.sampled_from([(), GROUPS[:1], GROUPS[:2], GROUPS, GROUPS]),
        shards=st.sampled_from([(), (1,), (0, 2), (0, 1, 2), (0, 1, 2)]),
        is_compacted=st.booleans(),
    )
    def begin(
        self, names: tuple[str | None, ...], shards: tuple[int, ...], is_compacted: bool
    ) -> None:
        """Somewhere: to most interesting places it is a long way from nothing."""
        with pytest.raises(StoreNotFoundError):
            verify(self.url)
        with pytest.raises(StoreNotFoundError):
            reader.TokensReader(self.url)
        for name in names:
            self.create_group(name)
            for index in shards:
                self.write_shard(name, index, 1)
            if is_compacted:
                self.compact(name)

    @invariant()
    def the_files_are_the_models(self) -> None:
        found, expected = files(self.url), self.expected()
        for key in self.damaged:
            found.pop(key, None)
            expected.pop(key, None)
        assert found == expected

    @precondition(lambda self: not self.damaged)
    @rule(name=groups)
    def create_group(self, name: str | None) -> None:
        """Also where it exists: then nothing changes."""
        if name is not None and None not in self.groups:
            with pytest.raises(StoreNotFoundError, match="holds no tokens"):
                create(self.url, name, manifest(name))
            return
        create(self.url, name, manifest(name))
        self.groups.setdefault(name, Group(name))

    @precondition(lambda self: not self.damaged)
    @rule(name=groups)
    def another_config_is_refused(self, name: str | None) -> None:
        if name in self.groups:
            with pytest.raises(ManifestMismatchError, match="continued only under the config"):
                create(self.url, name, other_manifest(name))

    @precondition(lambda self: not self.damaged)
    @rule(name=groups, index=shards, writers=st.integers(1, 3))
    def write_shard(self, name: str | None, index: int, writers: int) -> None:
        """Again too, and by several writers at once."""
        if name not in self.groups:
            with pytest.raises(StoreNotFoundError):
                write(self.url, name, index)
            return
        group = self.groups[name]
        if index not in group.committed and index not in self.groups[None].committed and name:
            with pytest.raises(IncompleteStoreError):
                write(self.url, name, index)
            return
        with ThreadPoolExecutor(writers) as pool:
            for done in [pool.submit(write, self.url, name, index) for _ in range(writers)]:
                done.result()
        group.data.add(index)
        if index not in group.committed:
            group.loose.add(index)

    @precondition(lambda self: not self.damaged and None in self.groups)
    @rule(name=groups, index=shards)
    def rows_that_break_a_rule_are_refused(self, name: str | None, index: int) -> None:
        if name in self.groups and index not in self.groups[name].committed:
            with pytest.raises((ValueError, IncompleteStoreError)):
                write(self.url, name, index, flip=True)

    @precondition(lambda self: not self.damaged)
    @rule(name=groups)
    def compact(self, name: str | None) -> None:
        if name in self.groups:
            assert self.ledger(name).compact() == len(self.groups[name].committed)
            self.groups[name].compact()

    @precondition(lambda self: not self.damaged)
    @rule(name=groups, indices=st.sets(shards))
    def withdraw(self, name: str | None, indices: set[int]) -> None:
        if name in self.groups:
            self.ledger(name).withdraw(indices)
            self.groups[name].withdraw(indices)

    @rule(name=groups)
    def the_ledger_says_what_is_committed(self, name: str | None) -> None:
        if name in self.groups and not any("ledger/" in key for key in self.damaged):
            ledger = self.ledger(name)
            committed = self.groups[name].committed
            assert {record.spec.index for record in ledger.records()} == committed
            assert set(np.flatnonzero(ledger.committed()).tolist()) == committed

    @rule(name=st.sampled_from(NAMES), rows=st.lists(st.integers(0, 4), min_size=1, max_size=4))
    def read(self, name: str, rows: list[int]) -> None:
        """True rows, or an error that names the cause; never anything else."""
        is_there = None in self.groups and name in self.groups
        try:
            batch = reader.TargetsReader(self.url, name).rows(rows)
        except StoreNotFoundError:
            assert not is_there or any(key.endswith("zarr.json") for key in self.damaged)
            return
        except IncompleteStoreError:
            both = self.groups[None].committed & self.groups[name].committed
            assert not {row // 2 for row in rows} <= both
            return
        except (CorruptStoreError, FormatVersionError):
            assert self.damaged
            return
        assert is_there
        for field, expected in self.golden.rows.items():
            np.testing.assert_array_equal(getattr(batch, field), expected[rows])

    @precondition(lambda self: None in self.groups and not self.damaged)
    @rule(rows=st.lists(st.integers(0, 4), min_size=1, max_size=4))
    def read_tokens(self, rows: list[int]) -> None:
        if {row // 2 for row in rows} <= self.groups[None].committed:
            found = reader.TokensReader(self.url).rows(rows)
            np.testing.assert_array_equal(found.tokens, TOKENS[rows])
        else:
            with pytest.raises(IncompleteStoreError):
                reader.TokensReader(self.url).rows(rows)

    @precondition(lambda self: self.groups)
    @rule()
    def check(self) -> None:
        report = verify(self.url)
        found = {problem.file for problem in report.problems}
        # Until the driver sums up a ledger that is complete, its summary is missing.
        awaited = {
            f"{group.folder}summary.json"
            for group in self.groups.values()
            if len(group.segments) == len(SPANS) and not group.has_summary
        }
        assert self.damaged <= found
        assert found - self.damaged <= awaited | {
            key.replace(key.split("ledger/")[1], "") for key in self.damaged if "ledger/" in key
        }
        if not self.damaged:
            assert found == awaited
            assert report.shards == sum(len(group.committed) for group in self.groups.values())

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "exchange", "gone"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        """Of what is committed; two files at most, and no object with all that it comes from."""
        keys = [key for key in sorted(self.expected()) if self.can_be_damaged(key, how)]
        if not keys or len(self.damaged) == 2:
            return
        key = data.draw(st.sampled_from(keys))
        path = Path(self.url, key)
        raw = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(raw) - 1))
        if how == "gone":
            path.unlink()
        elif how == "cut":
            path.write_bytes(raw[:place])
        elif how == "exchange":
            path.write_bytes(b"{}" if data.draw(st.booleans()) else b"\0" * len(raw))
        else:
            raw[place] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(raw)
        self.damaged.add(key)

    def can_be_damaged(self, key: str, how: str) -> bool:
        group, index = self.groups[group_of(key)], shard_of(key)
        if key.startswith("corpus/") or key in self.damaged:
            return False
        if index is not None and index not in group.committed:
            return False
        if how == "gone" and "ledger/" in key and not group.has_summary:
            # Then the shard was never committed, as far as anyone can tell.
            return False
        both = [key, *self.damaged]
        ledger_is_hit = any("ledger/" in k for k in both)
        # A manifest or table with its copy; tokens with what would be derived from them.
        return not (
            (any(k.startswith("copies/") for k in both) and len(both) > 1)
            or (ledger_is_hit and any(shard_of(k) is not None for k in both))
            or (ledger_is_hit and not all("ledger/" in k for k in both))
        )

    @precondition(lambda self: self.damaged)
    @rule()
    def mend(self) -> None:
        lost: dict[str | None, set[int]] = {}
        for key in self.damaged:
            index = shard_of(key)
            if index is not None:
                lost.setdefault(group_of(key), set()).add(index)
        _, plan = repair(self.url, apply=False)
        _, outcome = repair(self.url, apply=True)
        assert outcome == plan
        assert {name: set(found) for name, found in outcome.withdrawn.items()} == lost
        assert outcome.left == []
        hit = {group_of(k) for k in self.damaged if "ledger/" in k or shard_of(k) is not None}
        for name, group in self.groups.items():
            waits = len(group.segments) == len(SPANS) and not group.has_summary
            if name in hit or waits:
                group.data -= lost.get(name, set())
                group.withdraw(lost.get(name, set()))
                group.compact()
        self.damaged.clear()
        assert verify(self.url).ok

    @rule()
    def sweep(self) -> None:
        assert storage.sweep_locks(self.url) == 0


@pytest.fixture(scope="module")
def golden():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledgers, "SEGMENT_SHARDS", 2)
        StoreMachine.golden = Golden()
        yield


@pytest.mark.usefixtures("golden")
class TestStore(StoreMachine.TestCase):
    settings = settings(
        # More by RETORT_STORE_EXAMPLES, when what it drives is changed.
        max_examples=int(os.environ.get("RETORT_STORE_EXAMPLES", "30")),
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
