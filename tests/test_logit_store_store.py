"""Writing and reading a store: round trips, refusals, resumption, and the bytes of version 1."""

import fcntl
import hashlib
import json
import os
import random
import re
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

from logit_store import decode, layout, ledger, reader, writer
from schemas.errors import (
    AlignmentError,
    ConfigError,
    CorruptStoreError,
    FormatVersionError,
    IncompleteStoreError,
    ManifestMismatchError,
    StoreNotFoundError,
)
from schemas.manifest import LedgerRecord, SourceFile


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


def test_rows_are_the_same_however_many_are_decoded_at_once(store, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_SLICE_ROWS", 1)
    small_store.write_store(str(tmp_path / "again"))
    assert files(str(tmp_path / "again")) == files(store)


def test_a_broken_row_is_named_however_many_are_checked_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_SLICE_ROWS", 1)
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    writer.create_targets(url, "default", small_store.targets_manifest())
    with pytest.raises(ValueError, match=r"below the vocabulary size 300.*row 1"):
        writer.TargetsWriter(url, "default").write(*broken(_id_beyond_vocabulary))


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


GOLDEN = "c22f5ccbc8b4836062495585a0782656d824d77c7a63f79ad23303c74a68a621"


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
    changed = small_store.targets_manifest(seed=3, software={"retort": "99"})
    with pytest.raises(ManifestMismatchError) as error:
        writer.create_targets(store, "default", changed)
    assert "seed is 0" in str(error.value)
    assert "software" not in str(error.value)
    writer.create_targets(store, "default", small_store.targets_manifest(software={"retort": "99"}))


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
    old = tuple(source(i, "aa") for i in range(40))
    writer.create_tokens(url, small_store.tokens_manifest(sources=old))
    changed = (*old[:7], source(7, "bb"), *old[8:])
    with pytest.raises(
        ManifestMismatchError,
        match="sources is different in item 7: sha256 is aa there and bb here;",
    ):
        writer.create_tokens(url, small_store.tokens_manifest(sources=changed))
    with pytest.raises(ManifestMismatchError, match="sources is 40 items there and 39 items here"):
        writer.create_tokens(url, small_store.tokens_manifest(sources=old[1:]))
    others = tuple(source(i, "bb") for i in range(40))
    with pytest.raises(ManifestMismatchError, match="and 28 more fields differ"):
        writer.create_tokens(url, small_store.tokens_manifest(sources=others))


def test_of_drivers_with_different_configs_only_one_is_accepted(tmp_path):
    for attempt in range(8):
        url = str(tmp_path / f"raced-{attempt}")
        small_store.write_tokens(url)
        start = threading.Barrier(4)

        def create(seed: int, url: str = url, start: threading.Barrier = start) -> str | None:
            start.wait()
            code = ("log_uint8", "log_uint16")[seed % 2]
            manifest = small_store.targets_manifest(seed=seed, weight_code=code)
            try:
                writer.create_targets(url, "default", manifest)
            except ManifestMismatchError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(create, range(4)))
        (winner,) = (seed for seed, answer in enumerate(answers) if answer is None)
        manifest = layout.read_manifest(url, "default")
        assert manifest.seed == winner
        for spec in layout.arrays(manifest).values():
            layout.open_array(url, "targets/default/", spec)
        assert all(f"seed is {winner} there" in a for a in answers if a is not None)


def test_a_driver_killed_between_manifest_and_arrays_is_continued(store, tmp_path):
    url = str(tmp_path / "cut")
    small_store.write_tokens(url)
    manifest = small_store.targets_manifest()
    group = layout.open_kvstore(url, "targets/default/")
    layout.write_new(group, layout.GROUP_KEY, layout.group_json(manifest))
    small_store.write_targets(url)
    assert files(url) == files(store)


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
    with pytest.raises(CorruptStoreError, match=r"match its retort_sha256.*store: zarr\.json"):
        reader.TargetsReader(store, "default")
    tokenizer = small_store.tokens_manifest().tokenizer.model_copy(update={"sha256": "ef" * 32})
    path.write_bytes(layout.group_json(small_store.tokens_manifest(tokenizer=tokenizer)))
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
    with pytest.raises(
        IncompleteStoreError, match=r"rows \[2, 3\], of shards \[1\] of the targets"
    ):
        targets.rows([3, 0, 2])


