"""A check, before the first step, that stored targets belong to the tokens beside them.

A teacher puts more weight on the token that comes next than on its neighbours. Targets that are
shifted by one position, or stored against other rows, do not.
"""

from typing import NamedTuple

import numpy as np

from logit_store.codec import entry_positions
from logit_store.layout import predicted_mask
from schemas.errors import AlignmentError
from schemas.manifest import SamplerSpec
from student_train.data import Batch


class NeighbourWeights(NamedTuple):
    """Mean stored weight that position t puts on the token at t, at t + 1 and at t + 2."""

    own: float
    next: float
    after_next: float


def neighbour_weights(batch: Batch, sampler: SamplerSpec) -> NeighbourWeights:
    """Means over the positions t of which t + 1 and t + 2 are of the same document; NumPy only."""
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segment_ids)
    usable = predicted_mask(segments)
    usable[:, :-1] &= usable[:, 1:]
    row = np.arange(len(tokens))[:, None]
    position = entry_positions(
        np.asarray(batch.head_count),
        np.asarray(batch.tail_count),
        sampler.block_tokens,
        sampler.slots_per_block,
    )
    entry_usable = usable[row, position] & (np.asarray(batch.entry_id) >= 0)
    count = max(1, int(usable.sum()))
    means = []
    for offset in range(3):
        column = np.minimum(position + offset, tokens.shape[1] - 1)
        hit = entry_usable & (batch.entry_id == tokens[row, column])
        means.append(float(np.sum(batch.entry_weight, where=hit, dtype=np.float64)) / count)
    return NeighbourWeights(*means)


def check_alignment(batch: Batch, sampler: SamplerSpec, where: str) -> NeighbourWeights:
    """Raise AlignmentError unless the next token's mean weight exceeds both its neighbours'."""
    found = neighbour_weights(batch, sampler)
    if not found.next > max(found.own, found.after_next):
        raise AlignmentError(
            "Stored targets must put more weight on the next token than on its neighbours, but "
            f"those of {where} put {found.own:.4f} on the token itself, {found.next:.4f} on the "
            f"next and {found.after_next:.4f} on the one after; dump them again from these tokens "
            "with a trained teacher."
        )
    return found
