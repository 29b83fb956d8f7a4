"""Verification finds any flipped, cut, missing, swapped or extra byte, and says where."""

import itertools
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_store
import tensorstore as ts

from logit_store import layout, storage, writer
from logit_store import verify as verifier
from logit_store.ledger import Ledger, record_bytes, summary_bytes
from logit_store.verify import Problem, verify
from schemas.errors import StoreNotFoundError
from schemas.manifest import LedgerRecord

TARGETS = "targets/default/"


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory) -> Path:
    """Written once, for `store` to copy; no test has it itself."""
    store = tmp_path_factory.mktemp("whole") / "store"
    small_store.write_store(str(store))
    return store


@pytest.fixture
def store(tmp_path, whole_store) -> Path:
    return Path(shutil.copytree(whole_store, tmp_path / "store"))


def all_files(store: Path) -> dict[str, Path]:
    found = {str(path.relative_to(store)): path for path in store.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))


def named(store: Path) -> set[str]:
    return {problem.file for problem in verify(str(store)).problems}


def expected_kind(name: str) -> str:
    if name.startswith("copies/"):
        return "manifest" if name.endswith(".json") else "table"
    if "ledger/" in name:
        return "ledger"
    if name in ("zarr.json", "targets/zarr.json", f"{TARGETS}zarr.json"):
        return "manifest"
    if name.endswith((".json", "zarr.json")):
        return "metadata"
    return "data" if name.count("/c/") and "/0" in name.split("/c/")[1] else "table"


def assert_found(store: Path, name: str) -> None:
    """The damaged file is named, as what it is, with its set of targets and its shard."""
    problems = verify(str(store)).problems
    found = [problem for problem in problems if problem.file == name]
    assert found, f"{name}: {problems}"
    kind = expected_kind(name)
    assert {problem.kind for problem in found} == {kind}
    of_targets = name.startswith((TARGETS, "copies/targets/"))
    assert {problem.targets for problem in found} == {"default" if of_targets else None}
    if kind == "data":
        assert [problem.shard for problem in found] == [int(name.split("/c/")[1].split("/")[0])]
    elif kind != "ledger":
        assert {problem.shard for problem in found} == {None}
    # Nothing else is blamed: of sound neighbours nothing is lost.
    assert {problem.file for problem in problems} == {name}


def test_a_whole_store_is_whole(store):
    seen = []
    report = verify(str(store), progress=lambda done, note: seen.append(done))
    assert report.ok, report.problems
    assert report.shards == 6 == seen[-1]
    files = all_files(store)
    # Of ledgers the summaries are counted; segments are their records.
    counted = {name for name in files if "segment-" not in name}
    assert report.files == len(counted)
    assert report.bytes == sum(
        files[name].stat().st_size for name in counted if "summary" not in name
    )


def test_any_flipped_bit_of_any_file_is_found(store):
    rng = random.Random(0)
    for name, path in all_files(store).items():
        raw = path.read_bytes()
        for offset in {0, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(3))}:
            flipped = bytearray(raw)
            flipped[offset] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            assert_found(store, name)
        path.write_bytes(raw)
    assert verify(str(store)).ok


@pytest.mark.parametrize("name", ["zarr.json", "targets/default/zarr.json"])
def test_any_flipped_bit_of_a_manifest_is_found_before_there_are_shards(tmp_path, name):
    """Anywhere: also in the seed, which nothing but the manifest knows, and of the software."""
    store = tmp_path / "store"
    writer.create_tokens(str(store), small_store.tokens_manifest(), small_store.CORPUS)
    writer.create_targets(
        str(store), "default", small_store.targets_manifest(), small_store.tables()
    )
    raw = (store / name).read_bytes()
    assert verify(str(store)).ok
    rng = random.Random(0)
    for offset in range(0, len(raw), 5):
        flipped = bytearray(raw)
        flipped[offset] ^= 1 << rng.randrange(8)
        (store / name).write_bytes(flipped)
        assert name in named(store), bytes(flipped)


