"""Stored columns to the arrays a trainer uses, the rules that stored columns obey, and their sums.

Pure NumPy. The writer checks rows against these rules, the verifier checks stored rows against
them, and the reader decodes what obeys them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from logit_store import layout
from logit_store.codec import decode_weights
from schemas.manifest import ShardStatistics, TargetsManifest, TokensManifest

# Rows whose entries are decoded at once: bounds memory, whatever the size of a shard.
_SLICE_ROWS = 32
# Entropies and log-probabilities may miss their bound of 0 by this much: producers round.
_SLACK_NATS = 1e-3


@dataclass(frozen=True)
class TargetRows:
    """Encoded targets of R rows, dtypes as stored.

    entry_count uint16 [R, L]; entry_id uint32 [R, E] with 0xFFFFFFFF in unused slots; entry_weight
    codes [R, E]; weight_floor float32 [R, L / block_tokens]; teacher_entropy and label_logprob
    float16 [R, L].
    """

    entry_count: np.ndarray
    entry_id: np.ndarray
    entry_weight: np.ndarray
    weight_floor: np.ndarray
    teacher_entropy: np.ndarray
    label_logprob: np.ndarray

    def part(self, rows: slice) -> "TargetRows":
        """Some of the rows."""
        return TargetRows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class Entries:
    """Decoded entries of R rows; E slots a row.

    entry_id int32 [R, E], -1 unused; entry_position int32 [R, E], the position in the row (of an
    unused slot: the last of its block); entry_weight float32 [R, E], 0 unused.
    """

    entry_id: np.ndarray
    entry_position: np.ndarray
    entry_weight: np.ndarray


def decode_entries(manifest: TargetsManifest, targets: TargetRows) -> Entries:
    """Decode ids, positions and weights of rows that obey the format's rules."""
    rows, length = targets.entry_count.shape
    block, slots = manifest.sampler.block_tokens, manifest.sampler.entries_per_block
    counts = targets.entry_count.reshape(rows * manifest.blocks_per_sequence, block)
    used = counts.sum(axis=1, dtype=np.int64)
    # Padding each block's last position up to its slots makes one flat repeat place every slot.
    repeats = counts.astype(np.int64)
    repeats[:, -1] += slots - used
    positions = np.repeat(
        np.tile(np.arange(length, dtype=np.int32), rows), repeats.reshape(-1)
    ).reshape(rows, -1)
    unused = targets.entry_id == layout.UNUSED_ID
    ids = targets.entry_id.astype(np.int32)
    ids[unused] = -1
    floor = np.repeat(targets.weight_floor, slots, axis=1)
    weights = decode_weights(targets.entry_weight, floor, manifest.weight_code)
    weights[unused] = 0.0
    return Entries(ids, positions, weights)


def entry_masses(manifest: TargetsManifest, targets: TargetRows) -> np.ndarray:
    """Stored mass of each position, float64 [R, L]."""
    entries = decode_entries(manifest, targets)
    rows, length = targets.entry_count.shape
    flat = entries.entry_position + np.arange(rows, dtype=np.int64)[:, None] * length
    return np.bincount(
        flat.reshape(-1), entries.entry_weight.reshape(-1), minlength=rows * length
    ).reshape(rows, length)


def row_slices(rows: int) -> Iterator[slice]:
    """Slices of a few rows each that cover `rows`."""
    for start in range(0, rows, _SLICE_ROWS):
        yield slice(start, min(start + _SLICE_ROWS, rows))


def check_tokens(
    manifest: TokensManifest, tokens: np.ndarray, segment_ids: np.ndarray, first_row: int
) -> None:
    """Raise ValueError naming the first row [L] of tokens and segment ids that breaks a rule."""
    vocab_size = manifest.tokenizer.vocab_size
    _refuse(
        (tokens < 0) | (tokens >= vocab_size),
        f"Tokens are ids in [0, {vocab_size})",
        first_row,
        tokens,
    )
    numbers = segment_ids.astype(np.int64)
    step = np.diff(numbers, axis=1)
    wrong = np.zeros(numbers.shape, bool)
    wrong[:, 0] = numbers[:, 0] > 1
    wrong[:, 1:] = (step != 0) & (step != 1) & (numbers[:, 1:] != 0)
    wrong[:, 1:] |= (numbers[:, :-1] == 0) & (step != 0)
    _refuse(
        wrong,
        "Segment ids count a row's documents from 1, and 0 is padding at the end",
        first_row,
        segment_ids,
    )


