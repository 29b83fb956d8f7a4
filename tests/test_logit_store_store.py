"""Writing and reading a store: round trips, refusals, resumption, and the bytes of version 1."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_store
import zarr

from logit_store import layout, reader, writer
from schemas.errors import (
    ConfigError,
    CorruptStoreError,
    FormatVersionError,
    IncompleteStoreError,
    ManifestMismatchError,
    StoreNotFoundError,
)


@pytest.fixture
def store(tmp_path) -> str:
    url = str(tmp_path / "store")
    small_store.write_store(url)
    return url


def files(url: str) -> dict[str, bytes]:
    root = Path(url)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_rows_come_back_as_they_were_written(store):
    tokens, segments = small_store.token_rows()
    _, expected = small_store.target_rows()
    order = [4, 0, 3, 0]
    batch = reader.TargetsReader(store, "default").rows(order)
    np.testing.assert_array_equal(batch.tokens, tokens[order])
    np.testing.assert_array_equal(batch.segment_ids, segments[order])
    for index, row in enumerate(order):
        found: dict[int, dict[int, float]] = {}
        for entry, position, weight in zip(
            batch.entry_id[index],
            batch.entry_position[index],
            batch.entry_weight[index],
            strict=True,
        ):
            if entry >= 0:
                found.setdefault(int(position), {})[int(entry)] = float(weight)
            else:
                assert weight == 0
        wanted = {p: e for (r, p), e in expected.items() if r == row and e}
        assert {p: sorted(e) for p, e in found.items()} == {p: sorted(e) for p, e in wanted.items()}
        for position, entries in wanted.items():
            for entry, weight in entries.items():
                assert abs(found[position][entry] / weight - 1) < 0.02
        counts = {p: len(e) for p, e in wanted.items()}
        assert {p: int(c) for p, c in enumerate(batch.entry_count[index]) if c} == counts


def recipe() -> str:
    """The recipe for readers without this package, as `docs/format.md` prints it."""
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_plain_zarr_reads_the_same_by_the_documented_recipe(store):
    row = 2
    namespace = {"store": store, "row": row}
    exec(recipe(), namespace)
    batch = reader.TargetsReader(store, "default").rows([row])
    used = batch.entry_id[0] >= 0
    np.testing.assert_array_equal(namespace["positions"], batch.entry_position[0][used])
    np.testing.assert_array_equal(namespace["ids"], batch.entry_id[0][used])
    np.testing.assert_allclose(namespace["weights"], batch.entry_weight[0][used], rtol=1e-6)
    assert used.sum() > 5


def test_zarr_opens_every_array(store):
    group = zarr.open_group(store, mode="r")
    tokens, segments = small_store.token_rows()
    np.testing.assert_array_equal(group["tokens"][:], tokens)
    np.testing.assert_array_equal(group["segment_ids"][:], segments)
    rows, _ = small_store.target_rows()
    for name in layout.targets_arrays(small_store.targets_manifest()):
        np.testing.assert_array_equal(group[f"targets/default/{name}"][:], getattr(rows, name))
    assert group.attrs["retort"]["format_version"] == 1


def test_version_1_is_frozen_to_the_byte(store):
    """Change only if you know that no store of version 1 exists, or raise the version."""
    digest = hashlib.sha256()
    for name, raw in sorted(files(store).items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(raw).digest())
    assert digest.hexdigest() == GOLDEN


GOLDEN = "42c560fbf7f9a7879c832ac0e2506753582b7825ddeeb73de3174569a8984e59"


def test_writing_again_changes_nothing(store):
    before = files(store)
    small_store.write_store(store)
    assert files(store) == before
    for key in list(before):
        if "ledger" in key:
            (Path(store) / key).unlink()
    small_store.write_store(store)
    assert files(store) == before


def test_several_sets_of_targets_share_tokens(store):
    small_store.write_targets(store, "sharper", seed=5)
    assert reader.list_targets(store) == ["default", "sharper"]
    assert reader.TargetsReader(store, "sharper").manifest.seed == 5


def test_a_store_of_another_config_is_refused_field_by_field(store):
    with pytest.raises(ManifestMismatchError) as error:
        writer.create_targets(
            store, "default", small_store.targets_manifest(seed=3, weight_code="log_uint16")
        )
    assert "seed is 0 there and 3 here" in str(error.value)
    assert "weight_code is log_uint8 there and log_uint16 here" in str(error.value)
    writer.create_targets(store, "default", small_store.targets_manifest(software={"retort": "99"}))


def test_another_tokenizer_is_refused_with_both_values(store):
    manifest = reader.TokensReader(store).manifest
    reader.check_tokenizer(manifest, "ab" * 32, 300)
    with pytest.raises(ManifestMismatchError, match=r"abab.*\(300 pieces\).*cdcd.*\(300 pieces\)"):
        reader.check_tokenizer(manifest, "cd" * 32, 300)
    with pytest.raises(ManifestMismatchError, match=r"\(300 pieces\).*\(301 pieces\)"):
        reader.check_tokenizer(manifest, "ab" * 32, 301)


def test_a_future_version_is_refused_by_name(store):
    path = Path(store) / "targets/default/zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["retort"]["format_version"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(FormatVersionError, match=r"reads format version 1, but .* is of version 2"):
        reader.TargetsReader(store, "default")


def test_targets_over_other_tokens_are_refused(store):
    path = Path(store) / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["retort"]["tokenizer"]["sha256"] = "ef" * 32
    path.write_text(json.dumps(document))
    with pytest.raises(ManifestMismatchError, match="must be over the tokens of their store"):
        reader.TargetsReader(store, "default")


def test_a_store_or_set_that_is_not_there_is_named(store, tmp_path):
    with pytest.raises(StoreNotFoundError, match="retort tokenize"):
        reader.TokensReader(str(tmp_path / "nothing"))
    with pytest.raises(StoreNotFoundError, match=r"no targets 'best'; it has default"):
        reader.TargetsReader(store, "best")
    with pytest.raises(ConfigError, match="ftp://x"):
        reader.TokensReader("ftp://x/y")


def test_rows_of_an_uncommitted_shard_are_refused(store):
    (Path(store) / "targets/default/ledger/00000001.json").unlink()
    targets = reader.TargetsReader(store, "default")
    targets.rows([0, 1, 4])
    with pytest.raises(IncompleteStoreError, match=r"shards \[1\] of the targets 'default'"):
        targets.rows([0, 2])


@pytest.mark.parametrize("rows", [[-1], [5], [[0]]])
def test_rows_out_of_range_are_refused(store, rows):
    with pytest.raises(IndexError, match=r"in \[0, 5\)"):
        reader.TokensReader(store).rows(rows)


def test_a_flipped_byte_is_met_at_the_read(store):
    path = Path(store) / "targets/default/entry_id/c/1/0"
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(raw)
    targets = reader.TargetsReader(store, "default")
    targets.rows([0])
    with pytest.raises(CorruptStoreError, match=r"entry_id of .* one of shards \[1\]"):
        targets.rows([2, 3])


def broken(change):
    """The first shard's rows with one rule broken."""
    tokens, segments = small_store.token_rows()
    rows, _ = small_store.target_rows()
    spec = writer.plan_shards(small_store.targets_manifest())[0]
    shard = small_store.part(rows, spec)
    columns = {name: getattr(shard, name).copy() for name in shard.__dataclass_fields__}
    change(columns)
    return spec, tokens[:2], segments[:2], type(shard)(**columns)