@pytest.mark.parametrize("name", ["ledger/segment-000000.jsonl", "ledger/summary.json"])
def test_any_flipped_bit_of_a_ledger_is_found(store, name):
    path = store / TARGETS / name
    raw = path.read_bytes()
    rng = random.Random(0)
    for offset in range(0, len(raw), 23):
        flipped = bytearray(raw)
        flipped[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert_found(store, TARGETS + name)


@pytest.mark.parametrize("damage", ["cut", "lengthen", "empty"])
def test_any_change_of_length_is_found(store, damage):
    change = {"cut": lambda b: b[:-1], "lengthen": lambda b: b + b"\0", "empty": lambda b: b""}
    for name, path in all_files(store).items():
        raw = path.read_bytes()
        path.write_bytes(change[damage](raw))
        assert_found(store, name)
        path.write_bytes(raw)


def test_any_missing_file_is_found(store):
    """Also of the ledger, once the summary says that every shard was there."""
    for name, path in all_files(store).items():
        raw = path.read_bytes()
        path.unlink()
        assert_found(store, name)
        path.write_bytes(raw)
    assert verify(str(store)).ok


def test_any_two_files_that_were_swapped_are_found(store):
    """Whole files with good checksums, in each other's place."""
    files = all_files(store)
    rng = random.Random(0)
    shards = [name for name in files if "/c/0" in name or "/c/1" in name]
    pairs = [
        pair
        for pair in itertools.combinations(files, 2)
        if files[pair[0]].read_bytes() != files[pair[1]].read_bytes()
        and (set(pair) <= set(shards) or rng.random() < 0.06)
    ]
    for one, two in pairs:
        raw, other = files[one].read_bytes(), files[two].read_bytes()
        files[one].write_bytes(other)
        files[two].write_bytes(raw)
        assert {one, two} <= named(store), (one, two)
        files[one].write_bytes(raw)
        files[two].write_bytes(other)


@pytest.mark.parametrize(
    "name",
    [
        "stray",
        "tokens/c/9/0",
        "tokens/c/0/1",
        "targets/default/ledger/00000007.json",
        "targets/default/ledger/000000001.json",
        "targets/default/ledger/segment-000001.jsonl",
        "targets/default/ledger/segment-0000000.jsonl",
        "corpus/aa.json",
        "copies/targets/default/entry_bucket",
    ],
)
def test_any_extra_file_is_found(store, name):
    path = store / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"?")
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.file) == ("stray", name)
    # Nor is it taken for what it is called.
    assert Ledger(str(store), "default", small_store.targets_manifest()).compact() == 3


def test_a_manifest_damaged_together_with_its_copy_is_found_with_it(store):
    for name in ("zarr.json", "copies/tokens.json"):
        (store / name).write_bytes(b"{}")
    problems = verify(str(store)).problems
    assert {(p.kind, p.file) for p in problems} == {
        ("manifest", "zarr.json"),
        ("manifest", "copies/tokens.json"),
    }


def test_damage_around_a_shard_is_not_blamed_on_it(store):
    """Bytes that are as recorded are not lost, whatever happened to what they are read by."""
    for name in ("zarr.json", "tokens/c/1/0", f"{TARGETS}bucket_bits/c/0", "tokens/zarr.json"):
        raw = (store / name).read_bytes()
        (store / name).write_bytes(b"?")
        # And real damage is found beside it.
        other = store / TARGETS / "teacher_nats/c/2/0/0"
        kept = other.read_bytes()
        other.write_bytes(kept[::-1])
        assert named(store) == {name, f"{TARGETS}teacher_nats/c/2/0/0"}
        other.write_bytes(kept)
        (store / name).write_bytes(raw)


def write_segment(store: Path, records: list[LedgerRecord]) -> None:
    """A ledger that holds these records, and sums them up as the driver would."""
    folder = store / TARGETS / "ledger"
    lines = b"".join(record_bytes(record) for record in records)
    (folder / "segment-000000.jsonl").write_bytes(lines)
    summary = Ledger(str(store), "default", small_store.targets_manifest()).sum_up()
    (folder / "summary.json").write_bytes(summary_bytes(summary))


def records(store: Path) -> list[LedgerRecord]:
    return list(Ledger(str(store), "default", small_store.targets_manifest()).records())


