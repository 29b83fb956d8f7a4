"""Sizes of a store that is only planned, against stores that were written and read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_store
import tensorstore as ts

from logit_store import layout, manifests, reader, sizes
from logit_store.ledger import Ledger, record_bytes, segment_key
from schemas.manifest import SEGMENT_SHARDS

PLANNED = {
    "num_sequences": small_store.ROWS,
    "sequence_tokens": small_store.LENGTH,
    "shard_sequences": 2,
    "slots_per_token": small_store.PER_TOKEN,
}


@pytest.fixture
def store(tmp_path) -> Path:
    small_store.write_store(str(tmp_path / "store"))
    return tmp_path / "store"


def files(store: Path) -> list[Path]:
    return [path.relative_to(store) for path in store.rglob("*") if path.is_file()]


def kinds(store: Path) -> dict[str, int]:
    """Objects of a store by what they are, told by their keys."""
    found = {"shards": 0, "records": 0, "ledger": 0, "metadata": 0}
    tables = small_store.tables().arrays()
    for path in files(store):
        if path.parent.name == "ledger":
            found["records" if path.stem.isdigit() else "ledger"] += 1
        elif "c" in path.parts and not tables.keys() & set(path.parts):
            found["shards"] += 1
        else:
            found["metadata"] += 1
    return found


def test_a_planned_store_has_the_objects_of_a_written_one(store, monkeypatch, tmp_path):
    objects = sizes.count_objects(*sizes.planned_manifests(**PLANNED))
    assert (objects.sequences, objects.shards, objects.arrays) == (5, 3, 8)
    assert kinds(store) == {
        "shards": objects.shard_files,
        "records": 0,
        "ledger": objects.ledger_objects,
        "metadata": objects.metadata,
    }
    assert objects.complete == len(files(store))
    monkeypatch.setattr(Ledger, "compact", lambda self: 0)
    small_store.write_store(str(tmp_path / "written"))
    assert kinds(tmp_path / "written") == {
        "shards": objects.shard_files,
        "records": objects.ledger_records,
        "ledger": 0,
        "metadata": objects.metadata,
    }
    assert objects.while_written == len(files(tmp_path / "written"))


@pytest.mark.parametrize(("shards", "segments"), [(1, 1), (1024, 1), (1025, 2), (4096, 4)])
def test_a_complete_ledger_is_segments_and_a_summary(shards, segments):
    assert SEGMENT_SHARDS == 1024
    shapes = PLANNED | {"num_sequences": 2 * shards - 1}
    planned = sizes.planned_manifests(**shapes)
    objects = sizes.count_objects(*planned)
    assert (objects.shards, objects.ledger_records) == (shards, 2 * shards)
    assert objects.shard_files == 8 * shards
    assert objects.ledger_objects == 2 * (segments + 1)
    # 3 groups and 2 second copies of manifests, the list of sources, 8 arrays' metadata, and of
    # each of 3 tables its metadata, its chunk and the copy of that.
    assert objects.metadata == 3 + 2 + 1 + 8 + 3 * 3
    assert objects.complete == 8 * shards + 2 * (segments + 1) + 23
    assert objects.while_written == 10 * shards + 23
    keys = Ledger("nowhere", None, planned[0]).keys()
    names = [key.removeprefix("ledger/") for key in keys]
    assert [name for name in names if name.startswith("segment")] == [
        segment_key(number) for number in range(segments)
    ]
    assert len(names) == shards + segments + 1


def test_a_planned_store_has_the_arrays_of_a_written_one():
    """All that depends on the number of ids apart, which the plan takes to be large."""
    planned = sizes.planned_manifests(**PLANNED)
    sampler = small_store.targets_manifest().sampler.model_copy(update={"block_tokens": 16})
    written = small_store.tokens_manifest(), small_store.targets_manifest(sampler=sampler)
    for plan, real in zip(planned, written, strict=True):
        assert layout.row_arrays(plan) == layout.row_arrays(real)
        of_plan, of_real = layout.table_arrays(plan), layout.table_arrays(real)
        assert of_plan.keys() == of_real.keys()
        for name, spec in of_plan.items():
            assert replace(spec, shape=of_real[name].shape) == of_real[name]
            assert spec.shape > of_real[name].shape


def test_every_array_of_rows_has_measured_bytes():
    tokens, targets = sizes.planned_manifests(**PLANNED)
    measured = [name for names in sizes.MEASURED.per_token(12) for name in names]
    assert sorted(measured) == sorted([*layout.row_arrays(tokens), *layout.row_arrays(targets)])


def test_bytes_of_entries_are_in_proportion_and_those_of_tokens_are_not():
    stored = sizes.StoredBytes(
        tokens_bytes_per_token=1.0,
        statistics_bytes_per_token=2.0,
        head_bytes_per_entry=0.25,
        id_bytes_per_entry=1.5,
        ledger_bytes_per_shard=1000.0,
        entries_per_token=10.0,
        source="made up",
    )
    assert stored.per_token(4) == {
        ("tokens", "segment_ids"): 1.0,
        ("head_count", "head_points", "block_points"): 1.0,
        ("entry_bucket", "entry_offset"): 6.0,
        ("teacher_nats",): 2.0,
    }
    assert sum(stored.per_token(8).values()) == 1 + 2 + 2 + 12


def test_what_was_measured_is_possible():
    """Bounds that hold for any text: an id's entropy is not above its 18 bits, and so on."""
    stored = sizes.MEASURED
    assert 0 < stored.tokens_bytes_per_token < 4 + 2
    assert 0 < stored.statistics_bytes_per_token < 2
    assert 0 < stored.head_bytes_per_entry < 2
    assert 0.5 < stored.id_bytes_per_entry < 18 / 8
    assert stored.entries_per_token > 1


