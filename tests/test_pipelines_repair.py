"""`retort repair` and `retort verify` on damaged stores, as a person runs them."""

import json
from pathlib import Path

import pytest
import small_store

from logit_store import manifests
from logit_store.inspect import terminal
from logit_store.ledger import Ledger
from pipelines import cli

TARGETS = "targets/default/"


@pytest.fixture
def store(tmp_path) -> Path:
    small_store.write_store(str(tmp_path / "store"))
    return tmp_path / "store"


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments: object) -> tuple[int, dict]:
    status, out, _ = run(capsys, *arguments, "--json")
    return status, json.loads(out)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("apply", [[], ["--apply"]])
def test_a_whole_store_is_left_as_it_is(capsys, store, apply):
    before = files(store)
    status, out, err = run(capsys, "repair", store, *apply)
    assert status == 0
    assert out.startswith(f"{store}: intact (6 shards")
    assert out.count("\n") == 1
    assert "verify: 6 shards" in err
    assert files(store) == before
    status, data = run_json(capsys, "repair", store, *apply)
    assert (status, data["ok"], data["applied"]) == (0, True, False)
    for key in ("problems", "mended", "write_again", "left", "remaining"):
        assert data[key] == []


def test_without_apply_it_is_only_said(capsys, store):
    flip(store / "copies/tokens.json")
    flip(store / TARGETS / "entry_bucket/c/1/0")
    before = files(store)
    status, out, _ = run(capsys, "repair", store)
    assert status == 1
    assert "2 problems" in out
    assert f"shard 1: {TARGETS}entry_bucket/c/1/0: its bytes differ from their SHA-256" in out
    assert "would be mended\n  copies/tokens.json: written again from zarr.json\n" in out
    command = f"retort repair {store} --apply --teacher …"
    title = "would be given up, and then be written again"
    assert f"\n{title}\n  targets 'default', shard 1: {command}\n" in out
    assert out.endswith("nothing was changed; --apply does it\n")
    assert files(store) == before
    status, data = run_json(capsys, "repair", store)
    assert (status, data["ok"], data["applied"]) == (1, False, False)
    assert data["mended"] == ["copies/tokens.json: written again from zarr.json"]
    assert data["write_again"] == [{"targets": "default", "shards": [1], "command": command}]
    assert [problem["file"] for problem in data["problems"]] == [
        "copies/tokens.json",
        f"{TARGETS}entry_bucket/c/1/0",
    ]
    assert data["remaining"] == data["problems"]
    assert files(store) == before


def test_apply_mends_what_nothing_was_lost_of(capsys, store):
    before = files(store)
    flip(store / "zarr.json")
    flip(store / TARGETS / "vocabulary_order/c/0")
    (store / TARGETS / "ledger/segment-000000.jsonl").write_bytes(b"torn")
    (store / "tokens/zarr.json").unlink()
    status, out, err = run(capsys, "repair", store, "--apply")
    assert status == 0
    assert "\nmended\n  zarr.json: written again from copies/tokens.json\n" in out
    assert f"  {TARGETS}ledger/: the record of shard 2, derived again from its data\n" in out
    assert out.endswith("whole again\n")
    assert "verify again: 6 shards" in err
    assert files(store) == before
    assert run(capsys, "verify", store)[0] == 0


def test_lost_shards_are_named_with_what_writes_them_again(capsys, store):
    before = files(store)
    for name in ("tokens/c/0/0", "tokens/c/1/0", f"{TARGETS}head_count/c/2/0"):
        (store / name).unlink()
    status, data = run_json(capsys, "repair", store, "--apply")
    assert (status, data["ok"], data["applied"]) == (1, False, True)
    assert data["write_again"] == [
        {"targets": None, "shards": [0, 1], "command": f"retort tokenize --store {store} …"},
        {
            "targets": "default",
            "shards": [2],
            "command": f"retort repair {store} --apply --teacher …",
        },
    ]
    assert (data["missing_shards"], data["remaining"], data["left"]) == (3, [], [])
    for name, shards in ((None, [0, 1]), ("default", [2])):
        ledger = Ledger(str(store), name, manifests.read_manifest(str(store), name))
        assert [spec.index for spec in ledger.pending()] == shards
    small_store.write_store(str(store))
    assert files(store) == before
    assert run(capsys, "repair", store)[0] == 0


