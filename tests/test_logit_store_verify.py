"""Verification finds any flipped, cut, missing or extra byte, and says where."""

import random
from pathlib import Path

import pytest
import small_store

from logit_store import ledger, writer
from logit_store.verify import verify
from schemas.errors import StoreNotFoundError


@pytest.fixture
def store(tmp_path) -> Path:
    small_store.write_store(str(tmp_path / "store"))
    return tmp_path / "store"


def all_files(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def shard_of(path: Path) -> int | None:
    if path.parent.name == "ledger":
        return int(path.stem)
    return int(path.parent.name) if path.parent.parent.name == "c" else None


def assert_found(store: Path, path: Path) -> None:
    report = verify(str(store))
    name = str(path.relative_to(store))
    found = [problem for problem in report.problems if problem.file == name]
    assert found, f"{name}: {report.problems}"
    assert found[0].shard == shard_of(path)


def test_a_whole_store_is_whole(store):
    seen = []
    report = verify(str(store), progress=lambda done, note: seen.append(done))
    assert report.ok, report.problems
    assert report.shards == 6 == seen[-1]
    assert report.bytes == sum(path.stat().st_size for path in all_files(store)) - sum(
        path.stat().st_size for path in all_files(store) if path.parent.name == "ledger"
    )


def test_any_flipped_bit_of_any_file_is_found(store):
    rng = random.Random(0)
    for path in all_files(store):
        raw = path.read_bytes()
        for offset in {0, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(3))}:
            flipped = bytearray(raw)
            flipped[offset] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            assert_found(store, path)
        path.write_bytes(raw)
    assert verify(str(store)).ok


@pytest.mark.parametrize("name", ["zarr.json", "targets/default/zarr.json"])
def test_any_flipped_bit_of_a_manifest_is_found_before_there_are_shards(tmp_path, name):
    """Every byte: also of the seed, which nothing but the manifest knows, and of the software."""
    store = tmp_path / "store"
    writer.create_tokens(str(store), small_store.tokens_manifest())
    writer.create_targets(str(store), "default", small_store.targets_manifest())
    raw = (store / name).read_bytes()
    assert verify(str(store)).ok
    rng = random.Random(0)
    for offset in range(len(raw)):
        flipped = bytearray(raw)
        flipped[offset] ^= 1 << rng.randrange(8)
        (store / name).write_bytes(flipped)
        found = {problem.file for problem in verify(str(store)).problems}
        assert name in found, bytes(flipped)


def test_a_record_whose_sums_are_not_its_rows_is_found(store):
    record = ledger.read_record(str(store), "default", 1)
    assert record is not None
    statistics = record.statistics.model_copy(update={"entries": record.statistics.entries + 1})
    forged = record.model_copy(update={"statistics": statistics}).sealed()
    (store / "targets/default/ledger/00000001.json").write_bytes(ledger.record_bytes(forged))
    (problem,) = verify(str(store)).problems
    assert problem.shard == 1
    assert "the record's entries is" in problem.what


def test_rows_that_break_a_rule_are_found_though_every_checksum_holds(tmp_path, monkeypatch):
    store = tmp_path / "store"
    small_store.write_tokens(str(store))
    rows, _ = small_store.target_rows()
    rows.label_logprob[3, 2] = 1
    monkeypatch.setattr(small_store, "target_rows", lambda: (rows, {}))
    monkeypatch.setattr(writer, "check_targets", lambda *_: None)
    small_store.write_targets(str(store))
    (problem,) = verify(str(store)).problems
    assert problem.shard == 1
    assert "not positive, but row 3" in problem.what


@pytest.mark.parametrize("damage", ["cut", "lengthen", "empty"])
def test_any_change_of_length_is_found(store, damage):
    change = {"cut": lambda b: b[:-1], "lengthen": lambda b: b + b"\0", "empty": lambda b: b""}
    for path in all_files(store):
        raw = path.read_bytes()
        path.write_bytes(change[damage](raw))
        assert_found(store, path)
        path.write_bytes(raw)


def test_any_missing_file_is_found(store):
    for path in all_files(store):
        raw = path.read_bytes()
        path.unlink()
        if path.parent == store / "ledger":
            # Tokens that are not committed, under targets that are.
            assert not verify(str(store)).ok
        elif path.parent.name == "ledger":
            # Without its record a shard was never committed, which is no damage but is counted.
            report = verify(str(store))
            assert report.missing_shards == 1
            assert report.ok
        elif path == store / "targets/default/zarr.json":
            # Without its manifest the set does not exist: its files are then strangers.
            assert not verify(str(store)).ok
        else:
            assert_found(store, path)
        path.write_bytes(raw)
    assert verify(str(store)).ok


@pytest.mark.parametrize(
    "name", ["stray", "tokens/c/9/0", "tokens/c/0/1", "targets/default/ledger/00000007.json"]
)
def test_any_extra_file_is_found(store, name):
    path = store / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"?")
    problems = verify(str(store)).problems
    assert [problem.file for problem in problems] == [name]


def test_shards_that_were_swapped_are_found(store):
    """Whole files with good checksums, in each other's place."""
    first, second = (store / f"targets/default/entry_weight/c/{i}/0" for i in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert {problem.shard for problem in verify(str(store)).problems} == {0, 1}


def test_targets_beside_other_tokens_are_found(store, tmp_path, monkeypatch):
    """A tokens shard that was replaced together with its ledger record."""
    tokens, segments = small_store.token_rows()
    tokens[0, 0] += 1
    monkeypatch.setattr(small_store, "token_rows", lambda: (tokens, segments))
    small_store.write_tokens(str(tmp_path / "other"))
    for name in ("tokens/c/0/0", "ledger/00000000.json"):
        (store / name).write_bytes((tmp_path / "other" / name).read_bytes())
    problems = verify(str(store)).problems
    assert len(problems) == 1
    assert problems[0].shard == 0
    assert "not those that the shard was computed from" in problems[0].what


def test_what_a_killed_writer_left_is_no_damage(store):
    (store / "targets/default/ledger/00000002.json").unlink()
    (store / "targets/default/entry_id/c/2/0.__lock").write_bytes(b"")
    report = verify(str(store))
    assert report.ok
    assert report.missing_shards == 1


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(StoreNotFoundError, match="there is nothing at"):
        verify(str(tmp_path / "nothing"))
