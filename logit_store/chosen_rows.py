"""Chosen rows of a set of targets in one file, decoded: Parquet or lines of JSON.

The columns are those of `logit_store.parquet`. The file appears whole.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logit_store import parquet
from logit_store.reader import TargetsReader
from schemas.errors import ConfigError

Format = Literal["parquet", "jsonl"]
_ROWS_AT_ONCE = 16


def parse_rows(text: str, total: int) -> np.ndarray:
    """Row numbers, int64, of '3', '0:16' (16 exclusive), '5:' or a list of these with commas.

    In the order given. Raises ConfigError for anything else, and for what is no row of `total`.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d*)(:?)(\d*)\s*", part)
        if match is None or not (match[1] or match[2]) or (match[3] and not match[2]):
            raise ConfigError(
                f"rows must be numbers or ranges such as 0:16 or 3,7,100:, but they are '{text}'; "
                "write them like that."
            )
        first = int(match[1] or 0)
        stop = int(match[3] or total) if match[2] else first + 1
        if not 0 <= first < stop <= total:
            raise ConfigError(
                f"rows must be in [0, {total}) and a range must not be empty, but there is "
                f"'{part.strip()}'; choose others."
            )
        found.append(np.arange(first, stop))
    return np.concatenate(found)


def export(
    url: str,
    name: str,
    rows: str | None,
    out: Path,
    to: Format,
    progress: Callable[[int, str], None] = lambda done, note: None,
) -> int:
    """Write rows (None: all) to a new file; returns their number. `progress` gets those written.

    Raises ConfigError if `out` exists, IncompleteStoreError for rows that are not committed, and
    what the reader raises.
    """
    targets = TargetsReader(url, name)
    chosen = parse_rows(rows or "0:", targets.manifest.num_sequences)
    if out.exists():
        raise ConfigError(f"--out must be a file to be made, but {out} exists; name another.")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        write = _write_parquet if to == "parquet" else _write_jsonl
        write(targets, _tables(targets, chosen, progress), unfinished)
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(chosen)


def _tables(
    targets: TargetsReader, rows: np.ndarray, progress: Callable[[int, str], None]
) -> Iterator[pa.Table]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        yield parquet.table(targets, some)
        progress(start + len(some), "")


def _write_parquet(targets: TargetsReader, tables: Iterator[pa.Table], path: Path) -> None:
    schema = parquet.schema(targets.manifest)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _write_jsonl(targets: TargetsReader, tables: Iterator[pa.Table], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            for row in table.to_pylist():
                file.write(json.dumps(row) + "\n")
