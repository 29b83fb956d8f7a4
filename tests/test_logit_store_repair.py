"""Repair brings back what can be brought back, byte for byte, and gives up exactly what is lost."""

import itertools
import os
import random
from pathlib import Path

import pytest
import small_store

from logit_store import manifests, repair, storage, writer
from logit_store.ledger import Ledger, record_bytes
from logit_store.repair import Outcome
from logit_store.verify import verify
from schemas.errors import StorageError, StoreNotFoundError

TARGETS = "targets/default/"
DATA = ("tokens", "segment_ids", *small_store.target_rows().columns())
TABLES = tuple(small_store.tables().arrays())
LOST_CORPUS = "it is missing or not the manifest's list of sources; `retort tokenize` needs it"


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> dict[str, bytes]:
    """All files of the undamaged store."""
    store = tmp_path_factory.mktemp("golden") / "store"
    small_store.write_store(str(store))
    return files(store)


@pytest.fixture
def store(tmp_path, golden) -> Path:
    put(tmp_path / "store", golden)
    return tmp_path / "store"


def put(store: Path, contents: dict[str, bytes]) -> None:
    """Make the store's files exactly these."""
    for name in files(store).keys() - contents.keys():
        (store / name).unlink()
    for name, raw in contents.items():
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != raw:
            path.write_bytes(raw)


def files(store: Path) -> dict[str, bytes]:
    # Not by Path.rglob, which takes longer than the repairs that this is called around.
    return {
        os.path.relpath(place, store): Path(place).read_bytes()
        for folder, _, names in os.walk(store)
        for place in (os.path.join(folder, name) for name in names)
    }


def array_of(name: str) -> str:
    return name.removeprefix(TARGETS).split("/")[0]


def shard_of(name: str) -> int:
    return int(name.split("/c/")[1].split("/")[0])


def lost_by(*names: str) -> dict[str | None, list[int]]:
    """The shards that damage to these files costs: those of damaged data files, no others."""
    lost: dict[str | None, set[int]] = {}
    for name in names:
        if array_of(name) in DATA and "/c/" in name:
            group = "default" if name.startswith(TARGETS) else None
            lost.setdefault(group, set()).add(shard_of(name))
    return {group: sorted(shards) for group, shards in lost.items()}


def mended(store: Path) -> Outcome:
    """Say what a repair would do, do it, and see that it did so and left nothing wrong."""
    before = files(store)
    report, plan = repair.repair(str(store), apply=False)
    assert files(store) == before
    assert not report.ok
    again, done = repair.repair(str(store), apply=True)
    assert again == report
    assert done == plan
    return done


def write_missing(store: Path) -> list[tuple[str | None, int]]:
    """What `retort tokenize` and `retort dump` do with a store from which shards are missing."""
    missing = [
        (name, spec.index)
        for name in (None, "default")
        for spec in Ledger(str(store), name, manifests.read_manifest(str(store), name)).pending()
    ]
    small_store.write_store(str(store))
    return missing


def damage(raw: bytes, how: str, rng: random.Random) -> bytes | None:
    flipped = bytearray(raw)
    flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return {
        "flipped": bytes(flipped),
        "cut": raw[: rng.randrange(len(raw))],
        "lengthened": raw + b"\0",
        "exchanged": b"{}",
        "gone": None,
    }[how]


@pytest.mark.parametrize("how", ["flipped", "cut", "lengthened", "exchanged", "gone"])
def test_any_damaged_file_comes_back(store, golden, how):
    """Of data its shard is written again, and nothing else; all other files are mended alone."""
    rng = random.Random(how)
    for name in sorted(golden):
        raw = damage(golden[name], how, rng)
        put(store, {k: v for k, v in golden.items() if k != name or raw is not None})
        if raw is not None:
            (store / name).write_bytes(raw)
        outcome = mended(store)
        assert outcome.withdrawn == lost_by(name), name
        if name.startswith("corpus/"):
            assert outcome.left == [f"{name}: {LOST_CORPUS}"]
            continue
        assert outcome.left == [], name
        lost = [(group, index) for group, shards in lost_by(name).items() for index in shards]
        if lost:
            report = verify(str(store))
            assert report.ok, report.problems
            assert write_missing(store) == lost
        # To the byte the store that test_a_whole_store_is_left_as_it_is finds nothing to do in.
        assert files(store) == golden, name