def tokens_statistics(segment_ids: np.ndarray) -> ShardStatistics:
    """What a tokens shard's record sums up, of segment ids [R, L]."""
    return ShardStatistics(
        tokens=int(np.count_nonzero(segment_ids)),
        predicted_tokens=int(np.count_nonzero(layout.predicted_mask(segment_ids))),
    )


def targets_statistics(
    manifest: TargetsManifest, segment_ids: np.ndarray, targets: TargetRows
) -> ShardStatistics:
    """What a targets shard's record sums up, of R rows that obey the format's rules."""
    predicted = layout.predicted_mask(segment_ids)
    mass = 0.0
    for rows in row_slices(len(segment_ids)):
        mass += float(entry_masses(manifest, targets.part(rows))[predicted[rows]].sum())
    return ShardStatistics(
        tokens=int(np.count_nonzero(segment_ids)),
        predicted_tokens=int(np.count_nonzero(predicted)),
        entries=int(targets.entry_count.sum(dtype=np.int64)),
        max_entries=int(targets.entry_count.max(initial=0)),
        mass_sum=mass,
        entropy_sum_nats=float(targets.teacher_entropy[predicted].sum(dtype=np.float64)),
        label_logprob_sum_nats=float(targets.label_logprob[predicted].sum(dtype=np.float64)),
    )


def check_targets(
    manifest: TargetsManifest, segment_ids: np.ndarray, targets: TargetRows, first_row: int
) -> None:
    """Raise ValueError naming the first row of `targets` that breaks a rule of the format."""
    for rows in row_slices(len(segment_ids)):
        _check_slice(manifest, segment_ids[rows], targets.part(rows), first_row + rows.start)


def _refuse(bad: np.ndarray, rule: str, first_row: int, values: np.ndarray) -> None:
    """bad [R, ...] of the shape of `values`: raise ValueError for the first that is True."""
    if bad.any():
        where = tuple(np.argwhere(bad)[0])
        raise ValueError(
            f"{rule}, but row {first_row + int(where[0])} breaks this rule: it holds "
            f"{values[where]}."
        )


def _check_slice(
    manifest: TargetsManifest, segment_ids: np.ndarray, targets: TargetRows, first_row: int
) -> None:
    rows, length = targets.entry_count.shape
    slots, block = manifest.sampler.entries_per_block, manifest.sampler.block_tokens
    blocks = length // block

    def refuse(bad: np.ndarray, rule: str, values: np.ndarray) -> None:
        _refuse(bad, rule, first_row, values)

    floor = targets.weight_floor
    refuse(~((floor > 0) & (floor <= 1)), "Weight floors lie in (0, 1]", floor)
    predicted = layout.predicted_mask(segment_ids)
    refuse(
        ~predicted & (targets.entry_count > 0),
        "Only a position whose next token is of the same document may have entries",
        targets.entry_count,
    )
    used = targets.entry_count.reshape(rows, blocks, block).sum(axis=2, dtype=np.int64)
    refuse(used > slots, f"A block holds at most {slots} entries", used)
    in_use = np.arange(slots) < used[:, :, None]
    ids = targets.entry_id.reshape(rows, blocks, slots)
    refuse(
        (ids == layout.UNUSED_ID) == in_use,
        "A block's used slots come first, and unused ones hold 0xFFFFFFFF",
        ids,
    )
    vocab_size = manifest.teacher.vocab_size
    refuse(
        in_use & (ids >= vocab_size), f"Entry ids are below the vocabulary size {vocab_size}", ids
    )
    positions = decode_entries(manifest, targets).entry_position.reshape(rows, blocks, slots)
    same = (positions[:, :, 1:] == positions[:, :, :-1]) & in_use[:, :, 1:]
    refuse(
        same & (ids[:, :, 1:] <= ids[:, :, :-1]),
        "Ids of one position are strictly increasing",
        ids[:, :, 1:],
    )
    for values, sign, rule in (
        (targets.teacher_entropy, 1, "Entropies are finite and not negative"),
        (targets.label_logprob, -1, "Log-probabilities are finite and not positive"),
    ):
        refuse(~(np.isfinite(values) & (sign * values >= -_SLACK_NATS)), rule, values)
        refuse(
            ~predicted & (values != 0),
            "Entropy and log-probability are 0 where the next token is not of the same document",
            values,
        )