def test_a_record_whose_sums_are_not_its_rows_is_found(store):
    whole = records(store)
    statistics = whole[1].statistics
    forged = statistics.model_copy(update={"entries": statistics.entries + 1})
    whole[1] = whole[1].model_copy(update={"statistics": forged}).sealed()
    write_segment(store, whole)
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.targets, problem.shard) == ("data", "default", 1)
    assert f"record's entries is {forged.entries} but the rows give" in problem.what


def test_sums_may_differ_in_their_last_bits(store):
    """Another machine adds in another order."""
    whole = records(store)
    statistics = whole[1].statistics
    sums = {"mass_sum": statistics.mass_sum * (1 + 1e-12)}
    whole[1] = whole[1].model_copy(update={"statistics": statistics.model_copy(update=sums)})
    write_segment(store, [record.sealed() for record in whole])
    assert verify(str(store)).ok


def test_a_summary_that_is_not_the_sum_of_the_records_is_found(store):
    tokens = Ledger(str(store), "default", small_store.targets_manifest())
    summary = tokens.summary()
    assert summary is not None
    forged = summary.model_copy(update={"record_bytes": summary.record_bytes + 1}).sealed()
    path = store / TARGETS / "ledger/summary.json"
    path.write_bytes(summary_bytes(forged))
    (problem,) = verify(str(store)).problems
    assert problem == Problem("ledger", f"{TARGETS}ledger/summary.json", problem.what, "default")
    assert problem.what == "it is not the sum of the records"


def test_a_record_of_other_rows_or_another_manifest_is_found(store):
    whole = records(store)
    spec = whole[2].spec.model_copy(update={"stop_row": 6})
    whole[2] = whole[2].model_copy(update={"spec": spec}).sealed()
    spec = whole[0].spec.model_copy(update={"manifest_fingerprint": "0" * 64})
    whole[0] = whole[0].model_copy(update={"spec": spec}).sealed()
    write_segment(store, whole)
    problems = verify(str(store)).problems
    assert [(p.kind, p.shard) for p in problems] == [("ledger", 0), ("ledger", 2)]
    assert all("under another manifest or for other rows" in p.what for p in problems)


def test_a_record_that_names_other_files_is_found(store):
    whole = records(store)
    whole[0] = whole[0].model_copy(update={"files": whole[0].files[1:]}).sealed()
    write_segment(store, whole)
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.shard) == ("ledger", 0)
    assert problem.file == f"{TARGETS}head_count/c/0/0"


def test_rows_that_break_a_rule_are_found_though_every_checksum_holds(tmp_path, monkeypatch):
    small_store.write_store(str(tmp_path / "sound"))
    sums = iter([record.statistics for record in records(tmp_path / "sound")])
    store = tmp_path / "store"
    small_store.write_tokens(str(store))
    rows = small_store.target_rows()
    rows.teacher_nats[3, 1, 15] = 1
    monkeypatch.setattr(small_store, "target_rows", lambda: rows)
    monkeypatch.setattr(writer, "check_targets", lambda *_: next(sums))
    small_store.write_targets(str(store))
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.shard) == ("data", 1)
    assert "are 0 where the next token is not of the same document, but row 3" in problem.what


def test_rows_are_checked_however_many_are_decoded_at_once(store, monkeypatch):
    monkeypatch.setattr(verifier, "_ROWS_AT_ONCE", 1)
    assert verify(str(store)).ok
    whole = records(store)
    statistics = whole[1].statistics
    forged = statistics.model_copy(update={"max_entries": statistics.max_entries + 1})
    whole[1] = whole[1].model_copy(update={"statistics": forged}).sealed()
    write_segment(store, whole)
    assert [p.shard for p in verify(str(store)).problems] == [1]


def test_tokens_exchanged_with_their_record_are_found_by_the_targets(store, tmp_path, monkeypatch):
    tokens, segments = small_store.token_rows()
    tokens[0, 0] += 1
    monkeypatch.setattr(small_store, "token_rows", lambda: (tokens, segments))
    small_store.write_tokens(str(tmp_path / "other"))
    for name in (
        "tokens/c/0/0",
        "segment_ids/c/0/0",
        "ledger/segment-000000.jsonl",
        "ledger/summary.json",
    ):
        (store / name).write_bytes((tmp_path / "other" / name).read_bytes())
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.targets, problem.shard) == ("data", "default", 0)
    assert "a file of targets/default/head_count" in problem.what
    assert "is another's, or is of other tokens" in problem.what


