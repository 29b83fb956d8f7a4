"""How fast stored targets become batches: this package and others, on one core, in one run.

`python -m benchmarks.read_speed --store STORE --targets NAME` reads the first rows of a store, in
an order at random, as often as it is told to, each way in turn, from files that are warm:

- decode: from the decompressed columns to the trainer's arrays, nothing else;
- whole path: `StoreSource.read`, from the store to the trainer's arrays, and then on the device;
- stored bytes, mapped: the same bytes from a memory map of the shard files, decompressed and
  decoded by the same codecs and kernel, with no storage layer at all;
- arrays, mapped: the decoded arrays themselves, uncompressed, copied out of a memory map;
- Parquet, ArrayRecord: the decoded arrays as zstd-compressed rows of those formats;
- zarr-python: the stored columns through zarr-python, then this package's kernel.

Prints the median and the least time in nanoseconds a token, and stored bytes a token. Needs
`pip install -e '.[bench]'` for ArrayRecord.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numcodecs import Blosc

from logit_store import codec, layout, seals
from logit_store.reader import TargetsReader
from logit_store.rows import TargetRows, decode_entries
from logit_store.statistics import summary
from schemas.manifest import Manifest
from student_train.batch import Batch
from student_train.data import StoreSource, place


class Mapped:
    """Rows of stored columns out of memory maps of their shards: index, blosc, nothing else."""

    def __init__(self, store: str, targets: str, manifest: Manifest, tokens: Manifest):
        self._parts = []
        for group, of in (("", tokens), (f"targets/{targets}/", manifest)):
            for spec in layout.row_arrays(of).values():
                maps = [
                    np.memmap(f"{store}/{group}{spec.shard_key(i)}", np.uint8, "r")
                    for i in range(of.num_shards)
                ]
                self._parts.append((spec, maps))
        self._shard = manifest.shard_sequences
        self._blosc = Blosc("zstd")

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """As stored, tokens first."""
        found = {}
        for spec, maps in self._parts:
            out = np.empty((len(rows), *spec.shape[1:]), spec.dtype)
            for i, row in enumerate(rows.tolist()):
                data = maps[row // self._shard]
                index = data[-16 * self._shard - 4 : -4].view("<u8").reshape(-1, 2)
                start, size = (int(x) for x in index[row % self._shard])
                # A chunk ends with its crc32c, which is not looked at here.
                self._blosc.decode(data[start : start + size - 4], out[i])
            found[spec.name] = out
        return found


def finish(reader: TargetsReader, columns: dict[str, np.ndarray], rows: np.ndarray) -> Batch:
    """The trainer's arrays of stored columns, tokens among them, if they are these rows."""
    tokens, sealed = seals.detach({f: columns[f] for f in ("tokens", "segment_ids")})
    fields = TargetRows.__dataclass_fields__
    targets, targets_sealed = seals.detach({f: columns[f] for f in fields})
    if (seals.seal(rows, tokens) != sealed).any():
        raise SystemExit("These are other tokens.")
    if (seals.seal(sealed, targets) != targets_sealed).any():
        raise SystemExit("These are other targets.")
    return decode(reader, tokens | targets)


def decode(reader: TargetsReader, columns: dict[str, np.ndarray]) -> Batch:
    """The trainer's arrays of columns without seals."""
    segments, nats = columns["segment_ids"], columns["teacher_nats"]
    targets = TargetRows(**{f: columns[f] for f in TargetRows.__dataclass_fields__})
    entries = decode_entries(reader.manifest, reader.vocabulary, segments, targets)
    return Batch(
        columns["tokens"],
        segments.astype(np.int32),
        entries.entry_id,
        entries.entry_weight,
        entries.head_count,
        entries.tail_count,
        codec.decode_nats(nats[:, 0]),
        -codec.decode_nats(nats[:, 1]),
    )