def _count_where_nothing_follows(columns):
    columns["entry_count"][0, 9] = 1


def _gap_in_used_slots(columns):
    columns["entry_id"][1, 0] = layout.UNUSED_ID


def _id_beyond_vocabulary(columns):
    columns["entry_id"][1, 0] = 300


def _ids_not_increasing(columns):
    count = columns["entry_count"][1]
    position = int(np.argmax(count[:8] >= 2))
    first = int(count[:position].sum())
    columns["entry_id"][1, [first, first + 1]] = columns["entry_id"][1, [first + 1, first]]


def _no_floor(columns):
    columns["weight_floor"][0, 1] = 0


def _not_a_number(columns):
    columns["teacher_entropy"][1, 3] = np.nan


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (_count_where_nothing_follows, "next token is of the same document.*row 0"),
        (_gap_in_used_slots, "used slots come first.*row 1"),
        (_id_beyond_vocabulary, "below the vocabulary size 300.*row 1"),
        (_ids_not_increasing, "strictly increasing.*row 1"),
        (_no_floor, r"floors lie in \(0, 1\].*row 0"),
        (_not_a_number, "finite.*row 1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rows_that_break_a_rule_are_refused(tmp_path, change, rule):
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    writer.create_targets(url, "default", small_store.targets_manifest())
    with pytest.raises(ValueError, match=rule):
        writer.TargetsWriter(url, "default").write(*broken(change))
    assert len(writer.pending(url, "default")) == 3
    spec, tokens, segments, rows = broken(lambda columns: None)
    writer.TargetsWriter(url, "default").write(spec, tokens, segments, rows)


def test_tokens_that_no_id_stands_for_are_refused(tmp_path):
    url = str(tmp_path / "store")
    writer.create_tokens(url, small_store.tokens_manifest())
    tokens, segments = small_store.token_rows()
    tokens[0, 0] = 300
    spec = writer.pending(url, None)[0]
    with pytest.raises(ValueError, match=r"ids in \[0, 300\)"):
        writer.TokensWriter(url).write(spec, tokens[:2], segments[:2])


def _writing_process(url: str) -> subprocess.Popen[bytes]:
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import small_store\nprint('ready', flush=True)\n"
        f"small_store.write_store({url!r})\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def test_a_writer_killed_anywhere_leaves_a_store_that_ends_the_same(store, tmp_path):
    rng = random.Random(0)
    seen = set()
    for number in range(14):
        url = str(tmp_path / f"killed-{number}")
        with _writing_process(url) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.12))
            process.send_signal(signal.SIGKILL)
        seen.add(len(files(url)) if os.path.exists(url) else 0)
        small_store.write_store(url)
        writer.sweep_locks(url)
        assert files(url) == files(store)
    assert len(seen) > 3, f"the kills all came at the same moment: {seen}"


def test_two_writers_at_once_end_in_the_same_bytes(store, tmp_path):
    url = str(tmp_path / "shared")
    processes = [_writing_process(url) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    writer.sweep_locks(url)
    assert files(url) == files(store)