def test_a_record_of_other_tokens_is_found(store):
    whole = records(store)
    whole[1] = whole[1].model_copy(update={"tokens_sha256": whole[0].tokens_sha256}).sealed()
    write_segment(store, whole)
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.targets, problem.shard) == ("data", "default", 1)
    assert "not those that the shard was computed from" in problem.what


def test_targets_over_other_tokens_are_found(store, tmp_path):
    """A tokens group that is whole in itself, and of another tokenizer."""
    tokenizer = small_store.tokens_manifest().tokenizer.model_copy(update={"sha256": "ef" * 32})
    manifest = small_store.tokens_manifest(tokenizer=tokenizer)
    other = str(tmp_path / "other")
    writer.create_tokens(other, manifest, small_store.CORPUS)
    tokens, segments = small_store.token_rows()
    for spec in Ledger(other, None, manifest).pending():
        rows = slice(spec.first_row, spec.stop_row)
        writer.TokensWriter(other).write(spec, tokens[rows], segments[rows])
    Ledger(other, None, manifest).compact()
    for name, path in all_files(tmp_path / "other").items():
        (store / name).write_bytes(path.read_bytes())
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.file) == ("manifest", f"{TARGETS}zarr.json")
    assert "which are not the store's" in problem.what


def test_a_record_beside_its_segment_must_say_the_same(store):
    """As a writer leaves it that came late."""
    whole = records(store)
    path = store / TARGETS / "ledger/00000001.json"
    path.write_bytes(record_bytes(whole[1]))
    assert verify(str(store)).ok
    files = tuple(file.model_copy(update={"size_bytes": 1}) for file in whole[1].files)
    path.write_bytes(record_bytes(whole[1].model_copy(update={"files": files}).sealed()))
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.file, problem.shard) == (
        "ledger",
        f"{TARGETS}ledger/00000001.json",
        1,
    )
    path.write_bytes(b"junk")
    assert named(store) == {f"{TARGETS}ledger/00000001.json"}


def test_what_a_killed_writer_left_is_no_damage(store):
    Ledger(str(store), "default", small_store.targets_manifest()).withdraw([2])
    (store / f"{TARGETS}entry_bucket/c/2/0.__lock").write_bytes(b"half")
    (store / f"{TARGETS}entry_bucket/c/2/0").write_bytes(b"half")
    report = verify(str(store))
    assert report.ok, report.problems
    assert (report.shards, report.missing_shards) == (5, 1)


def test_targets_whose_tokens_are_not_committed_are_held_against_their_records(store):
    """As after a repair that took lost tokens back."""
    Ledger(str(store), None, small_store.tokens_manifest()).withdraw([0])
    report = verify(str(store))
    assert report.ok, report.problems
    assert report.missing_shards == 1
    path = store / TARGETS / "entry_bucket/c/0/0"
    path.write_bytes(path.read_bytes()[::-1])
    assert named(store) == {f"{TARGETS}entry_bucket/c/0/0"}


def test_several_sets_are_checked_each_by_its_own_manifest(store):
    small_store.write_targets(str(store), "other", seed=9)
    assert verify(str(store)).ok
    (store / "targets/other/entry_bucket/c/0/0").write_bytes(b"")
    (problem,) = verify(str(store)).problems
    assert (problem.targets, problem.shard) == ("other", 0)
    one, two = (store / f"targets/{name}/zarr.json" for name in ("default", "other"))
    raw, other = one.read_bytes(), two.read_bytes()
    one.write_bytes(other)
    two.write_bytes(raw)
    # The ledgers say which of the two is in its place.
    assert named(store) == {
        "targets/default/zarr.json",
        "targets/other/zarr.json",
        "targets/other/entry_bucket/c/0/0",
    }


def test_tables_are_the_manifests_and_not_only_whole(store, tmp_path):
    tables = small_store.tables()
    other = str(tmp_path / "other")
    small_store.write_tokens(other)
    swapped = replace(tables, sampling_order=tables.sampling_order[::-1].copy())
    manifest = small_store.targets_manifest(vocabulary=swapped.info())
    writer.create_targets(other, "default", manifest, swapped)
    name = f"{TARGETS}sampling_order/c/0"
    (store / name).write_bytes((Path(other) / name).read_bytes())
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.file) == ("table", name)
    assert problem.what == "its values are not the manifest's"