def test_the_view_names_lost_shards(capsys, store):
    for index in range(2):
        (store / f"tokens/c/{index}/0").write_bytes(b"")
    status, out, _ = run(capsys, "repair", store, "--apply")
    assert status == 1
    assert "\nlost, to be written again\n" in out
    assert f"  tokens, shards 0-1: retort tokenize --store {store} …\n" in out
    assert "whole again" not in out
    assert "still damaged" not in out


def test_what_only_a_person_can_decide_is_left(capsys, store):
    (store / "stray").write_bytes(b"?")
    flip(store / "copies/tokens.json")
    status, out, _ = run(capsys, "repair", store, "--apply")
    assert status == 1
    left = "stray: no manifest or ledger record knows this file; delete it if it is no use"
    assert out.endswith(f"\nleft to you\n  {left}\n")
    status, data = run_json(capsys, "repair", store, "--apply")
    assert (status, data["left"]) == (1, [left])
    assert [problem["file"] for problem in data["remaining"]] == ["stray"]
    (store / "stray").unlink()
    assert run(capsys, "repair", store)[0] == 0


def test_a_manifest_lost_with_its_copy_is_left(capsys, store):
    for name in ("zarr.json", "copies/tokens.json"):
        (store / name).unlink()
    before = files(store)
    for flags in ([], ["--apply"]):
        status, out, _ = run(capsys, "repair", store, *flags)
        assert status == 1
        assert "  zarr.json: both it and copies/tokens.json are damaged\n" in out
        assert files(store) == before


def test_runs_of_shards_are_ranges():
    assert terminal._shards([4]) == "shard 4"
    assert terminal._shards([0, 1, 2, 5, 7, 8]) == "shards 0-2, 5, 7-8"


def test_a_command_can_be_pasted(capsys, tmp_path):
    url = tmp_path / "my store"
    small_store.write_store(str(url))
    (url / "tokens/c/0/0").unlink()
    _, data = run_json(capsys, "repair", url)
    assert data["write_again"][0]["command"] == f"retort tokenize --store '{url}' …"


@pytest.mark.parametrize("how", ["flipped", "torn", "gone", "of another version"])
@pytest.mark.parametrize(
    "name",
    ["zarr.json", f"{TARGETS}zarr.json", "copies/tokens.json", "copies/targets/default.json"],
)
def test_verify_and_repair_work_on_a_damaged_manifest(capsys, store, name, how):
    before = files(store)
    path = store / name
    if how == "flipped":
        flip(path)
    elif how == "torn":
        path.write_bytes(path.read_bytes()[:50])
    elif how == "gone":
        path.unlink()
    else:
        version = f'"format_version": {small_store.tokens_manifest().format_version}'.encode()
        assert path.read_bytes().count(version) == 1
        path.write_bytes(path.read_bytes().replace(version, version + b"9"))
    status, out, _ = run(capsys, "verify", store)
    assert status == 1
    assert f"\n  {name}: " in out
    assert "1 problem (6 shards" in out
    assert run(capsys, "repair", store, "--apply")[0] == 0
    assert files(store) == before


@pytest.mark.parametrize(
    ("name", "copy"),
    [("zarr.json", "copies/tokens.json"), (f"{TARGETS}zarr.json", "copies/targets/default.json")],
)
@pytest.mark.parametrize("raw", [b"{", None])
def test_verify_works_where_a_manifest_is_lost_for_good(capsys, store, name, copy, raw):
    for file in (store / name, store / copy):
        file.unlink()
        if raw is not None:
            file.write_bytes(raw)
    status, data = run_json(capsys, "verify", store)
    assert status == 1
    assert {name, copy} <= {problem["file"] for problem in data["problems"]}


def test_a_store_of_another_version_is_refused_and_not_taken_for_damaged(capsys, store):
    version = small_store.tokens_manifest().format_version
    for name in ("zarr.json", "copies/tokens.json"):
        text = (store / name).read_text()
        other = f'"format_version": {version + 1}'
        (store / name).write_text(text.replace(f'"format_version": {version}', other))
    before = files(store)
    for arguments in (["verify"], ["repair", "--apply"]):
        status, out, err = run(capsys, *arguments, store)
        assert (status, out) == (2, "")
        assert f"is of version {version + 1}" in err
    assert files(store) == before


@pytest.mark.parametrize("verb", ["verify", "repair"])
def test_nothing_there_is_an_error(capsys, tmp_path, verb):
    status, out, err = run(capsys, verb, tmp_path / "none")
    assert (status, out) == (2, "")
    assert "holds no tokens" in err
    assert err.count("\n") == 1
