"""Writing and reading a store: round trips, refusals, resumption, and the bytes of version 1."""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_store
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logit_store import codec, layout, manifests, reader, rows, storage, writer
from logit_store.ledger import Ledger
from logit_store.verify import verify
from schemas.errors import (
    AlignmentError,
    ConfigError,
    CorruptStoreError,
    FormatVersionError,
    IncompleteStoreError,
    ManifestMismatchError,
    StoreNotFoundError,
)
from schemas.manifest import Corpus, LedgerRecord, ShardSpec, SourceFile


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    """Written once, for `store` to copy; no test has it itself."""
    url = str(tmp_path_factory.mktemp("written") / "store")
    small_store.write_store(url)
    return url


@pytest.fixture
def store(tmp_path, written) -> str:
    return str(shutil.copytree(written, tmp_path / "store"))


def files(url: str) -> dict[str, bytes]:
    root = Path(url)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def create_tokens(url: str, **changes: object) -> None:
    writer.create_tokens(url, small_store.tokens_manifest(**changes), small_store.CORPUS)


def create_targets(url: str, name: str = "default", **changes: object) -> None:
    manifest = small_store.targets_manifest(**changes)
    writer.create_targets(url, name, manifest, small_store.tables())


def pending(url: str, name: str | None) -> list[ShardSpec]:
    return Ledger(url, name, manifests.read_manifest(url, name)).pending()


