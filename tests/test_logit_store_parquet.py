"""Targets as Parquet: the reader's values, for plain pyarrow, whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_store

from logit_store import parquet, reader
from logit_store.ledger import Ledger
from pipelines import cli
from schemas.errors import ConfigError, IncompleteStoreError


@pytest.fixture
def store(tmp_path) -> str:
    small_store.write_store(str(tmp_path / "store"))
    return str(tmp_path / "store")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_plain_pyarrow_reads_what_the_reader_reads(store, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_ROWS_AT_ONCE", 1)
    assert parquet.export(store, "default", tmp_path / "out") == (3, small_store.ROWS)
    table = pq.read_table(tmp_path / "out").sort_by("sequence").to_pylist()
    assert [row["sequence"] for row in table] == list(range(small_store.ROWS))
    batch = reader.TargetsReader(store, "default").rows(range(small_store.ROWS))
    entries, block_points = small_store.row_entries()
    for index, row in enumerate(table):
        for name in ("tokens", "segment_ids", "teacher_entropy", "label_logprob"):
            np.testing.assert_array_equal(row[name], getattr(batch, name)[index])
        expected = [{} for _ in range(small_store.LENGTH)]
        for position, id_, points in zip(
            entries[index].position, entries[index].id, entries[index].points, strict=True
        ):
            share = points / block_points[index, position // small_store.BLOCK]
            expected[position][int(id_)] = share
        for position, wanted in enumerate(expected):
            ids, weights = row["entry_ids"][position], row["entry_weights"][position]
            assert weights == sorted(weights, reverse=True)
            found = dict(zip(ids, weights, strict=True))
            assert len(found) == len(ids)
            assert found == pytest.approx(wanted, rel=1e-6)


def test_the_manifest_travels_with_the_files(store, tmp_path):
    parquet.export(store, "default", tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        found = json.loads(pq.read_schema(path).metadata[b"retort"])
        assert found == small_store.targets_manifest().model_dump(mode="json")


def test_an_export_that_was_cut_off_is_continued(store, tmp_path, monkeypatch):
    parquet.export(store, "default", tmp_path / "whole")
    out = tmp_path / "out"

    def stop(done: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parquet.export(store, "default", out, stop)
    assert len(contents(out)) == 2
    (out / "targets-00000002.parquet.unfinished").write_bytes(b"half")
    first = (out / "targets-00000000.parquet").stat().st_mtime_ns
    parquet.export(store, "default", out)
    assert (out / "targets-00000000.parquet").stat().st_mtime_ns == first
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_with_anything_else_is_refused(store, tmp_path):
    out = tmp_path / "out"
    parquet.export(store, "default", out)
    small_store.write_targets(store, "other", seed=5)
    with pytest.raises(ConfigError, match=r"targets-00000000\.parquet is something else"):
        parquet.export(store, "other", out)
    (out / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"letter\.txt is something else"):
        parquet.export(store, "default", out)
    with pytest.raises(ConfigError, match="is a file"):
        parquet.export(store, "default", out / "letter.txt")


def test_incomplete_targets_are_refused(store, tmp_path):
    Ledger(store, "default", small_store.targets_manifest()).withdraw([1])
    with pytest.raises(IncompleteStoreError, match="1 of the 3 shards of 'default'"):
        parquet.export(store, "default", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports(store, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", "--store", store, "--out", str(out)]) == 0
    assert "5 sequences in 3 files" in capsys.readouterr().out
    assert len(contents(out)) == 3
    for flags, message in (
        (["--out", "x"], "exactly one of run and store"),
        (["--store", store, "--run", "r", "--out", "x"], "exactly one of run and store"),
        (["--store", store, "--step", "3", "--out", "x"], "a store has none"),
        (["--store", store, "--targets", "best", "--out", "x"], "no targets 'best'"),
    ):
        assert cli.main(["export", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