@pytest.mark.parametrize("rows", [[-1], [5], [[0]], [0.5], [True, False], ["1"]])
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
    with pytest.raises(CorruptStoreError, match=r"targets/default/entry_id in shards \[1\] of"):
        targets.rows([4, 2, 0, 3])


@pytest.mark.parametrize("name", ["tokens", "segment_ids", "targets/default/entry_id"])
def test_a_data_file_that_is_gone_is_an_error_and_not_zeros(store, name):
    (Path(store) / name / "c/1/0").unlink()
    targets = reader.TargetsReader(store, "default")
    targets.rows([0, 4])
    with pytest.raises(CorruptStoreError, match=rf"{name} in shards \[1\] of .*missing"):
        targets.rows([0, 3, 4])


def test_a_shard_of_nothing_but_zeros_is_stored_and_read(tmp_path):
    """Padding alone, as the fill value is: a file that is there, or its loss could not be seen."""
    url = str(tmp_path / "store")
    writer.create_tokens(url, small_store.tokens_manifest())
    spec = writer.pending(url, None)[0]
    zeros = np.zeros((2, small_store.LENGTH), np.int32)
    record = writer.TokensWriter(url).write(spec, zeros, zeros.astype(np.uint16))
    assert all((Path(url) / file.key).stat().st_size == file.size_bytes for file in record.files)
    np.testing.assert_array_equal(reader.TokensReader(url).rows([1, 0]).tokens, zeros)
    (Path(url) / "segment_ids/c/0/0").unlink()
    with pytest.raises(CorruptStoreError, match=r"segment_ids in shards \[0\]"):
        reader.TokensReader(url).rows([0])


def test_the_damaged_shard_is_named_however_many_are_read(tmp_path):
    url = str(tmp_path / "store")
    writer.create_tokens(url, small_store.tokens_manifest(num_sequences=12, shard_sequences=1))
    for spec in writer.pending(url, None):
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
    path = data.draw(st.sampled_from(sorted(Path(url).rglob("c/*/0"))))
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
        assert f"{path.parents[2].name} in shards [{path.parent.name}]" in message
    for name in expected.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


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


def _negative_entropy(columns):
    columns["teacher_entropy"][1, 3] = -1


def _probability_above_one(columns):
    columns["label_logprob"][0, 3] = 1


def _entropy_where_nothing_follows(columns):
    columns["teacher_entropy"][0, 9] = 1


def _too_many_entries(columns):
    columns["entry_count"][1, :8] = 4


def _floor_above_one(columns):
    columns["weight_floor"][1, 0] = 1.5


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (_count_where_nothing_follows, "next token is of the same document.*row 0"),
        (_gap_in_used_slots, "used slots come first.*row 1"),
        (_id_beyond_vocabulary, "below the vocabulary size 300.*row 1"),
        (_ids_not_increasing, "strictly increasing.*row 1"),
        (_no_floor, r"floors lie in \(0, 1\].*row 0"),
        (_not_a_number, "Entropies are finite and not negative.*row 1.*nan"),
        (_negative_entropy, "Entropies are finite and not negative.*row 1.*-1"),
        (_probability_above_one, "Log-probabilities are finite and not positive.*row 0.*1"),
        (_entropy_where_nothing_follows, "are 0 where the next token is not.*row 0"),
        (_too_many_entries, "at most 24 entries.*row 1.*32"),
        (_floor_above_one, r"floors lie in \(0, 1\].*row 1.*1.5"),
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
    with pytest.raises(ValueError, match=r"ids in \[0, 300\), but row 0 .* holds 300"):
        writer.TokensWriter(url).write(spec, tokens[:2], segments[:2])
    with pytest.raises(ValueError, match=r"tokens must be int32 \(2, 16\), but it is int64"):
        writer.TokensWriter(url).write(spec, tokens[:2].astype(np.int64), segments[:2])


