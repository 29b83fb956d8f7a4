"""Opening, planning and reading a random batch at 10 and at 100,000 shards, in one run.

`python -m benchmarks.flat_cost` writes one small shard of a store through the package's writer,
gives every other shard of a larger store the same files (as hard links, but for the two that
hold its seal) and a record of its own, lets the driver's own compaction run, and times in turn:
opening a set of targets, asking what is left to write, and reading a batch of rows at random, each
with a reader that keeps nothing. Prints medians, requests of the storage driver, and their ratio.
100,000 shards are 800,000 links, files and folders: it wants a file system that has them, and takes
some minutes.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorstore as ts

from logit_store import codec, layout, seals, storage, writer
from logit_store.codec import RowEntries
from logit_store.ledger import Ledger, plan_shards, record_bytes, record_key
from logit_store.reader import TargetsReader
from logit_store.rows import TargetRows
from schemas.manifest import (
    Corpus,
    Manifest,
    SamplerSpec,
    TargetsManifest,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    identity,
)

LENGTH, VOCAB, POINTS, SLOTS = 64, 500, 8, 4
BATCH = 8
# Of one file; ext4 allows 65,000.
_MOST_LINKS = 60_000


def make_store(url: str, shards: int) -> None:
    """A finished store of `shards` shards of one row, all rows the same."""
    corpus = Corpus(sources=(), splits=())
    shapes = {"num_sequences": shards, "sequence_tokens": LENGTH, "shard_sequences": 1}
    tokens = TokensManifest(
        **shapes,
        tokenizer=TokenizerInfo(sha256="0" * 64, vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0),
        corpus=corpus.summary(),
        software={},
    )
    random = np.random.default_rng(0)
    vocabulary = codec.make_vocabulary(np.arange(VOCAB)[::-1] + 1, SLOTS)
    tables = writer.Tables(vocabulary, np.arange(VOCAB, dtype=np.uint32))
    targets = TargetsManifest(
        **shapes,
        tokens_fingerprint=identity(tokens),
        teacher=TeacherInfo(
            name="made up", config_sha256="0", weights_sha256="0", vocab_size=VOCAB
        ),
        sampler=SamplerSpec(
            name="systematic", points=POINTS, slots_per_token=SLOTS, block_tokens=LENGTH
        ),
        vocabulary=tables.info(),
        seed=0,
        dtype="float32",
        batch_sequences=1,
        software={},
    )
    writer.create_tokens(url, tokens, corpus)
    writer.create_targets(url, "default", targets, tables)
    row = random.integers(4, VOCAB, (1, LENGTH)).astype(np.int32)
    segments = np.ones((1, LENGTH), np.uint16)
    position = np.arange(LENGTH - 1).repeat(2)
    ids = np.stack([np.arange(LENGTH - 1), np.arange(LENGTH - 1) + 100], axis=1).reshape(-1)
    points = np.tile([POINTS - 1, 1], LENGTH - 1)
    entries = RowEntries(position, ids, points)
    columns = codec.encode_row(vocabulary, entries, LENGTH, LENGTH * SLOTS, POINTS)
    stored = TargetRows(
        **{name: values[None] for name, values in columns.items()},
        block_points=np.full((1, 1), POINTS, np.uint16),
        teacher_nats=np.zeros((1, 2, LENGTH), np.uint8),
    )
    writer.TokensWriter(url).write(plan_shards(tokens)[0], row, segments)
    writer.TargetsWriter(url, "default").write(plan_shards(targets)[0], row, segments, stored)
    row_seals = np.arange(tokens.num_sequences)
    for name, manifest, values in (
        (None, tokens, {"tokens": row, "segment_ids": segments}),
        ("default", targets, stored.columns()),
    ):
        row_seals = _repeat(url, name, manifest, values, row_seals)


def _repeat(
    url: str,
    name: str | None,
    manifest: Manifest,
    values: dict[str, np.ndarray],
    start: np.ndarray,
) -> np.ndarray:
    """Give every shard the first one's files, but for seals, and a record; then compact.

    The rows' seals are of `start`, uint64 [R], and are returned, uint32 [R].
    """
    every = {n: np.broadcast_to(v, (len(start), *v.shape[1:])) for n, v in values.items()}
    row_seals = np.concatenate(
        [
            seals.seal(start[some], {n: v[some] for n, v in every.items()})
            for some in np.array_split(np.arange(len(start)), -(-len(start) // 1024))
        ]
    )
    ledger = Ledger(url, name, manifest)
    first = ledger.record(0)
    assert first is not None
    folder = Path(url) / layout.group_path(name)
    for spec in layout.row_arrays(manifest).values():
        if spec.name in seals.CARRIERS:
            array = storage.open_array(url, layout.group_path(name), spec)
            for some in np.array_split(np.arange(len(start)), -(-len(start) // 1024)):
                part = {spec.name: every[spec.name][some]}
                array[some[0] : some[-1] + 1].write(
                    seals.attach(part, row_seals[some])[spec.name]
                ).result()
            continue
        source = folder / spec.shard_key(0)
        for index in range(1, manifest.num_shards):
            link = folder / spec.shard_key(index)
            link.parent.mkdir(parents=True, exist_ok=True)
            if index % _MOST_LINKS:
                os.link(source, link)
            else:
                shutil.copy(source, link)
                source = link
    for shard in plan_shards(manifest)[1:]:
        files = tuple(
            file.model_copy(update={"key": file.key.replace("/c/0", f"/c/{shard.index}")})
            for file in first.files
        )
        record = first.model_copy(update={"spec": shard, "files": files}).sealed()
        path = folder / layout.LEDGER / record_key(shard.index)
        path.write_bytes(record_bytes(record))
    ledger.compact()
    return row_seals


def requests() -> int:
    """Reads and listings that TensorStore's file driver has made in this process."""
    prefix = "/tensorstore/kvstore/file/"
    found = ts.experimental_collect_matching_metrics(prefix)
    return sum(
        int(metric["values"][0]["value"])
        for metric in found
        if metric["name"] in (f"{prefix}read", f"{prefix}list") and metric["values"]
    )


