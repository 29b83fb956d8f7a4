"""The entry code: a position's points on ids, as counts, bucket differences and offset bits.

A position's weights are whole numbers of points over their number n, so that they sum to 1. Ids are
ranked by how often they occur and ranks are grouped into buckets of 2^b ids of about equal expected
use: an id is a bucket, stored as the difference from the one before (which a general compressor
then codes within 3 % of the ids' entropy), and b plain bits. `docs/format.md` is the specification;
encoding is NumPy, decoding Numba. Nothing here reads or writes a store.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit

from logit_store import buffers
from schemas.errors import CorruptStoreError

UNUSED = -1
MOST_BUCKET_BITS = 15
"""Offsets of at most 15 bits, read from any bit, lie within three bytes."""
_TABLE_BITS = 4
# Expected entries of a bucket, as a share of a position's slots. Measured flat from 1/10 to 1/40.
_SLOTS_PER_BUCKET = 1 / 20
# Of an id that the sample of tokens does not hold, in occurrences.
_UNSEEN = 0.3
_NATS_DIVISOR = 1024
LARGEST_NATS = 255**2 / _NATS_DIVISOR

_OK, _TOO_MANY, _NO_ID, _TOO_MANY_POINTS, _TOO_MANY_BITS = range(5)
_FAULTS = {
    _TOO_MANY: "a block has more entries than slots",
    _NO_ID: "an entry's bucket or offset is beyond the vocabulary",
    _TOO_MANY_POINTS: "a position's heads have more points than the position",
    _TOO_MANY_BITS: "the entries have more offset bits than there are",
}


@dataclass(frozen=True)
class Vocabulary:
    """The tables that entries are coded by.

    order uint32 [V + 1], the id of each rank; the last id, V, stands for all ids that have no entry
    of their own. bucket_bits uint8 [buckets], b of each bucket in the order of ranks.
    """

    order: np.ndarray
    bucket_bits: np.ndarray

    @cached_property
    def rank(self) -> np.ndarray:
        """int64 [V + 1], the rank of each id."""
        rank = np.empty(len(self.order), np.int64)
        rank[self.order] = np.arange(len(self.order))
        return rank

    @cached_property
    def bucket_first(self) -> np.ndarray:
        """int64 [buckets + 1], the first rank of each bucket, and the end."""
        return np.concatenate([[0], np.cumsum(1 << self.bucket_bits.astype(np.int64))])

    @cached_property
    def bucket_table(self) -> np.ndarray:
        """uint32 [buckets]: first rank and bits of each bucket, as the decoder reads them."""
        first = self.bucket_first[:-1].astype(np.uint32)
        return (first << _TABLE_BITS) | self.bucket_bits.astype(np.uint32)

    @cached_property
    def bits_of_rank(self) -> np.ndarray:
        """int64 [V + 1], the offset bits of each rank's bucket."""
        bits = self.bucket_bits.astype(np.int64)
        return np.repeat(bits, 1 << bits)

    def fault(self, vocab_size: int) -> str | None:
        """What makes the tables unusable, or None."""
        if not np.array_equal(np.sort(self.order), np.arange(vocab_size + 1)):
            return "vocabulary_order is not a permutation of the ids and the rest"
        if not len(self.bucket_bits) or self.bucket_bits.max() > MOST_BUCKET_BITS:
            return f"a bucket has more than {MOST_BUCKET_BITS} bits"
        if self.bucket_first[-1] != len(self.order):
            return "the buckets do not hold as many ids as there are"
        return None


def make_vocabulary(counts: np.ndarray, slots_per_token: int) -> Vocabulary:
    """Tables for ids that occur as often as int [V] `counts` says, in a sample of tokens."""
    order = np.argsort(-counts, kind="stable")
    expected = counts[order] + _UNSEEN
    # The rest, which only some samplers store, has a bucket of its own.
    ends = np.concatenate([[0.0], np.cumsum(expected / expected.sum())])
    most = _SLOTS_PER_BUCKET / slots_per_token
    bits, first, size = [], 0, len(order)
    width = 0
    while first < size:
        # Rarer ids follow, so a bucket is never smaller than the one before but for the last.
        while (
            width < MOST_BUCKET_BITS
            and first + (2 << width) <= size
            and ends[first + (2 << width)] - ends[first] <= most
        ):
            width += 1
        while first + (1 << width) > size:
            width -= 1
        bits.append(width)
        first += 1 << width
    return Vocabulary(
        np.concatenate([order, [size]]).astype(np.uint32), np.asarray([*bits, 0], np.uint8)
    )


@dataclass(frozen=True)
class RowEntries:
    """One row's entries before they are stored: position, id and points int64 [n], in any order."""

    position: np.ndarray
    id: np.ndarray
    points: np.ndarray


