"""Tokens, documents and targets made up in memory, as a store's rows are shaped; NumPy alone."""

from typing import NamedTuple

import numpy as np


class Documents(NamedTuple):
    """How rows are packed."""

    segment_ids: np.ndarray
    """int32 [B, L], from 1."""
    lengths: np.ndarray
    """int [N], tokens of each document's part in its row."""


class Entries(NamedTuple):
    """Entries of B rows, in the order of the store's slots; see `student_train.batch.Batch`."""

    entry_id: np.ndarray
    entry_weight: np.ndarray
    head_count: np.ndarray
    tail_count: np.ndarray
    mean: float
    """Entries of a predicted position."""


def zipf_ids(random: np.random.Generator, vocab: int, shape: tuple[int, ...]) -> np.ndarray:
    """int32 ids with P(id = k) about 1 / k, as words are in text: few of them make up most."""
    return np.minimum(np.exp(random.random(shape) * np.log(vocab)), vocab - 1).astype(np.int32)


def make_documents(
    random: np.random.Generator, rows: int, length: int, mean_tokens: int | None
) -> Documents:
    """Rows without padding: one document each, or documents of exponential lengths."""
    segment_ids = np.ones((rows, length), np.int32)
    if mean_tokens is None:
        return Documents(segment_ids, np.full(rows, length))
    lengths: list[int] = []
    for row in segment_ids:
        at, number = 0, 1
        while at < length:
            tokens = min(2 + int(random.exponential(mean_tokens - 2)), length - at)
            row[at : at + tokens] = number
            lengths.append(tokens)
            at, number = at + tokens, number + 1
    return Documents(segment_ids, np.array(lengths))


def make_entries(
    random: np.random.Generator,
    segment_ids: np.ndarray,
    *,
    mean_entries: int,
    block_tokens: int,
    slots_per_token: int,
    vocab: int,
) -> Entries:
    """Entries of geometrically distributed number, at least one of each predicted position.

    segment_ids [B, L]. A position whose entries no longer fit its block's slots gets fewer.
    """
    rows, length = segment_ids.shape
    blocks, slots = rows * (length // block_tokens), block_tokens * slots_per_token
    largest = min(vocab, 8 * mean_entries)
    counts = np.minimum(random.geometric(1 / mean_entries, (rows, length)), largest)
    counts[:, :-1] *= segment_ids[:, :-1] == segment_ids[:, 1:]
    counts[:, -1] = 0
    predicted = np.count_nonzero(counts)
    counts = counts.reshape(blocks, block_tokens)
    ends = np.minimum(np.cumsum(counts, axis=1), slots)
    counts = np.diff(ends, axis=1, prepend=0)
    heads = -(-counts // 3)
    runs = np.concatenate([heads, counts - heads], axis=1)
    run = np.repeat(np.arange(runs.size), runs.reshape(-1))  # of each entry
    starts = np.cumsum(runs.reshape(-1)) - runs.reshape(-1)
    block, place = np.divmod(run, 2 * block_tokens)
    position = place % block_tokens
    rank = (
        np.arange(len(run))
        - starts[run]
        + np.where(place < block_tokens, 0, heads[block, position])
    )
    first = zipf_ids(random, vocab, (blocks, block_tokens))[block, position]
    # Ids of a position are a progression, too short to come round to where it began.
    stride = random.integers(1, vocab // largest + 1, (blocks, block_tokens))[block, position]
    slot = np.arange(len(run)) - starts[2 * block_tokens * block]
    entry_id = np.full((blocks, slots), -1, np.int32)
    entry_id[block, slot] = (first + rank * stride) % vocab
    weight = random.exponential(1.0, len(run)) / (1 + rank)
    total = np.bincount(block * block_tokens + position, weight, blocks * block_tokens)
    entry_weight = np.zeros((blocks, slots), np.float32)
    entry_weight[block, slot] = weight / total[block * block_tokens + position]
    return Entries(
        entry_id=entry_id.reshape(rows, -1),
        entry_weight=entry_weight.reshape(rows, -1),
        head_count=heads.reshape(rows, length).astype(np.uint16),
        tail_count=(counts - heads).reshape(rows, length).astype(np.uint16),
        mean=len(run) / max(predicted, 1),
    )
