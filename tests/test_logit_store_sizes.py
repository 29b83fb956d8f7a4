"""Sizes of a store that is only planned, against stores that were written and read."""

from pathlib import Path

import numpy as np
import pytest
import small_store
import tensorstore as ts

from logit_store import layout, ledger, reader, sizes

PLANNED = {
    "num_sequences": small_store.ROWS,
    "sequence_tokens": small_store.LENGTH,
    "shard_sequences": 2,
    "entries_per_token": small_store.PER_TOKEN,
}


@pytest.fixture
def store(tmp_path) -> Path:
    small_store.write_store(str(tmp_path / "store"))
    return tmp_path / "store"


def test_a_planned_store_has_the_objects_of_a_written_one(store):
    planned = sizes.planned_manifests(**PLANNED, weight_code="log_uint8")
    objects = sizes.count_objects(*planned)
    files = [path.relative_to(store) for path in store.rglob("*") if path.is_file()]
    assert objects.while_written == len(files)
    assert objects.shard_files == sum("c" in path.parts for path in files)
    assert objects.ledger_records == sum("ledger" in path.parts for path in files)
    assert objects.metadata == sum(path.name == "zarr.json" for path in files)
    assert (objects.sequences, objects.shards, objects.arrays) == (5, 3, 8)


def test_a_complete_ledger_is_segments_of_records():
    for shards, segments in ((1024, 1), (1025, 2), (4096, 4)):
        shapes = PLANNED | {"num_sequences": 2 * shards - 1}
        objects = sizes.count_objects(*sizes.planned_manifests(**shapes, weight_code="log_uint8"))
        assert (objects.shards, objects.ledger_records) == (shards, 2 * shards)
        assert objects.ledger_segments == 2 * segments
        assert objects.complete == 8 * shards + 2 * segments + 11


@pytest.mark.parametrize("weight_code", ["log_uint8", "log_uint16"])
def test_a_planned_store_has_the_arrays_of_a_written_one(weight_code):
    planned = sizes.planned_manifests(**PLANNED, weight_code=weight_code)
    written = (
        small_store.tokens_manifest(),
        small_store.targets_manifest(weight_code=weight_code),
    )
    for plan, real in zip(planned, written, strict=True):
        of_plan, of_real = layout.arrays(plan), layout.arrays(real)
        assert of_plan.keys() == of_real.keys()
        for name in of_plan.keys() - {"weight_floor"}:
            assert of_plan[name] == of_real[name]


def test_every_array_has_measured_bytes():
    tokens, targets = sizes.planned_manifests(**PLANNED, weight_code="log_uint8")
    measured = [name for names in sizes.MEASURED.per_token(12, "log_uint8") for name in names]
    assert sorted(measured) == sorted([*layout.arrays(tokens), *layout.arrays(targets)])


def test_the_parts_are_what_was_measured():
    assert sum(sizes.MEASURED.per_token(12, "log_uint8").values()) == pytest.approx(27.1)
    assert sum(sizes.MEASURED.per_token(12, "log_uint16").values()) == pytest.approx(27.1 + 2.4)
    ids, twice = (sizes.MEASURED.per_token(k, "log_uint8")[("entry_id",)] for k in (12, 24))
    assert ids == pytest.approx(18.17)
    assert twice == 2 * ids


def test_ledger_bytes_are_those_of_records(store):
    """Records of the small store; those of a large one have longer numbers."""
    size = sum(
        len(ledger.record_bytes(ledger.read_committed(str(store), name)[0]))
        for name in (None, "default")
    )
    assert 0.9 * sizes.MEASURED.ledger_bytes_per_shard < size
    assert size < sizes.MEASURED.ledger_bytes_per_shard


def test_a_shard_ends_with_an_index_of_the_counted_size(store):
    for name, rows in (("c/0/0", 2), ("c/2/0", 2)):
        data = (store / "targets/default/entry_count" / name).read_bytes()
        size = sizes.shard_index_bytes(rows)
        entries = np.frombuffer(data[-size:-4], "<u8").reshape(-1, 2)
        assert len(entries) == rows
        stored = entries[entries[:, 1] != 2**64 - 1]
        assert len(data) == stored[:, 1].sum() + size


def test_a_row_costs_the_counted_reads_and_bytes(store):
    """By TensorStore's own counters; row 4 is alone in its shard, so all of each file is read."""
    targets = reader.TargetsReader(str(store), "default")
    targets.rows([0])
    before = _file_metrics()
    targets.rows([4])
    after = _file_metrics()
    files = [*store.glob("*/c/2/0"), *store.glob("targets/default/*/c/2/0")]
    assert after["read"] - before["read"] == sizes.READS_PER_CHUNK * len(files)
    assert after["bytes_read"] - before["bytes_read"] == sum(f.stat().st_size for f in files)


def _file_metrics() -> dict[str, int]:
    prefix = "/tensorstore/kvstore/file/"
    found = ts.experimental_collect_matching_metrics(prefix)
    return {
        metric["name"].removeprefix(prefix): metric["values"][0]["value"]
        for metric in found
        if metric["name"] in (f"{prefix}read", f"{prefix}bytes_read")
    }
