"""Stored columns to the arrays a trainer uses, and the rules that stored columns obey.

Pure NumPy. The writer checks rows against these rules, the verifier checks stored rows against
them, and the reader decodes what obeys them.
"""

from dataclasses import dataclass

import numpy as np

from logit_store import layout
from logit_store.codec import decode_weights
from schemas.manifest import TargetsManifest


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


def check_targets(
    manifest: TargetsManifest, segment_ids: np.ndarray, targets: TargetRows, first_row: int
) -> None:
    """Raise ValueError naming the first row of `targets` that breaks a rule of the format."""
    rows, length = targets.entry_count.shape
    slots, block = manifest.sampler.entries_per_block, manifest.sampler.block_tokens
    blocks = length // block

    def refuse(bad: np.ndarray, rule: str) -> None:
        if bad.any():
            row = int(np.argwhere(bad.reshape(rows, -1).any(axis=1))[0, 0])
            raise ValueError(f"{rule}, but row {first_row + row} breaks this rule.")

    floor = targets.weight_floor
    refuse(~((floor > 0) & (floor <= 1)), "Weight floors lie in (0, 1]")
    predicted = layout.predicted_mask(segment_ids)
    refuse(
        ~predicted & (targets.entry_count > 0),
        "Only a position whose next token is of the same document may have entries",
    )
    used = targets.entry_count.reshape(rows, blocks, block).sum(axis=2, dtype=np.int64)
    refuse(used > slots, f"A block holds at most {slots} entries")
    in_use = np.arange(slots) < used[:, :, None]
    ids = targets.entry_id.reshape(rows, blocks, slots)
    refuse(
        (ids == layout.UNUSED_ID) == in_use,
        "A block's used slots come first, and unused ones hold 0xFFFFFFFF",
    )
    vocab_size = manifest.teacher.vocab_size
    refuse(in_use & (ids >= vocab_size), f"Entry ids are below the vocabulary size {vocab_size}")
    positions = decode_entries(manifest, targets).entry_position.reshape(rows, blocks, slots)
    same = (positions[:, :, 1:] == positions[:, :, :-1]) & in_use[:, :, 1:]
    refuse(
        same & (ids[:, :, 1:] <= ids[:, :, :-1]),
        "Ids of one position are strictly increasing",
    )
    finite = np.isfinite(targets.teacher_entropy) & np.isfinite(targets.label_logprob)
    refuse(~finite, "Entropies and log-probabilities are finite")