def test_any_two_files_that_were_swapped_come_back(store, golden):
    rng = random.Random(0)
    alike = [name for name in golden if array_of(name) == "entry_bucket" and "/c/" in name]
    for one, two in itertools.combinations(sorted(golden), 2):
        if golden[one] == golden[two] or any("corpus/" in name for name in (one, two)):
            continue
        if not ({one, two} <= set(alike) or rng.random() < 0.05):
            continue
        put(store, golden | {one: golden[two], two: golden[one]})
        outcome = mended(store)
        assert outcome.withdrawn == lost_by(one, two) or is_double(one, two), (one, two)
        assert outcome.left == [], (one, two)
        if outcome.withdrawn:
            assert verify(str(store)).ok
            write_missing(store)
        assert files(store) == golden, (one, two)


def is_double(*names: str) -> bool:
    """A ledger of targets that is lost together with tokens that it would be derived from."""
    return any(name.startswith(f"{TARGETS}ledger/") for name in names) and any(
        name.startswith(("tokens/c/", "segment_ids/c/")) for name in names
    )


def test_manifests_come_back_from_their_copies_and_copies_from_manifests(store, golden):
    for name in ("zarr.json", "copies/targets/default.json", f"{TARGETS}zarr.json"):
        (store / name).write_bytes(b"{}")
        outcome = mended(store)
        assert outcome.mended == [
            f"{name}: written again from "
            + {
                "zarr.json": "copies/tokens.json",
                "copies/targets/default.json": f"{TARGETS}zarr.json",
                f"{TARGETS}zarr.json": "copies/targets/default.json",
            }[name]
        ]
        assert files(store) == golden


def test_what_else_is_wrong_is_found_by_the_copy_of_a_manifest(store, golden):
    """One repair is enough, and the plan is complete."""
    (store / "targets/default/zarr.json").unlink()
    (store / "targets/default/entry_bucket/c/1/0").unlink()
    (store / "targets/default/bucket_bits/c/0").unlink()
    (store / "targets/default/head_count/zarr.json").unlink()
    (store / "targets/default/ledger/summary.json").unlink()
    assert mended(store).withdrawn == {"default": [1]}
    assert verify(str(store)).ok
    assert write_missing(store) == [("default", 1)]
    assert files(store) == golden


def test_a_manifest_lost_with_its_copy_is_said(store):
    for name in ("zarr.json", "copies/tokens.json"):
        (store / name).unlink()
    kept = files(store)
    outcome = mended(store)
    assert outcome.left == ["zarr.json: both it and copies/tokens.json are damaged"]
    assert outcome.mended == []
    assert outcome.withdrawn == {}
    assert files(store) == kept


@pytest.mark.parametrize("table", TABLES)
def test_a_table_lost_with_its_copy_is_said_and_costs_no_shard(store, golden, table):
    key, copy = f"{TARGETS}{table}/c/0", f"copies/{TARGETS}{table}"
    (store / key).write_bytes(golden[key][:-1])
    (store / copy).unlink()
    kept = files(store)
    outcome = mended(store)
    assert outcome.left == [f"{key}: both it and {copy} are damaged"]
    assert outcome.withdrawn == {}
    assert files(store) == kept


@pytest.mark.parametrize("gone", ["zarr.json", "targets/default/vocabulary_order/c/0"])
def test_what_cannot_be_judged_is_not_given_up(store, golden, gone):
    """Records that are derived only by what is gone, also from its copy."""
    copies = {
        "zarr.json": "copies/tokens.json",
        "targets/default/vocabulary_order/c/0": "copies/targets/default/vocabulary_order",
    }
    for name in (gone, copies[gone], f"{TARGETS}entry_bucket/c/1/0"):
        (store / name).unlink()
    segment = store / TARGETS / "ledger/segment-000000.jsonl"
    segment.write_bytes(b"torn")
    kept = files(store)
    outcome = mended(store)
    assert outcome.withdrawn == {}
    assert [line.split(":")[0] for line in outcome.left] == [gone, f"{TARGETS}ledger/"]
    assert files(store) == kept
    put(store, kept | {name: golden[name] for name in (gone, copies[gone])})
    assert mended(store).withdrawn == {"default": [1]}
    write_missing(store)
    assert files(store) == golden


