"""Batches as a pure function of (step, seed, store).

There is no iterator state: the rows of a step are found by arithmetic from a stateless permutation
of each epoch, so that a run resumes at any step, on any number of hosts, and two students with one
seed see the same rows in the same order, whatever their targets. Each host reads its own rows.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from logit_store.reader import TargetsReader, TokensReader
from schemas.errors import IncompleteStoreError
from schemas.manifest import TargetsManifest, TokensManifest, identity
from student_train.batch import Batch, label_batch

_ROUNDS = 6
AHEAD = 8
"""Batches that are read at once: a read from a bucket may take as long as several steps."""


def permuted(index: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """int64 images of `index` (values in [0, size)) under the permutation of [0, size) by `key`.

    A Feistel network on the smallest even number of bits that holds `size`, walked until the image
    is below it (Black and Rogaway 2002): O(1) memory for any number of rows.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    round_keys = [
        np.frombuffer(hashlib.sha256(key + bytes([number])).digest()[:8], "<u8")[0]
        for number in range(_ROUNDS)
    ]

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << shift) | right

    values = encrypt(np.asarray(index).astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), wrapping at 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class RowOrder(NamedTuple):
    """Which rows a step takes: every epoch is another permutation of the first `num_rows`."""

    num_rows: int
    seed: int
    tokens_identity: str
    """Identity of the store's tokens; the targets have no say."""

    def rows(self, step: int, batch_sequences: int) -> np.ndarray:
        """int64 [B] rows of the 0-based `step`; a batch may reach into the next epoch."""
        index = step * batch_sequences + np.arange(batch_sequences, dtype=np.int64)
        epoch, place = np.divmod(index, self.num_rows)
        rows = np.empty_like(index)
        for number in np.unique(epoch):
            key = hashlib.sha256(f"{self.seed}/{self.tokens_identity}/{number}".encode()).digest()
            chosen = epoch == number
            rows[chosen] = permuted(place[chosen], self.num_rows, key)
        return rows


class Source(Protocol):
    """A store as the trainer reads it."""

    tokens_manifest: TokensManifest
    targets_manifest: TargetsManifest | None
    num_rows: int
    """Rows that are drawn from, the first of the store."""

    def read(self, rows: np.ndarray) -> Batch:
        """The given rows, in their order, as NumPy arrays."""


class StoreSource:
    """A store's rows, with one set of targets or without (`targets` None).

    Rows are drawn from all shards. Of a store that is still being written (`partial`), they are
    drawn from the whole shards before the first that is missing; `rows` is how many an earlier part
    of the run drew from, and then so many again, whatever was written since.

    Raises IncompleteStoreError if a shard that is needed is not committed.
    """

    def __init__(
        self, store: str, targets: str | None, *, partial: bool = False, rows: int | None = None
    ):
        self._targets = None if targets is None else TargetsReader(store, targets)
        self._tokens = TokensReader(store) if self._targets is None else self._targets.tokens
        self.tokens_manifest = self._tokens.manifest
        self.targets_manifest = None if self._targets is None else self._targets.manifest
        total = self.tokens_manifest.num_sequences
        self.num_rows = total if rows is None else min(rows, total)
        for what, reader in (("tokens", self._tokens), (f"targets '{targets}'", self._targets)):
            if reader is None or reader.committed.all():
                continue
            committed = f"{reader.committed.sum()} of the {reader.manifest.num_shards} shards"
            if not partial:
                raise IncompleteStoreError(
                    f"Training draws from all rows, but only {committed} of the {what} of {store} "
                    "are committed; run the job that writes them again, or train on those before "
                    "the first missing one with --partial_store."
                )
            missing = int(np.argmin(reader.committed))
            prefix = missing * reader.manifest.shard_sequences
            if rows is not None and prefix < rows:
                raise IncompleteStoreError(
                    f"The run draws from the first {rows} rows, but shard {missing} of the {what} "
                    f"of {store} is no longer committed; run the job that writes it again."
                )
            if prefix == 0:
                raise IncompleteStoreError(
                    f"Training on a part of a store needs its first shards, but shard 0 of the "
                    f"{what} of {store} is not committed; wait for it."
                )
            self.num_rows = min(self.num_rows, prefix)

    def read(self, rows: np.ndarray) -> Batch:
        if self._targets is None:
            found = self._tokens.rows(rows)
            return label_batch(found.tokens, found.segment_ids)
        stored = self._targets.rows(rows)
        # What top_k stores of all other ids is no id to learn from.
        is_rest = stored.entry_id == self._targets.manifest.teacher.vocab_size
        stored.entry_id[is_rest], stored.entry_weight[is_rest] = -1, 0.0
        return Batch(*(getattr(stored, name) for name in Batch._fields))


def row_order(source: Source, seed: int) -> RowOrder:
    """The order in which a run with `seed` reads a store."""
    manifest = source.tokens_manifest
    return RowOrder(source.num_rows, seed, identity(manifest))


def place(rows: np.ndarray, read: Callable[[np.ndarray], Batch], where: NamedSharding) -> Batch:
    """The global batch of `rows` [B], of which this host reads only what its devices hold."""
    total = len(rows)
    slices = where.addressable_devices_indices_map((total,)).values()
    mine = np.unique(np.concatenate([np.arange(total)[index] for index in slices]))
    local = read(rows[mine])

    def global_array(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(total)
            first = int(np.searchsorted(mine, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((total, *array.shape[1:]), where, part)

    return Batch(*(global_array(np.asarray(array)) for array in local))


def prefetch(
    make: Callable[[int], Batch], first: int, stop: int, depth: int = AHEAD
) -> Generator[tuple[int, Batch], None, None]:
    """(step, make(step)) for steps in [first, stop), in order; `depth` are made at once, ahead.

    One thread for each, so that a step waits for a read only if `depth` steps take less time than
    one read. An exception of `make` is raised here, at its step. Closing the iterator waits for
    what is being made and starts nothing more.
    """
    pool = ThreadPoolExecutor(depth, thread_name_prefix="prefetch")
    steps = iter(range(first, stop))
    waiting = deque((step, pool.submit(make, step)) for step in islice(steps, depth))
    try:
        while waiting:
            step, made = waiting.popleft()
            batch = made.result()
            waiting.extend((step, pool.submit(make, step)) for step in islice(steps, 1))
            yield step, batch
    finally:
        pool.shutdown(cancel_futures=True)