def write_parquet(path: Path, batch: Batch) -> None:
    """A row group for each row, its arrays as lists."""
    fields = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v[0].size)
        for name, v in batch._asdict().items()
    }
    pq.write_table(
        pa.table(fields), path, row_group_size=1, compression="zstd", use_dictionary=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True)
    parser.add_argument("--targets", default="default")
    parser.add_argument("--rows", type=int, default=12, help="Rows of a batch.")
    parser.add_argument("--times", type=int, default=25)
    parser.add_argument("--core", type=int, default=0, help="All is done on this one.")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    pa.set_cpu_count(1)
    source = StoreSource(arguments.store, arguments.targets)
    reader = TargetsReader(arguments.store, arguments.targets)
    manifest, tokens = reader.manifest, reader.tokens.manifest
    total = min(manifest.num_sequences, 8 * arguments.rows)
    length = manifest.sequence_tokens
    every = source.read(np.arange(total))
    mapped = Mapped(arguments.store, arguments.targets, manifest, tokens)
    group = zarr.open_group(arguments.store, mode="r")
    zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})
    stored = mapped.columns(np.arange(arguments.rows))
    columns = stored | seals.detach({"segment_ids": stored["segment_ids"]})[0]
    columns |= seals.detach({"block_points": stored["block_points"]})[0]
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    where = NamedSharding(mesh, PartitionSpec("x"))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for field, values in every._asdict().items():
            np.save(folder / f"{field}.npy", values)
        write_parquet(folder / "rows.parquet", every)
        writer = ArrayRecordWriter(str(folder / "rows.arrayrecord"), "group_size:1,zstd:5")
        for row in range(total):
            writer.write(b"".join(values[row].tobytes() for values in every))
        writer.close()
        maps = [np.load(folder / f"{field}.npy", mmap_mode="r") for field in Batch._fields]
        parquet = pq.ParquetFile(folder / "rows.parquet", memory_map=True)
        records = ArrayRecordReader(str(folder / "rows.arrayrecord"), "readahead_buffer_size:0")
        sizes = {file.suffix: file.stat().st_size / (total * length) for file in folder.iterdir()}

        def arrays_mapped(rows: np.ndarray) -> Batch:
            return Batch(*(values[rows] for values in maps))

        def from_parquet(rows: np.ndarray) -> Batch:
            table = parquet.read_row_groups(rows.tolist(), use_threads=False)
            return Batch(
                *(
                    table[field].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
                    for field in Batch._fields
                )
            )

        def from_records(rows: np.ndarray) -> Batch:
            found = records.read(rows.tolist())
            parts: list[np.ndarray] = []
            at = 0
            for values in every:
                size = values[0].nbytes
                rows_of = [np.frombuffer(r, values.dtype, len(values[0]), at) for r in found]
                parts.append(np.stack(rows_of))
                at += size
            return Batch(*parts)

        def through_zarr(rows: np.ndarray) -> Batch:
            found = {n: group[n].oindex[rows] for n in layout.row_arrays(tokens)}
            for n in layout.row_arrays(manifest):
                found[n] = group[f"targets/{arguments.targets}/{n}"].oindex[rows]
            return finish(reader, found, rows)

        ways: dict[str, tuple[Callable[[np.ndarray], object], float | None]] = {
            "decode": (lambda rows: decode(reader, columns), None),
            "whole path": (source.read, None),
            "whole path, on the device": (
                lambda rows: jax.block_until_ready(place(rows, source.read, where)), None,
            ),
            "stored bytes, mapped": (lambda rows: finish(reader, mapped.columns(rows), rows), None),
            "arrays, mapped": (arrays_mapped, sum(v.nbytes for v in every) / total / length),
            "Parquet": (from_parquet, sizes[".parquet"]),
            "ArrayRecord": (from_records, sizes[".arrayrecord"]),
            "zarr-python": (through_zarr, None),
        }  # fmt: skip
        random = np.random.default_rng(0)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.times + 2):
            rows = random.permutation(total)[: arguments.rows]
            for name, (read, _) in ways.items():
                start = time.perf_counter()
                found = read(rows)
                took = (time.perf_counter() - start) / (arguments.rows * length) * 1e9
                if turn >= 2:
                    times[name].append(took)
                elif name != "decode":
                    for one, other in zip(found, source.read(rows), strict=True):  # type: ignore[call-overload]
                        np.testing.assert_array_equal(np.asarray(one), other)
        base = summary(arguments.store, arguments.targets)
        stored = sum(
            base.array_bytes[n]
            for n in (*layout.row_arrays(tokens), *layout.row_arrays(manifest))
        ) / base.tokens  # fmt: skip
        print(f"{'way':28}{'ns/token':>10}{'least':>8}{'M tokens/s':>12}{'B/token':>9}")
        for name, (_, size) in ways.items():
            middle = statistics.median(times[name])
            size = stored if size is None else size
            print(f"{name:28}{middle:10.1f}{min(times[name]):8.1f}{1e3 / middle:12.2f}{size:9.2f}")
        whole = statistics.median(times["whole path"])
        for name in ("stored bytes, mapped", "arrays, mapped"):
            share = statistics.median(times[name]) / whole
            print(f"the whole path runs at {share:.0%} of: {name}")


if __name__ == "__main__":
    main()