def test_two_sets_whose_manifests_were_swapped_come_back(store):
    small_store.write_targets(str(store), "other", seed=9)
    whole = files(store)
    one, two = f"{TARGETS}zarr.json", "targets/other/zarr.json"
    put(store, whole | {one: whole[two], two: whole[one]})
    assert mended(store).withdrawn == {}
    assert files(store) == whole
    one, two = "copies/targets/default.json", "copies/targets/other.json"
    put(store, whole | {one: whole[two], two: whole[one]})
    assert mended(store).withdrawn == {}
    assert files(store) == whole


def test_a_manifest_and_another_in_place_of_its_copy_are_told_apart_by_no_one(tmp_path):
    """Without a record nothing says which of them is right."""
    store = tmp_path / "store"
    small_store.write_tokens(str(store))
    for name, seed in (("default", 1), ("other", 2)):
        manifest = small_store.targets_manifest(seed=seed)
        writer.create_targets(str(store), name, manifest, small_store.tables())
    copies = store / "copies/targets"
    (copies / "other.json").write_bytes((copies / "default.json").read_bytes())
    kept = files(store)
    outcome = mended(store)
    assert outcome.left == [
        "targets/other/zarr.json: it and copies/targets/other.json differ, and both are whole"
    ]
    assert files(store) == kept


def test_targets_over_other_tokens_are_left_to_a_person(store, tmp_path):
    tokenizer = small_store.tokens_manifest().tokenizer.model_copy(update={"sha256": "ef" * 32})
    manifest = small_store.tokens_manifest(tokenizer=tokenizer)
    other = tmp_path / "other"
    writer.create_tokens(str(other), manifest, small_store.CORPUS)
    tokens, segments = small_store.token_rows()
    for spec in Ledger(str(other), None, manifest).pending():
        rows = slice(spec.first_row, spec.stop_row)
        writer.TokensWriter(str(other)).write(spec, tokens[rows], segments[rows])
    Ledger(str(other), None, manifest).compact()
    put(store, files(store) | files(other))
    kept = files(store)
    outcome = mended(store)
    (left,) = outcome.left
    assert left.startswith("targets/default/zarr.json: it is over tokens")
    assert outcome.withdrawn == {}
    assert files(store) == kept


def test_a_record_is_derived_from_data_that_is_whole(store, golden):
    """All records of a torn segment; the damaged shard among them is lost."""
    (store / TARGETS / "ledger/segment-000000.jsonl").write_bytes(b"torn")
    path = store / TARGETS / "head_points/c/1/0"
    path.write_bytes(path.read_bytes()[::-1])
    outcome = mended(store)
    assert outcome.withdrawn == {"default": [1]}
    assert [line for line in outcome.mended if "derived" in line] == [
        f"{TARGETS}ledger/: the record of shard {index}, derived again from its data"
        for index in (0, 2)
    ]
    assert write_missing(store) == [("default", 1)]
    assert files(store) == golden


def test_a_ledger_that_is_gone_but_for_scraps_is_derived(store, golden):
    (store / TARGETS / "ledger/segment-000000.jsonl").unlink()
    (store / TARGETS / "ledger/summary.json").write_bytes(b"?")
    assert mended(store).withdrawn == {}
    assert files(store) == golden


def test_records_that_contradict_each_other_are_derived_again(store, golden):
    """A late writer's record beside the segment, which vouches for other bytes."""
    ledger = Ledger(str(store), "default", small_store.targets_manifest())
    record = ledger.record(2)
    assert record is not None
    forged = record.model_copy(update={"tokens_sha256": "0" * 64}).sealed()
    (store / TARGETS / "ledger/00000002.json").write_bytes(record_bytes(forged))
    assert mended(store).withdrawn == {}
    assert files(store) == golden


def test_rows_that_break_a_rule_are_withdrawn(store, golden):
    """Their record and all checksums hold: only decoding tells."""
    ledger = Ledger(str(store), "default", small_store.targets_manifest())
    record = ledger.record(1)
    assert record is not None
    statistics = record.statistics.model_copy(update={"entries": 1})
    ledger.withdraw([], [record.model_copy(update={"statistics": statistics})])
    ledger.compact()
    assert mended(store).withdrawn == {"default": [1]}
    assert write_missing(store) == [("default", 1)]
    assert files(store) == golden


