"""How long a training step waits for its batch, from a store that no cache holds.

`python -m benchmarks.input_wait --store S` reads batches of rows at random with the reader and the
threads of `retort train`, while a step of a given speed is pretended, and before every step drops
the store's files from the page cache. It prints the share of the run that was waiting, and what the
input could deliver if nothing else took time.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from schemas.runs import MeshConfig
from student_train import mesh as meshes
from student_train.batch import Batch
from student_train.data import StoreSource, place, prefetch
from student_train.throughput import timed


def drop_from_cache(store: Path) -> None:
    """Have the kernel forget the store's pages; they are clean, so that it can."""
    for path in store.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--targets", default="default")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a step")
    parser.add_argument("--tokens-per-second", type=float, default=31_000, help="of the device")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    source = StoreSource(str(options.store), options.targets)
    length, count = source.tokens_manifest.sequence_tokens, source.tokens_manifest.num_sequences
    rows = -(-options.tokens // length)
    step_seconds = rows * length / options.tokens_per_second
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    where = meshes.rows_sharding(mesh)
    random = np.random.default_rng(0)
    chosen = [random.choice(count, rows, replace=rows > count) for _ in range(options.steps)]

    def batches() -> Iterator[tuple[int, Batch]]:
        return prefetch(lambda step: place(chosen[step], source.read, where), 0, options.steps)

    found: dict[str, list[float]] = {"waited": [], "alone": []}
    drop_from_cache(options.store)
    # The first is waited for whatever reads it: nothing was computed before.
    for number, (_, seconds) in enumerate(timed(batches())):
        if number:
            found["waited"].append(seconds)
        drop_from_cache(options.store)
        time.sleep(step_seconds)
    drop_from_cache(options.store)
    start = time.perf_counter()
    for _ in batches():
        drop_from_cache(options.store)
    alone = options.steps * rows * length / (time.perf_counter() - start)
    share = sum(found["waited"]) / (len(found["waited"]) * step_seconds + sum(found["waited"]))
    print(
        f"{rows} rows of {length:,} tokens a step of {step_seconds * 1e3:.0f} ms "
        f"({options.tokens_per_second:,.0f} tokens/s): waited {share:.3%} of the time, "
        f"{statistics.median(found['waited']) * 1e3:.2f} ms a step and at most "
        f"{max(found['waited']) * 1e3:.2f}; input alone {alone:,.0f} tokens/s, "
        f"{alone / options.tokens_per_second:.0f} times that"
    )


if __name__ == "__main__":
    main()