@pytest.mark.parametrize("numbers", [[2, 2], [1, 3], [1, 2, 1], [1, 0, 1], [1, 0, 2]])
def test_segment_ids_that_count_no_documents_are_refused(tmp_path, numbers):
    url = str(tmp_path / "store")
    writer.create_tokens(url, small_store.tokens_manifest())
    tokens, segments = small_store.token_rows()
    segments[1] = 0
    segments[1, : len(numbers)] = numbers
    spec = writer.pending(url, None)[0]
    with pytest.raises(ValueError, match=r"count a row's documents from 1.*row 1"):
        writer.TokensWriter(url).write(spec, tokens[:2], segments[:2])


@pytest.mark.parametrize("name", ["tokens", "segment_ids"])
def test_targets_of_rows_that_are_not_the_stores_are_refused(tmp_path, name):
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    writer.create_targets(url, "default", small_store.targets_manifest())
    spec, tokens, segments, rows = broken(lambda columns: None)
    if name == "tokens":
        tokens = tokens[::-1]
    else:
        segments = np.ones_like(segments)
    with pytest.raises(AlignmentError, match=f"the {name} given for rows 0 to 1 are not those"):
        writer.TargetsWriter(url, "default").write(spec, tokens, segments, rows)


def test_a_writer_that_comes_second_with_other_bytes_is_refused(tmp_path, monkeypatch):
    """Both writers are past the question whether the shard is committed."""
    url = str(tmp_path / "store")
    small_store.write_tokens(url)
    writer.create_targets(url, "default", small_store.targets_manifest())
    spec, tokens, segments, rows = broken(lambda columns: None)
    first = writer.TargetsWriter(url, "default").write(spec, tokens, segments, rows)
    monkeypatch.setattr(ledger, "read_record", lambda *_: None)
    assert writer.TargetsWriter(url, "default").write(spec, tokens, segments, rows) == first
    monkeypatch.undo()
    statistics = first.statistics.model_copy(update={"mass_sum": first.statistics.mass_sum + 1e-9})
    other_machine = LedgerRecord(**(first.model_dump() | {"statistics": statistics}))
    assert ledger.commit(url, "default", other_machine) == first
    monkeypatch.setattr(writer.TargetsWriter, "committed", lambda *_: None)
    other = replace(rows, teacher_entropy=rows.teacher_entropy / 2)
    with pytest.raises(
        CorruptStoreError, match=r"equal bytes, but two of shard 0 .*00000000\.json"
    ):
        writer.TargetsWriter(url, "default").write(spec, tokens, segments, other)


def test_a_spec_of_another_store_is_refused(store):
    spec = writer.plan_shards(small_store.tokens_manifest(sequence_tokens=8))[0]
    tokens, segments = small_store.token_rows()
    with pytest.raises(ManifestMismatchError, match="under the manifest it was planned for"):
        writer.TokensWriter(store).write(spec, tokens[:2], segments[:2])


def test_locks_of_the_dead_are_swept_and_those_of_the_living_are_not(store):
    dead = Path(store) / "targets/default/entry_id/c/2/0.__lock"
    dead.write_bytes(b"half a shard")
    living = Path(store) / "tokens/c/0/0.__lock"
    code = (
        "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); print(1,flush=1)"
    )
    holder = [sys.executable, "-c", f"{code}; sys.stdin.read()", str(living)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert writer.sweep_locks(store) == 1
        assert living.exists()
        assert not dead.exists()
        process.communicate()
    assert writer.sweep_locks(store) == 1
    assert writer.sweep_locks(store) == 0


def test_a_write_waits_for_the_lock_that_the_sweep_respects(store):
    """TensorStore and the sweep must mean the same lock, or a sweep could cut a live write."""
    key = Path(store) / "stray"
    lock = Path(f"{key}{layout.LOCK_SUFFIX}")
    with lock.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        write = layout.open_kvstore(store).write("stray", b"late")
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
    assert layout.kvstore_spec(url, "tokens/") == expected


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
