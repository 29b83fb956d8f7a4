"""A set of targets as Parquet, decoded: for those who read it with tools of their own.

One file to a shard, one row to a sequence. Position t's target is for token t + 1: `entry_ids[t]`
have the probabilities `entry_weights[t]`, the largest first, and all others 0. An id equal to the
vocabulary's size, which only top_k stores, stands for all ids without an entry. The manifest lies
in the schema's metadata, under `retort`. Memory is that of a few rows at a time.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logit_store.entries import by_position
from logit_store.ledger import plan_shards
from logit_store.reader import TargetBatch, TargetsReader
from schemas.errors import ConfigError, IncompleteStoreError
from schemas.manifest import ShardSpec, TargetsManifest

Progress = Callable[[int, str], None]
_ROWS_AT_ONCE = 16
_FILE = re.compile(r"targets-\d{8,}\.parquet")
_UNFINISHED = ".unfinished"
_METADATA = b"retort"

_NUMBERS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("sequence", pa.int64()),
        ("tokens", _NUMBERS),
        ("segment_ids", _NUMBERS),
        ("entry_ids", pa.list_(_NUMBERS)),
        ("entry_weights", pa.list_(_FLOATS)),
        ("teacher_entropy", _FLOATS),
        ("label_logprob", _FLOATS),
    ]
)


def export(
    url: str, name: str, out: Path, progress: Progress = lambda done, note: None
) -> tuple[int, int]:
    """Write what is missing of a set of targets' files into `out`; returns files and rows in all.

    Files appear whole. Raises IncompleteStoreError unless every shard is committed, ConfigError if
    the folder holds anything else, and what the reader raises.
    """
    targets = TargetsReader(url, name)
    missing = np.flatnonzero(~targets.committed)
    if missing.size:
        raise IncompleteStoreError(
            f"Only complete targets are exported, but {missing.size} of the "
            f"{targets.manifest.num_shards} shards of '{name}' of {url} are not committed; run "
            "the job that writes them again."
        )
    _check_folder(out, targets.manifest.canonical_json().encode())
    out.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(targets.manifest)
    for spec in shards:
        path = out / f"targets-{spec.index:08d}.parquet"
        if not path.exists():
            unfinished = path.with_name(path.name + _UNFINISHED)
            _write(targets, spec, unfinished)
            os.replace(unfinished, path)
        progress(spec.index + 1, path.name)
    return len(shards), targets.manifest.num_sequences


def _check_folder(out: Path, manifest: bytes) -> None:
    """Raise ConfigError unless the folder has nothing but files of this very export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"--out must be a folder, but {out} is a file; name another.")
    for path in sorted(out.iterdir()):
        if path.name.endswith(_UNFINISHED) and _FILE.fullmatch(path.name[: -len(_UNFINISHED)]):
            continue
        is_ours = _FILE.fullmatch(path.name) is not None
        if not is_ours or (pq.read_schema(path).metadata or {}).get(_METADATA) != manifest:
            raise ConfigError(
                f"--out must be new or hold an export of the same targets, but {path} is something "
                "else; choose another folder."
            )


def schema(manifest: TargetsManifest) -> pa.Schema:
    """The columns, with the manifest as metadata."""
    return SCHEMA.with_metadata({_METADATA: manifest.canonical_json().encode()})


def table(targets: TargetsReader, rows: np.ndarray) -> pa.Table:
    """Decoded rows int64 [R] as a table of R rows. Raises what the reader raises."""
    batch = targets.rows(rows)
    columns = [pa.array(rows), *_columns(batch, targets.positions(batch))]
    return pa.table(columns, schema=schema(targets.manifest))


def _write(targets: TargetsReader, spec: ShardSpec, path: Path) -> None:
    with pq.ParquetWriter(path, schema(targets.manifest), compression="zstd") as writer:
        for start in range(spec.first_row, spec.stop_row, _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, spec.stop_row))
            writer.write_table(table(targets, rows))


def _columns(batch: TargetBatch, positions: np.ndarray) -> list[pa.Array]:
    """All columns but the number of the sequence; positions int32 [R, E]."""
    rows, length = batch.tokens.shape

    def per_token(values: np.ndarray) -> pa.Array:
        return _lists(np.arange(rows + 1) * length, pa.array(values.reshape(-1)))

    entries = by_position(batch, positions)

    def per_entry(values: np.ndarray) -> pa.Array:
        of_tokens = _lists(entries.ends, pa.array(values))
        return _lists(np.arange(rows + 1) * length, of_tokens)

    return [
        per_token(batch.tokens),
        per_token(batch.segment_ids),
        per_entry(entries.id),
        per_entry(entries.weight),
        per_token(batch.teacher_entropy),
        per_token(batch.label_logprob),
    ]


def _lists(ends: np.ndarray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)