def test_a_stray_file_is_left(store, golden):
    put(store, golden | {"tokens/c/9/0": b"?"})
    outcome = mended(store)
    (left,) = outcome.left
    assert left == (
        "tokens/c/9/0: no manifest or ledger record knows this file; delete it if it is no use"
    )
    assert files(store) == golden | {"tokens/c/9/0": b"?"}


def test_lost_tokens_do_not_cost_the_targets(store, golden):
    (store / "tokens/c/0/0").write_bytes(b"")
    assert mended(store).withdrawn == {None: [0]}
    assert write_missing(store) == [(None, 0)]
    assert files(store) == golden


def test_an_unfinished_store_is_repaired_and_then_finished(store, golden):
    ledger = Ledger(str(store), "default", small_store.targets_manifest())
    ledger.withdraw([1])
    (store / TARGETS / "ledger/00000002.json").write_bytes(b"junk")
    outcome = mended(store)
    assert outcome.withdrawn == {}
    assert verify(str(store)).missing_shards == 1
    assert write_missing(store) == [("default", 1)]
    assert files(store) == golden


def test_a_whole_store_is_left_as_it_is(store, golden):
    report, outcome = repair.repair(str(store), apply=True)
    assert report.ok
    assert outcome == Outcome()
    assert verify(str(store)).ok
    assert write_missing(store) == []
    assert files(store) == golden


def test_progress_is_told(store):
    seen = []
    repair.repair(str(store), apply=False, progress=lambda done, note: seen.append(done))
    assert seen == [1, 2, 3, 4, 5, 6]


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(StoreNotFoundError, match="there is nothing at"):
        repair.repair(str(tmp_path / "nothing"), apply=True)


class Cut:
    """A key-value store that fails at the n-th write or delete of the process."""

    def __init__(self, store, budget: list[int]):
        self._store, self._budget = store, budget

    def write(self, *arguments, **keywords):
        if self._budget[0] <= 0:
            raise StorageError("cut")
        self._budget[0] -= 1
        return self._store.write(*arguments, **keywords)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_a_repair_cut_anywhere_is_repaired_by_the_next(store, golden, monkeypatch):
    """It never costs more than was lost, and never leaves damage that the next does not see."""
    broken = {
        "targets/zarr.json": b"",
        "copies/tokens.json": b"{}",
        f"{TARGETS}ledger/segment-000000.jsonl": b"torn",
        f"{TARGETS}entry_bucket/c/2/0": golden[f"{TARGETS}entry_bucket/c/0/0"],
        "segment_ids/c/1/0": b"",
    }
    opened, budget = storage.open_kvstore, [10**9]
    monkeypatch.setattr(storage, "open_kvstore", lambda *a: Cut(opened(*a), budget))
    for count in range(60):
        put(store, golden | broken)
        budget[0] = count
        try:
            repair.repair(str(store), apply=True)
            is_done = True
        except StorageError:
            is_done = False
        budget[0] = 10**9
        lost = {(name, i) for name, shards in lost_now(store).items() for i in shards}
        # Shard 2 of the targets lost its record too, and its bytes are another shard's.
        assert lost <= {(None, 1), ("default", 1), ("default", 2)}, count
        repair.repair(str(store), apply=True)
        assert verify(str(store)).ok
        write_missing(store)
        assert files(store) == golden, count
        if is_done:
            break
    assert is_done
    assert count > 15


def lost_now(store: Path) -> dict[str | None, list[int]]:
    """The shards that a repair would give up, and those that are not committed."""
    _, outcome = repair.repair(str(store), apply=False)
    lost = {name: set(shards) for name, shards in outcome.withdrawn.items()}
    for name, manifest in (
        (None, small_store.tokens_manifest()),
        ("default", small_store.targets_manifest()),
    ):
        mask = {spec.index for spec in Ledger(str(store), name, manifest).pending()}
        lost.setdefault(name, set()).update(mask)
    return {name: sorted(shards) for name, shards in lost.items()}