def test_tables_that_do_not_fit_each_other_are_found(tmp_path):
    """They are the manifest's, and a reader refuses them."""
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    tables = small_store.tables()
    vocabulary = replace(tables.vocabulary, bucket_bits=tables.vocabulary.bucket_bits[:-1])
    tables = writer.Tables(vocabulary, tables.sampling_order)
    manifest = small_store.targets_manifest(vocabulary=tables.info())
    writer.create_targets(url, "default", manifest, tables)
    (problem,) = verify(url).problems
    assert (problem.kind, problem.file) == ("manifest", f"{TARGETS}zarr.json")
    assert "the buckets do not hold as many ids" in problem.what


def test_a_copy_of_a_table_in_other_bytes_is_found(store):
    """Of equal values: they would be the manifest's, and not what the writer wrote."""
    spec = layout.table_arrays(small_store.targets_manifest())["bucket_bits"]
    metadata = spec.metadata()
    metadata["codecs"][1]["configuration"]["clevel"] = 1
    metadata["codecs"][1]["configuration"]["cname"] = "lz4"
    other = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{store}/other/"},
        "metadata": metadata,
    }
    bits = small_store.tables().vocabulary.bucket_bits
    ts.open(other, create=True).result().write(bits).result()
    raw = (store / "other/c/0").read_bytes()
    for name in ("other/c/0", "other/zarr.json"):
        (store / name).unlink()
    copy = store / "copies/targets/default/bucket_bits"
    assert raw != copy.read_bytes()
    copy.write_bytes(raw)
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.file) == ("table", "copies/targets/default/bucket_bits")
    assert problem.what == f"its bytes are not those of {TARGETS}bucket_bits/c/0"


def test_records_are_missed_though_the_summary_cannot_be_read(store):
    """It was only written when every shard was committed, whatever it said."""
    (store / TARGETS / "ledger/segment-000000.jsonl").unlink()
    (store / TARGETS / "ledger/summary.json").write_bytes(b"?")
    report = verify(str(store))
    assert report.missing_shards == 0
    assert [p.shard for p in report.problems] == [None, 0, 1, 2]


def test_targets_are_not_held_against_tokens_that_are_wrong_themselves(store, tmp_path):
    """Other tokens, with a record that vouches for their bytes but not for their sums."""
    tokens, segments = small_store.token_rows()
    tokens[0, 0] += 1
    other = str(tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_store, "token_rows", lambda: (tokens, segments))
        small_store.write_tokens(other)
    ledger = Ledger(other, None, small_store.tokens_manifest())
    record = ledger.record(0)
    assert record is not None
    sums = record.statistics.model_copy(update={"tokens": 1})
    ledger.withdraw([], [record.model_copy(update={"statistics": sums})])
    ledger.compact()
    for name in ("tokens/c/0/0", "ledger/segment-000000.jsonl", "ledger/summary.json"):
        (store / name).write_bytes((Path(other) / name).read_bytes())
    (problem,) = verify(str(store)).problems
    assert (problem.kind, problem.targets, problem.shard) == ("data", None, 0)


def test_problems_are_told_with_their_place():
    assert str(Problem("data", "a/b", "is cut", "default", 3)) == "shard 3: a/b: is cut"
    assert str(Problem("manifest", "a/b", "is cut")) == "a/b: is cut"


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(StoreNotFoundError, match="there is nothing at"):
        verify(str(tmp_path / "nothing"))


def test_zeros_are_values_like_any_other(tmp_path):
    """A shard of padding alone verifies, and its loss is found."""
    store = tmp_path / "store"
    manifest = small_store.tokens_manifest()
    writer.create_tokens(str(store), manifest, small_store.CORPUS)
    zeros = np.zeros((2, small_store.LENGTH), np.int32)
    spec = Ledger(str(store), None, manifest).pending()[0]
    writer.TokensWriter(str(store)).write(spec, zeros, zeros.astype(np.uint16))
    assert verify(str(store)).ok
    storage.open_kvstore(str(store)).write("tokens/c/0/0", None).result()
    assert named(store) == {"tokens/c/0/0"}