def offset_bytes(slots: int) -> int:
    """Bytes of a row's offset bits: one for each slot, and two that a reader may read beyond.

    On text like that the buckets were made for, an entry needs four bits; the other four are for
    text that is not.
    """
    return slots + 2


def points_dtype(points: int) -> str:
    """Dtype of `head_points`, which are stored less two."""
    return "uint8" if points - 2 <= np.iinfo(np.uint8).max else "uint16"


def offset_bits(vocabulary: Vocabulary, ids: np.ndarray) -> int:
    """Offset bits that entries with these ids need."""
    return int(vocabulary.bits_of_rank[vocabulary.rank[ids]].sum())


def encode_row(
    vocabulary: Vocabulary, entries: RowEntries, sequence_tokens: int, slots: int, points: int
) -> dict[str, np.ndarray]:
    """The four columns of a row with `slots` slots: head_count [L], head_points, entry_bucket [E]
    and entry_offset [E + 2].

    Heads are the entries of two points or more; they come first. The caller has checked that the
    entries and their offset bits fit, and that all points of a position (at most `points`) are
    there.
    """
    is_tail = entries.points == 1
    order = np.lexsort((vocabulary.rank[entries.id], entries.position, is_tail))
    position, is_tail = entries.position[order], is_tail[order]
    rank = vocabulary.rank[entries.id[order]]
    bucket = np.searchsorted(vocabulary.bucket_first, rank, side="right") - 1
    follows = (position[1:] == position[:-1]) & (is_tail[1:] == is_tail[:-1])
    difference = bucket.copy()
    difference[1:] -= np.where(follows, bucket[:-1], 0)
    heads = len(rank) - int(is_tail.sum())
    head_points = np.zeros(slots, points_dtype(points))
    head_points[:heads] = entries.points[order[:heads]] - 2
    entry_bucket = np.zeros(slots, np.uint16)
    entry_bucket[: len(rank)] = difference
    entry_offset = np.zeros(offset_bytes(slots), np.uint8)
    packed = _pack_bits(rank - vocabulary.bucket_first[bucket], vocabulary.bucket_bits[bucket])
    entry_offset[: len(packed)] = packed
    return {
        "head_count": np.bincount(position[:heads], minlength=sequence_tokens).astype(np.uint16),
        "head_points": head_points,
        "entry_bucket": entry_bucket,
        "entry_offset": entry_offset,
    }