def expected_weights(row: int) -> dict[tuple[int, int], float]:
    """(position, id) → weight of a row of the small store."""
    entries, block_points = small_store.row_entries()
    e = entries[row]
    return {
        (int(t), int(i)): p / block_points[row, t // small_store.BLOCK]
        for t, i, p in zip(e.position, e.id, e.points, strict=True)
    }


def found_weights(targets: reader.TargetsReader, batch: reader.TargetBatch, index: int):
    used = batch.entry_id[index] >= 0
    assert (batch.entry_weight[index][~used] == 0).all()
    position = targets.positions(batch)[index]
    keys = zip(position[used].tolist(), batch.entry_id[index][used].tolist(), strict=True)
    found = dict(zip(keys, batch.entry_weight[index][used].tolist(), strict=True))
    assert len(found) == used.sum()
    return found


def test_rows_come_back_as_they_were_written(store):
    tokens, segments = small_store.token_rows()
    stored = small_store.target_rows()
    order = [4, 0, 3, 0]
    targets = reader.TargetsReader(store, "default")
    batch = targets.rows(order)
    np.testing.assert_array_equal(batch.tokens, tokens[order])
    np.testing.assert_array_equal(batch.segment_ids, segments[order])
    nats = codec.decode_nats(stored.teacher_nats[order])
    np.testing.assert_array_equal(batch.teacher_entropy, nats[:, 0])
    np.testing.assert_array_equal(batch.label_logprob, -nats[:, 1])
    for index, row in enumerate(order):
        expected = expected_weights(row)
        assert found_weights(targets, batch, index) == pytest.approx(expected, rel=1e-6)
        counts = np.bincount([t for t, _ in expected], minlength=small_store.LENGTH)
        found = batch.head_count[index].astype(int) + batch.tail_count[index]
        np.testing.assert_array_equal(found, counts)


def recipe() -> str:
    """The recipe for readers without this package, as `docs/format.md` prints it."""
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("row", range(small_store.ROWS))
def test_plain_zarr_reads_the_same_by_the_documented_recipe(store, row):
    namespace = {"store": store, "row": row}
    exec(recipe(), namespace)
    found = {
        (int(t), int(i)): float(w)
        for t, i, w in zip(
            *(namespace[name] for name in ("positions", "ids", "weights")), strict=True
        )
    }
    assert len(found) == len(namespace["ids"])
    assert found == pytest.approx(expected_weights(row), rel=1e-9)


def test_the_recipe_is_ten_lines_or_so_of_zarr_and_numpy():
    lines = [line for line in recipe().splitlines() if line.strip()]
    assert len(lines) <= 20
    assert {line for line in lines if "import" in line} == {"import numpy as np, zarr"}


def test_rows_are_the_same_however_many_are_decoded_at_once(store, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_SLICE_ROWS", 1)
    small_store.write_store(str(tmp_path / "again"))
    assert files(str(tmp_path / "again")) == files(store)


def test_a_broken_row_is_named_however_many_are_checked_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_SLICE_ROWS", 1)
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    create_targets(url)
    with pytest.raises(ValueError, match=r"Row 1 .*beyond the vocabulary"):
        writer.TargetsWriter(url, "default").write(*broken(_bucket_beyond_vocabulary))


def test_zarr_opens_every_array(store):
    group = zarr.open_group(store, mode="r")
    tokens, segments = small_store.token_rows()
    np.testing.assert_array_equal(group["tokens"][:], tokens)
    np.testing.assert_array_equal(group["segment_ids"][:, :-2], segments)
    for name, values in small_store.target_rows().columns().items():
        stored = group[f"targets/default/{name}"][:]
        np.testing.assert_array_equal(stored[:, :-2] if name == "block_points" else stored, values)
    for name, values in small_store.tables().arrays().items():
        np.testing.assert_array_equal(group[f"targets/default/{name}"][:], values)
    assert group.attrs["retort"]["format_version"] == 1


GOLDEN = Path(__file__).parent / "golden" / "store"


def test_version_1_is_frozen_to_the_byte(store):
    """Change only if you know that no store of version 1 exists, or raise the version.

    Another release of TensorStore or its compressors may code the same arrays in other bytes; then
    the test below, which reads the golden store, says whether the format is still the same.
    """
    golden = files(str(GOLDEN))
    assert sorted(files(store)) == sorted(golden)
    for name, raw in files(store).items():
        assert raw == golden[name], name


def test_the_golden_store_is_read_as_it_was_written(store):
    for url in (str(GOLDEN), store):
        targets = reader.TargetsReader(url, "default")
        batch = targets.rows(range(small_store.ROWS))
        for row in range(small_store.ROWS):
            assert found_weights(targets, batch, row) == pytest.approx(expected_weights(row))
    assert verify(str(GOLDEN)).ok


def test_writing_again_changes_nothing(store):
    before = files(store)
    small_store.write_store(store)
    assert files(store) == before
    for key in list(before):
        if "ledger" in key or "copies" in key:
            (Path(store) / key).unlink()
    small_store.write_store(store)
    assert files(store) == before


def test_several_sets_of_targets_share_tokens(store):
    small_store.write_targets(store, "sharper", seed=5)
    assert reader.list_targets(store) == ["default", "sharper"]
    assert reader.TargetsReader(store, "sharper").manifest.seed == 5


def test_a_store_of_another_config_is_refused_field_by_field(store):
    with pytest.raises(ManifestMismatchError) as error:
        create_targets(store, seed=3, dtype="bfloat16")
    assert "seed is 0 there and 3 here" in str(error.value)
    assert "dtype is float32 there and bfloat16 here" in str(error.value)
    with pytest.raises(ManifestMismatchError) as error:
        create_targets(store, seed=3, software={"retort": "99"})
    assert "seed is 0" in str(error.value)
    assert "software" not in str(error.value)
    create_targets(store, software={"retort": "99"})


def test_tables_that_are_not_the_manifests_are_refused(tmp_path):
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    tables = small_store.tables()
    other = replace(tables, sampling_order=tables.sampling_order[::-1])
    with pytest.raises(ManifestMismatchError, match="must be of the tables beside it"):
        writer.create_targets(url, "default", small_store.targets_manifest(), other)
    corpus = Corpus(sources=(source(1, "aa"),), splits=())
    with pytest.raises(ManifestMismatchError, match="must be of the corpus beside it"):
        writer.create_tokens(url, small_store.tokens_manifest(), corpus)


@pytest.mark.parametrize("table", ["vocabulary_order", "bucket_bits", "sampling_order"])
def test_a_table_that_was_exchanged_is_refused(store, tmp_path, table):
    """Whole, with good checksums, and of another set: only the manifest's digest tells."""
    other = str(tmp_path / "other")
    small_store.write_tokens(other)
    tables = small_store.tables()
    order, bits = tables.vocabulary.order[::-1].copy(), tables.vocabulary.bucket_bits[::-1].copy()
    swapped = writer.Tables(codec.Vocabulary(order, bits), tables.sampling_order[::-1].copy())
    manifest = small_store.targets_manifest(vocabulary=swapped.info())
    writer.create_targets(other, "default", manifest, swapped)
    path = f"targets/default/{table}/c/0"
    (Path(store) / path).write_bytes((Path(other) / path).read_bytes())
    with pytest.raises(CorruptStoreError, match=f"{table} of .* is another"):
        reader.read_table(store, "default", small_store.targets_manifest(), table)
    if table != "sampling_order":
        with pytest.raises(CorruptStoreError, match=f"{table} of .* is another"):
            reader.TargetsReader(store, "default")


def test_another_tokenizer_is_refused_with_both_values(store):
    manifest = reader.TokensReader(store).manifest
    reader.check_tokenizer(manifest, "ab" * 32, 300)
    with pytest.raises(ManifestMismatchError, match=r"abab.*\(300 pieces\).*cdcd.*\(300 pieces\)"):
        reader.check_tokenizer(manifest, "cd" * 32, 300)
    with pytest.raises(ManifestMismatchError, match=r"\(300 pieces\).*\(301 pieces\)"):
        reader.check_tokenizer(manifest, "ab" * 32, 301)


def source(index: int, sha256: str) -> SourceFile:
    return SourceFile(path=f"{index}.txt", size_bytes=9, sha256=sha256, documents=1, text_bytes=9)


def test_a_difference_deep_in_a_list_is_named_with_both_values(tmp_path):
    url = str(tmp_path / "store")

    def create(sources: tuple[SourceFile, ...]) -> None:
        corpus = Corpus(sources=sources, splits=())
        writer.create_tokens(url, small_store.tokens_manifest(corpus), corpus)

    old = tuple(source(i, "aa") for i in range(40))
    create(old)
    before = files(url)
    with pytest.raises(
        ManifestMismatchError,
        match=r"corpus\.sources is different in item 7: sha256 is aa there and bb here;",
    ):
        create((*old[:7], source(7, "bb"), *old[8:]))
    with pytest.raises(
        ManifestMismatchError, match=r"corpus\.sources is 40 items there and 39 items here"
    ):
        create(old[1:])
    with pytest.raises(ManifestMismatchError, match="and 28 more fields differ"):
        create(tuple(source(i, "bb") for i in range(40)))
    create(old)
    assert files(url) == before


def test_of_drivers_with_different_configs_only_one_is_accepted(tmp_path):
    for attempt in range(8):
        url = str(tmp_path / f"raced-{attempt}")
        small_store.write_tokens(url)
        start = threading.Barrier(4)

        def create(seed: int, url: str = url, start: threading.Barrier = start) -> str | None:
            start.wait()
            points = (10, 400)[seed % 2]
            sampler = small_store.targets_manifest().sampler.model_copy(update={"points": points})
            try:
                create_targets(url, seed=seed, sampler=sampler)
            except ManifestMismatchError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(create, range(4)))
        (winner,) = (seed for seed, answer in enumerate(answers) if answer is None)
        manifest = manifests.read_manifest(url, "default")
        assert manifest.seed == winner
        for spec in layout.arrays(manifest).values():
            storage.open_array(url, "targets/default/", spec)
        assert all(f"seed is {winner} there" in a for a in answers if a is not None)


def test_a_driver_killed_between_manifest_and_arrays_is_continued(store, tmp_path):
    url = str(tmp_path / "cut")
    small_store.write_tokens(url)
    manifest = small_store.targets_manifest()
    group = storage.open_kvstore(url, "targets/default/")
    storage.write_new(group, layout.GROUP_KEY, layout.group_json(manifest))
    small_store.write_targets(url)
    assert files(url) == files(store)


def test_a_future_version_is_refused_by_name(store):
    path = Path(store) / "targets/default/zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["retort"]["format_version"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(FormatVersionError, match=r"reads format version 1, but .* is of version 2"):
        reader.TargetsReader(store, "default")


def test_half_a_character_in_a_manifest_is_damage(store):
    path = Path(store) / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"software": {', b'"software": {"\\ud800": "x", '))
    with pytest.raises(CorruptStoreError, match="must hold a retort manifest"):
        reader.TokensReader(store)


def test_targets_over_other_tokens_are_refused(store):
    path = Path(store) / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["retort"]["tokenizer"]["sha256"] = "ef" * 32
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptStoreError, match=r"match its retort_sha256.*store: zarr\.json"):
        reader.TargetsReader(store, "default")
    tokenizer = small_store.tokens_manifest().tokenizer.model_copy(update={"sha256": "ef" * 32})
    path.write_bytes(layout.group_json(small_store.tokens_manifest(tokenizer=tokenizer)))
    # Which is of the old tokens too, and would be met first.
    (Path(store) / "ledger/summary.json").unlink()
    with pytest.raises(ManifestMismatchError, match="must be over the tokens of their store"):
        reader.TargetsReader(store, "default")


def test_a_store_or_set_that_is_not_there_is_named(store, tmp_path):
    with pytest.raises(StoreNotFoundError, match="retort tokenize"):
        reader.TokensReader(str(tmp_path / "nothing"))
    with pytest.raises(StoreNotFoundError, match=r"no targets 'best'; it has default"):
        reader.TargetsReader(store, "best")
    with pytest.raises(ConfigError, match="ftp://x"):
        reader.TokensReader("ftp://x/y")
    (Path(store) / "targets/default/zarr.json").unlink()
    with pytest.raises(StoreNotFoundError, match=r"the copy alone; run `retort repair"):
        reader.TargetsReader(store, "default")


def test_rows_of_an_uncommitted_shard_are_refused(store):
    Ledger(store, "default", small_store.targets_manifest()).withdraw([1])
    targets = reader.TargetsReader(store, "default")
    targets.rows([0, 1, 4])
    with pytest.raises(
        IncompleteStoreError, match=r"rows \[2, 3\], of shards \[1\] of the targets"
    ):
        targets.rows([3, 0, 2])


@pytest.mark.parametrize("rows", [[-1], [5], [[0]], [0.5], [True, False], ["1"]])
def test_rows_out_of_range_are_refused(store, rows):
    with pytest.raises(IndexError, match=r"in \[0, 5\)"):
        reader.TokensReader(store).rows(rows)


def test_a_flipped_byte_is_met_at_the_read(store):
    path = Path(store) / "targets/default/entry_bucket/c/1/0"
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(raw)
    targets = reader.TargetsReader(store, "default")
    targets.rows([0])
    with pytest.raises(CorruptStoreError, match=r"targets/default/entry_bucket in shards \[1\] of"):
        targets.rows([4, 2, 0, 3])


@pytest.mark.parametrize("name", ["tokens", "segment_ids", "targets/default/entry_bucket"])
def test_a_data_file_that_is_gone_is_an_error_and_not_zeros(store, name):
    (Path(store) / name / "c/1/0").unlink()
    targets = reader.TargetsReader(store, "default")
    targets.rows([0, 4])
    with pytest.raises(CorruptStoreError, match=rf"{name} in shards \[1\] of .*missing"):
        targets.rows([0, 3, 4])


def test_a_shard_of_nothing_but_zeros_is_stored_and_read(tmp_path):
    """Padding alone, as the fill value is: a file that is there, or its loss could not be seen."""
    url = str(tmp_path / "store")
    create_tokens(url)
    spec = pending(url, None)[0]
    zeros = np.zeros((2, small_store.LENGTH), np.int32)
    record = writer.TokensWriter(url).write(spec, zeros, zeros.astype(np.uint16))
    assert all((Path(url) / file.key).stat().st_size == file.size_bytes for file in record.files)
    np.testing.assert_array_equal(reader.TokensReader(url).rows([1, 0]).tokens, zeros)
    (Path(url) / "segment_ids/c/0/0").unlink()
    with pytest.raises(CorruptStoreError, match=r"segment_ids in shards \[0\]"):
        reader.TokensReader(url).rows([0])


def test_the_damaged_shard_is_named_however_many_are_read(tmp_path):
    url = str(tmp_path / "store")
    create_tokens(url, num_sequences=12, shard_sequences=1)
    for spec in pending(url, None):
        ones = np.ones((1, small_store.LENGTH))
        writer.TokensWriter(url).write(spec, ones.astype(np.int32), ones.astype(np.uint16))
    (Path(url) / "tokens/c/11/0").write_bytes(b"")
    with pytest.raises(CorruptStoreError, match=r"tokens in shards \[11\] of"):
        reader.TokensReader(url).rows(range(12))


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory) -> tuple[str, reader.TargetBatch]:
    url = str(tmp_path_factory.mktemp("fuzzed") / "store")
    small_store.write_store(url)
    return url, reader.TargetsReader(url, "default").rows(range(small_store.ROWS))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damage_to_data_is_ever_read_as_other_values(whole_store, data):
    """Fuzzes the shard files: a read gives the true values or an error, nothing else."""
    url, expected = whole_store
    path = data.draw(st.sampled_from(sorted(p for p in Path(url).rglob("*/c/**/*") if p.is_file())))
    raw = path.read_bytes()
    start = data.draw(st.integers(0, len(raw) - 1))
    junk = data.draw(st.binary(max_size=12))
    path.write_bytes(raw[:start] + junk + raw[start + data.draw(st.integers(0, 12)) :])
    message, found = "", expected
    try:
        found = reader.TargetsReader(url, "default").rows(range(small_store.ROWS))
    except CorruptStoreError as error:
        message = str(error)
    finally:
        path.write_bytes(raw)
    if message:
        parts = path.relative_to(url).parts
        name = parts[parts.index("c") - 1]
        assert re.search(rf"{name} (in shards \[\d\] )?of ", message), message
    for name in expected.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def broken(change):
    """The first shard's rows with one rule broken."""
    tokens, segments = small_store.token_rows()
    spec = writer.plan_shards(small_store.targets_manifest())[0]
    shard = small_store.part(small_store.target_rows(), spec)
    columns = {name: values.copy() for name, values in shard.columns().items()}
    change(columns)
    return spec, tokens[:2], segments[:2], type(shard)(**columns)


def _heads_where_nothing_follows(columns):
    columns["head_count"][0, 9] = 1


def _no_points(columns):
    columns["block_points"][1, 0] = 0


def _more_points_than_the_sampler_has(columns):
    columns["block_points"][1, 0] = 11


def _other_points(columns):
    columns["block_points"][1, 1] += 1


def _bucket_beyond_vocabulary(columns):
    columns["entry_bucket"][1, 0] = 5000


def _junk_in_unused_slots(columns):
    columns["entry_bucket"][1, -1] = 3


def _too_many_head_points(columns):
    columns["head_points"][1, 0] = 200


def _entropy_where_nothing_follows(columns):
    columns["teacher_nats"][0, 0, 9] = 1


def _label_where_nothing_follows(columns):
    columns["teacher_nats"][1, 1, 15] = 1


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (_heads_where_nothing_follows, "next token is of the same document.*row 0"),
        (_no_points, r"points lie in \[1, 10\].*row 1.*0"),
        (_more_points_than_the_sampler_has, r"points lie in \[1, 10\].*row 1.*11"),
        (_other_points, "Row 1 is not as the format says|Unused slots"),
        (_bucket_beyond_vocabulary, "Row 1 .*beyond the vocabulary"),
        (_junk_in_unused_slots, "Unused slots and bits hold 0, but row 1"),
        (_too_many_head_points, "Row 1 .*more points than the position"),
        (_entropy_where_nothing_follows, "are 0 where the next token is not.*row 0"),
        (_label_where_nothing_follows, "are 0 where the next token is not.*row 1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rows_that_break_a_rule_are_refused(tmp_path, change, rule):
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    create_targets(url)
    with pytest.raises(ValueError, match=rule):
        writer.TargetsWriter(url, "default").write(*broken(change))
    assert len(pending(url, "default")) == 3
    spec, tokens, segments, rows = broken(lambda columns: None)
    writer.TargetsWriter(url, "default").write(spec, tokens, segments, rows)


def test_tokens_that_no_id_stands_for_are_refused(tmp_path):
    url = str(tmp_path / "store")
    create_tokens(url)
    tokens, segments = small_store.token_rows()
    tokens[0, 0] = 300
    spec = pending(url, None)[0]
    with pytest.raises(ValueError, match=r"ids in \[0, 300\), but row 0 .* holds 300"):
        writer.TokensWriter(url).write(spec, tokens[:2], segments[:2])
    with pytest.raises(ValueError, match=r"tokens must be int32 \(2, 16\), but it is int64"):
        writer.TokensWriter(url).write(spec, tokens[:2].astype(np.int64), segments[:2])


@pytest.mark.parametrize("numbers", [[2, 2], [1, 3], [1, 2, 1], [1, 0, 1], [1, 0, 2]])
def test_segment_ids_that_count_no_documents_are_refused(tmp_path, numbers):
    url = str(tmp_path / "store")
    create_tokens(url)
    tokens, segments = small_store.token_rows()
    segments[1] = 0
    segments[1, : len(numbers)] = numbers
    spec = pending(url, None)[0]
    with pytest.raises(ValueError, match=r"count a row's documents from 1.*row 1"):
        writer.TokensWriter(url).write(spec, tokens[:2], segments[:2])


@pytest.mark.parametrize("name", ["tokens", "segment_ids"])
def test_targets_of_rows_that_are_not_the_stores_are_refused(tmp_path, name):
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    create_targets(url)
    spec, tokens, segments, rows = broken(lambda columns: None)
    if name == "tokens":
        tokens = tokens[::-1]
    else:
        segments = np.ones_like(segments)
    with pytest.raises(AlignmentError, match=f"the {name} given for rows 0 to 1 are not those"):
        writer.TargetsWriter(url, "default").write(spec, tokens, segments, rows)


def test_the_rest_is_for_top_k_alone(tmp_path):
    """Id V is an entry like any other, of which only one sampler knows."""
    tokens, segments = small_store.token_rows()
    row_entries = small_store.row_entries()[0]
    for entries in row_entries:
        entries.id[0] = small_store.VOCAB
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    sampler = small_store.targets_manifest().sampler
    for name in ("top_k", "systematic"):
        manifest = small_store.targets_manifest(sampler=sampler.model_copy(update={"name": name}))
        writer.create_targets(url, name, manifest, small_store.tables())
        spec = writer.plan_shards(manifest)[0]
        columns = small_store.part(small_store.target_rows(), spec).columns()
        for row, entries in enumerate(row_entries[:2]):
            encoded = codec.encode_row(
                small_store.tables().vocabulary, entries, small_store.LENGTH, 48, 10
            )
            for key, values in encoded.items():
                columns[key][row] = values
        targets = rows.TargetRows(**columns)
        shard_writer = writer.TargetsWriter(url, name)
        if name == "top_k":
            record = shard_writer.write(spec, tokens[:2], segments[:2], targets)
            rest = sum(e.points[0] / 10 for e in row_entries[:2])
            assert record.statistics.mass_sum == pytest.approx(28 - rest)
        else:
            with pytest.raises(ValueError, match="Only top_k stores the rest, id 300"):
                shard_writer.write(spec, tokens[:2], segments[:2], targets)


def test_a_writer_that_comes_second_with_other_bytes_is_refused(tmp_path, monkeypatch):
    """Both writers are past the question whether the shard is committed."""
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    create_targets(url)
    spec, tokens, segments, rows = broken(lambda columns: None)
    first = writer.TargetsWriter(url, "default").write(spec, tokens, segments, rows)
    monkeypatch.setattr(writer.TargetsWriter, "committed", lambda *_: None)
    assert writer.TargetsWriter(url, "default").write(spec, tokens, segments, rows) == first
    statistics = first.statistics.model_copy(update={"mass_sum": first.statistics.mass_sum + 1e-9})
    other_machine = LedgerRecord(**(first.model_dump() | {"statistics": statistics}))
    ledger = Ledger(url, "default", small_store.targets_manifest())
    assert ledger.commit(other_machine) == first
    other = replace(rows, teacher_nats=rows.teacher_nats // 2)
    with pytest.raises(CorruptStoreError, match=r"equal bytes, but two of shard 0"):
        writer.TargetsWriter(url, "default").write(spec, tokens, segments, other)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_damaged_file_without_a_record_is_written_over(store, shard):
    """Also of the last shard, which is short: TensorStore would read before it writes."""
    before = files(store)
    Ledger(store, "default", small_store.targets_manifest()).withdraw([shard])
    for junk in (b"", b"x" * 400):
        for path in Path(store).glob(f"targets/default/*/c/{shard}/0"):
            (path / "0" if path.is_dir() else path).write_bytes(junk)
        small_store.write_targets(store)
        assert files(store) == before
        Ledger(store, "default", small_store.targets_manifest()).withdraw([shard])


def test_a_spec_of_another_store_is_refused(store):
    spec = writer.plan_shards(small_store.tokens_manifest(sequence_tokens=8))[0]
    tokens, segments = small_store.token_rows()
    with pytest.raises(ManifestMismatchError, match="under the manifest it was planned for"):
        writer.TokensWriter(store).write(spec, tokens[:2], segments[:2])


def test_locks_of_the_dead_are_swept_and_those_of_the_living_are_not(store):
    dead = Path(store) / "targets/default/entry_bucket/c/2/0.__lock"
    dead.write_bytes(b"half a shard")
    living = Path(store) / "tokens/c/0/0.__lock"
    code = (
        "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); print(1,flush=1)"
    )
    holder = [sys.executable, "-c", f"{code}; sys.stdin.read()", str(living)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert storage.sweep_locks(store) == 1
        assert living.exists()
        assert not dead.exists()
        process.communicate()
    assert storage.sweep_locks(store) == 1
    assert storage.sweep_locks(store) == 0


def test_a_write_waits_for_the_lock_that_the_sweep_respects(store):
    """TensorStore and the sweep must mean the same lock, or a sweep could cut a live write."""
    key = Path(store) / "stray"
    lock = Path(f"{key}{storage.LOCK_SUFFIX}")
    with lock.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        write = storage.open_kvstore(store).write("stray", b"late")
        with pytest.raises(TimeoutError):
            write.result(timeout=0.3)
        lock.unlink()
    write.result(timeout=10)
    assert key.read_bytes() == b"late"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("gs://bucket", {"driver": "gcs", "bucket": "bucket", "path": "tokens/"}),
        ("gs://bucket/a/b/", {"driver": "gcs", "bucket": "bucket", "path": "a/b/tokens/"}),
        (
            "s3://bucket/a",
            {
                "driver": "s3",
                "bucket": "bucket",
                "path": "a/tokens/",
                "use_conditional_write": True,
            },
        ),
        ("/data/a b#%", {"driver": "file", "path": "/data/a b#%/tokens/"}),
    ],
)
def test_urls_become_key_value_stores(url, expected, monkeypatch):
    """Says nothing of whether a cloud answers: that is for the tests with servers."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "STORAGE_EMULATOR"))]:
        monkeypatch.delenv(name)
    assert storage.kvstore_spec(url, "tokens/") == expected


def _writing_process(url: str) -> subprocess.Popen[bytes]:
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        # Once to nowhere, so that what follows is not spent on compiling.
        f"import small_store\nsmall_store.write_store({url + '-warm'!r})\n"
        "print('ready', flush=True)\n"
        f"small_store.write_store({url!r})\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


# Reads URLs and has a child of its own write each store: imports are most of what a process costs.
# The parent opens no store, as TensorStore's threads would not be there after a fork.
FORKING = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import small_store
from logit_store.rows import check_targets
# Compiled here, for all of them.
check_targets(
    small_store.targets_manifest(),
    small_store.tables().vocabulary,
    small_store.token_rows()[1],
    small_store.target_rows(),
    0,
)
for line in sys.stdin:
    url = line.strip()
    child = os.fork()
    if child == 0:
        # Once to nowhere, so that what follows is not spent on beginnings.
        small_store.write_store(url + "-warm")
        print(os.getpid(), flush=True)
        small_store.write_store(url)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_writer_killed_anywhere_leaves_a_store_that_ends_the_same(store, tmp_path):
    rng = random.Random(0)
    seen = set()
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(14):
            url = str(tmp_path / f"killed-{number}")
            process.stdin.write(f"{url}\n")
            process.stdin.flush()
            writer_id = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.12))
            # One that has just ended is not there any more.
            with contextlib.suppress(ProcessLookupError):
                os.kill(writer_id, signal.SIGKILL)
            assert int(process.stdout.readline()) in (-signal.SIGKILL, 0)
            seen.add(len(files(url)) if os.path.exists(url) else 0)
            small_store.write_store(url)
            storage.sweep_locks(url)
            assert files(url) == files(store)
    assert len(seen) > 3, f"the kills all came at the same moment: {seen}"


def test_two_writers_at_once_end_in_the_same_bytes(store, tmp_path):
    url = str(tmp_path / "shared")
    processes = [_writing_process(url) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    storage.sweep_locks(url)
    assert files(url) == files(store)