def test_ledger_bytes_are_those_of_records(store):
    """Records of the small store; those of a large one have longer numbers."""
    size = 0
    for name in (None, "default"):
        record = Ledger(str(store), name, manifests.read_manifest(str(store), name)).record(0)
        assert record is not None
        size += len(record_bytes(record))
    assert 0.9 * sizes.MEASURED.ledger_bytes_per_shard < size
    assert size < sizes.MEASURED.ledger_bytes_per_shard


@pytest.mark.parametrize(("name", "rows"), [("c/0/0", 2), ("c/2/0", 2)])
def test_a_shard_ends_with_an_index_of_the_counted_size(store, name, rows):
    """Also of the last shard, which holds one row: the index has room for a whole one."""
    data = (store / "targets/default/head_count" / name).read_bytes()
    size = sizes.shard_index_bytes(rows)
    entries = np.frombuffer(data[-size:-4], "<u8").reshape(-1, 2)
    assert len(entries) == rows
    stored = entries[entries[:, 1] != 2**64 - 1]
    assert len(stored) == min(rows, small_store.ROWS - 2 * int(name[2]))
    assert len(data) == stored[:, 1].sum() + size


def test_a_row_costs_the_counted_reads_and_bytes(store):
    """By TensorStore's own counters; row 4 is alone in its shard, so all of each file is read."""
    targets = reader.TargetsReader(str(store), "default")
    targets.rows([0])
    before = _file_metrics()
    targets.rows([4])
    after = _file_metrics()
    shards = [path for path in store.rglob("*") if path.is_file() and "/c/2" in str(path)]
    assert len(shards) == sizes.count_objects(*sizes.planned_manifests(**PLANNED)).arrays
    assert after["read"] - before["read"] == sizes.READS_PER_CHUNK * len(shards)
    assert after["bytes_read"] - before["bytes_read"] == sum(f.stat().st_size for f in shards)


def _file_metrics() -> dict[str, int]:
    prefix = "/tensorstore/kvstore/file/"
    found = ts.experimental_collect_matching_metrics(prefix)
    return {
        metric["name"].removeprefix(prefix): metric["values"][0]["value"]
        for metric in found
        if metric["name"] in (f"{prefix}read", f"{prefix}bytes_read")
    }