def measure(url: str, random: np.random.Generator) -> dict[str, tuple[float, int]]:
    """Milliseconds and requests of each step."""
    found = {}

    def step(name: str, start: float, before: int) -> None:
        found[name] = ((time.perf_counter() - start) * 1e3, requests() - before)

    start, before = time.perf_counter(), requests()
    reader = TargetsReader(url, "default")
    step("open", start, before)
    start, before = time.perf_counter(), requests()
    assert not Ledger(url, "default", reader.manifest).pending()
    step("plan", start, before)
    rows = random.choice(reader.manifest.num_sequences, BATCH, replace=False)
    start, before = time.perf_counter(), requests()
    reader.rows(rows)
    step("read a batch", start, before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs=2, default=[10, 100_000])
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--folder", help="Where the stores are made; default: a temporary one.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        urls = {shards: f"{folder}/{shards}" for shards in arguments.shards}
        for shards, url in urls.items():
            start = time.monotonic()
            make_store(url, shards)
            print(f"{shards} shards made in {time.monotonic() - start:.0f} s", flush=True)
        random = np.random.default_rng(0)
        found: dict[int, list[dict[str, tuple[float, int]]]] = {s: [] for s in urls}
        for turn in range(arguments.times + 1):
            for shards, url in urls.items():
                measured = measure(url, random)
                if turn:
                    found[shards].append(measured)
        few, many = arguments.shards
        for name in found[few][0]:
            middle = {s: statistics.median(f[name][0] for f in found[s]) for s in urls}
            count = {s: statistics.median(f[name][1] for f in found[s]) for s in urls}
            print(
                f"{name}: {middle[few]:.2f} ms at {few}, {middle[many]:.2f} ms at {many} shards, "
                f"ratio {middle[many] / middle[few]:.2f}; "
                f"{count[few]:.0f} and {count[many]:.0f} requests",
                flush=True,
            )


if __name__ == "__main__":
    main()