def _pack_bits(values: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """uint8: the lowest widths[i] bits of values[i], one after another, lowest bit first."""
    ends = np.cumsum(widths, dtype=np.int64)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for bit in range(int(widths.max(initial=0))):
        wide = widths > bit
        bits[ends[wide] - widths[wide] + bit] = (values[wide] >> bit) & 1
    return np.packbits(bits, bitorder="little")


@dataclass(frozen=True)
class Entries:
    """Decoded entries of R rows; E slots a row, block b of a row owning its share of them in order.

    entry_id int32 [R, E], -1 unused, V the rest; entry_weight float32 [R, E], 0 unused; head_count
    and tail_count uint16 [R, L], entries of each position. A block's heads come first, then its
    tails, then unused slots; heads and tails are each sorted by position, then by rank.
    """

    entry_id: np.ndarray
    entry_weight: np.ndarray
    head_count: np.ndarray
    tail_count: np.ndarray

    @staticmethod
    def empty(head_count: np.ndarray, slots: int) -> "Entries":
        """Room for the entries of rows with head_count [R, L]."""
        rows = len(head_count)
        return Entries(
            buffers.empty((rows, slots), np.int32),
            buffers.empty((rows, slots), np.float32),
            head_count,
            np.empty(head_count.shape, np.uint16),
        )


def entry_positions(
    head_count: np.ndarray, tail_count: np.ndarray, block_tokens: int, slots_per_block: int
) -> np.ndarray:
    """int32 [R, E]: the position in its row of each entry, and of unused slots the block's last."""
    rows, length = head_count.shape
    blocks = length // block_tokens
    shape = (rows, blocks, block_tokens)
    unused = np.zeros((rows, blocks, 1), np.int64)
    counts = np.concatenate(
        [head_count.reshape(shape), tail_count.reshape(shape), unused], axis=2, dtype=np.int64
    )
    counts[:, :, -1] = slots_per_block - counts.sum(axis=2)
    within = np.arange(block_tokens)
    position = np.concatenate([within, within, within[-1:]])
    position = position + np.arange(blocks)[:, None] * block_tokens
    flat = np.repeat(np.tile(position.reshape(-1), rows), counts.reshape(-1))
    return flat.reshape(rows, -1).astype(np.int32)


def decode_rows(
    vocabulary: Vocabulary,
    predicted: np.ndarray,
    columns: dict[str, np.ndarray],
    block_tokens: int,
    slots_per_block: int,
) -> Entries:
    """Entries of rows with `predicted` bool [R, L] and columns as stored.

    columns: head_count uint16 [R, L], head_points uint8 or uint16 [R, E], entry_bucket uint16
    [R, E], entry_offset uint8 [R, E + 2], block_points uint16 [R, blocks]. Raises CorruptStoreError
    naming the row (by its place in the columns) and the rule it breaks; never reads or writes out
    of bounds.
    """
    entries = Entries.empty(columns["head_count"], columns["entry_bucket"].shape[1])
    for row in range(len(entries.entry_id)):
        _decode(vocabulary, predicted, columns, block_tokens, slots_per_block, entries, row)
    return entries


def _decode(
    vocabulary: Vocabulary,
    predicted: np.ndarray,
    columns: dict[str, np.ndarray],
    block_tokens: int,
    slots_per_block: int,
    entries: Entries,
    row: int,
) -> np.ndarray:
    """Fill one row of `entries`; returns int64 [3]: the row's heads, entries and offset bits."""
    extent = np.zeros(3, np.int64)
    status = _decode_row(
        predicted[row],
        columns["head_count"][row],
        columns["head_points"][row],
        columns["entry_bucket"][row],
        columns["entry_offset"][row],
        columns["block_points"][row],
        vocabulary.order,
        vocabulary.bucket_table,
        block_tokens,
        slots_per_block,
        entries.entry_id[row],
        entries.entry_weight[row],
        entries.tail_count[row],
        extent,
    )
    if status != _OK:
        raise CorruptStoreError(
            f"A stored row must obey the format's rules, but in row {row} of those that were read "
            f"{_FAULTS[status]}; run `retort verify`."
        )
    return extent


def check_rows(
    vocabulary: Vocabulary,
    predicted: np.ndarray,
    columns: dict[str, np.ndarray],
    block_tokens: int,
    slots_per_block: int,
    first_row: int,
) -> Entries:
    """As decode_rows, but rows must be exactly as `encode_row` writes them.

    Raises ValueError naming the row, counted from `first_row`, and the rule.
    """
    entries = Entries.empty(columns["head_count"], columns["entry_bucket"].shape[1])
    for row in range(len(entries.entry_id)):
        try:
            heads, used, bits = _decode(
                vocabulary, predicted, columns, block_tokens, slots_per_block, entries, row
            )
        except CorruptStoreError as error:
            raise ValueError(f"Row {first_row + row} is not as the format says: {error}") from error
        last = columns["entry_offset"][row, bits // 8]
        if (
            columns["head_points"][row, heads:].any()
            or columns["entry_bucket"][row, used:].any()
            or columns["entry_offset"][row, bits // 8 + 1 :].any()
            or last >> (bits % 8)
        ):
            raise ValueError(
                f"Unused slots and bits hold 0, but row {first_row + row} breaks this rule."
            )
        if _is_out_of_order(
            columns["head_count"][row],
            entries.tail_count[row],
            entries.entry_id[row],
            vocabulary.rank,
            block_tokens,
            slots_per_block,
        ):
            raise ValueError(
                "A list's ids increase strictly in rank, and a position has one entry of each, but "
                f"row {first_row + row} breaks this rule."
            )
    return entries


@njit(nogil=True, cache=True)
def _is_out_of_order(head_count, tail_count, entry_id, rank, block_tokens, slots_per_block):
    """Whether a list of a decoded row does not increase, or a head's id is a tail's too."""
    for block in range(len(head_count) // block_tokens):
        first, stop = block * block_tokens, (block + 1) * block_tokens
        head = block * slots_per_block
        tail = head + np.sum(head_count[first:stop])
        for position in range(first, stop):
            head_stop = head + head_count[position]
            tail_stop = tail + tail_count[position]
            for list_first, list_stop in ((head, head_stop), (tail, tail_stop)):
                for entry in range(list_first + 1, list_stop):
                    if rank[entry_id[entry]] <= rank[entry_id[entry - 1]]:
                        return True
            while head < head_stop and tail < tail_stop:
                a, b = rank[entry_id[head]], rank[entry_id[tail]]
                if a == b:
                    return True
                if a < b:
                    head += 1
                else:
                    tail += 1
            head, tail = head_stop, tail_stop
    return False


@njit(nogil=True, cache=True)
def _decode_row(
    predicted,
    head_count,
    head_points,
    entry_bucket,
    entry_offset,
    block_points,
    order,
    bucket_table,
    block_tokens,
    slots_per_block,
    entry_id,
    entry_weight,
    tail_count,
    extent,
):  # fmt: skip
    """Fill entry_id, entry_weight [E], tail_count [L] and extent [3] of a row; returns a status."""
    blocks, room = len(block_points), len(entry_bucket)
    if len(entry_offset) < 3:
        return _TOO_MANY_BITS
    # Entries at which a list begins; those of empty lists are the next one's.
    is_first = np.zeros(room + 1, np.uint8)
    entry = np.int64(0)
    for block in range(blocks):
        points = np.int64(block_points[block])
        for position in range(block * block_tokens, (block + 1) * block_tokens):
            count = np.int64(head_count[position])
            if count > room - entry:
                return _TOO_MANY
            left = points if predicted[position] else np.int64(0)
            for more in head_points[entry : entry + count]:
                left -= np.int64(more) + 2
            if left < 0:
                return _TOO_MANY_POINTS
            is_first[entry] = 1
            tail_count[position] = left
            entry += count
    extent[0] = entry
    for count in tail_count:
        is_first[entry] = 1
        entry += np.int64(count)
        if entry > room:
            return _TOO_MANY
    extent[1] = entry

    entry, cursor = np.int64(0), np.int64(0)
    fill = np.zeros(blocks, np.int64)
    for tail in range(2):
        for block in range(blocks):
            span = slice(block * block_tokens, (block + 1) * block_tokens)
            count = np.sum(tail_count[span] if tail else head_count[span])
            stop = entry + count
            slot = block * slots_per_block + fill[block]
            if count > slots_per_block - fill[block]:
                return _TOO_MANY
            cursor = _decode_run(
                entry_bucket[entry:stop],
                is_first[entry:stop],
                entry_offset,
                order,
                bucket_table,
                cursor,
                entry_id[slot : slot + count],
            )
            if cursor < 0:
                return -cursor
            points = np.int64(block_points[block])
            # A block without points has no entries that would need a share.
            share = np.float32(1.0) / np.float32(points + (points == 0))
            if tail:
                end = (block + 1) * slots_per_block
                entry_weight[slot : slot + count] = share
                entry_weight[slot + count : end] = 0.0
                entry_id[slot + count : end] = UNUSED
            else:
                for index in range(count):
                    weight = np.float32(np.int64(head_points[entry + index]) + 2)
                    entry_weight[slot + index] = weight * share
                fill[block] = count
            entry = stop
    extent[2] = cursor
    return _OK


@njit(nogil=True, cache=True)
def _decode_run(entry_bucket, is_first, entry_offset, order, bucket_table, cursor, entry_id):
    """Fill entry_id [n] of n entries whose offsets begin at a bit; returns the bit behind them.

    Or less the status of what is wrong. All indices are unsigned: for signed ones Numba asks each
    time whether they count from the end, which took a third of the time.
    """
    eight, one = np.uint64(3), np.uint64(1)
    last_byte = np.uint64(len(entry_offset) - 3)
    buckets, mask = np.uint32(len(bucket_table)), np.uint32((1 << _TABLE_BITS) - 1)
    bit, bucket = np.uint64(cursor), np.uint32(0)
    entry, stop = np.uint64(0), np.uint64(len(entry_bucket))
    while entry < stop:
        # Without a branch: 0 where a list begins, else the bucket before.
        before = bucket & (np.uint32(is_first[entry]) - np.uint32(1))
        bucket = before + np.uint32(entry_bucket[entry])
        byte = bit >> eight
        if bucket >= buckets:
            return -np.int64(_NO_ID)
        if byte > last_byte:
            return -np.int64(_TOO_MANY_BITS)
        found = bucket_table[np.uint64(bucket)]
        width = found & mask
        three = (
            np.uint32(entry_offset[byte])
            | (np.uint32(entry_offset[byte + one]) << np.uint32(8))
            | (np.uint32(entry_offset[byte + one + one]) << np.uint32(16))
        )
        offset = (three >> np.uint32(bit & np.uint64(7))) & ((np.uint32(1) << width) - np.uint32(1))
        entry_id[entry] = np.int32(order[np.uint64((found >> np.uint32(_TABLE_BITS)) + offset)])
        bit += np.uint64(width)
        entry += one
    return np.int64(bit)


def encode_nats(values: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """uint8 codes c of nats ≥ 0, of which each stands for c² / 1024, rounded without bias.

    A step is √v / 16 wide at v nats: 0.1 at 3, 0.01 at 0.03. uniforms in [0, 1), of the shape of
    `values`; what exceeds LARGEST_NATS is stored as that.
    """
    values = np.clip(np.asarray(values, np.float64), 0.0, LARGEST_NATS)
    lower = np.minimum(np.floor(np.sqrt(values * _NATS_DIVISOR)), 254)
    chance = (values * _NATS_DIVISOR - lower**2) / (2 * lower + 1)
    return (lower + (uniforms < chance)).astype(np.uint8)


def decode_nats(codes: np.ndarray) -> np.ndarray:
    """float32 nats of uint8 codes."""
    return np.square(codes.astype(np.float32)) / np.float32(_NATS_DIVISOR)
