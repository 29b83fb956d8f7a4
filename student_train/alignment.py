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
from student_train.batch import Batch


class NeighbourWeights(NamedTuple):
    """Mean stored weight that position t puts on the token at t, at t + 1 and at t + 2."""

    own: float
    next: float
    after_next: float


def neighbour_weights(batch: Batch, sampler: SamplerSpec) -> NeighbourWeights:
    """Means over the positions t of which t + 1 and t + 2 are of the same document; NumPy only."""
    weights, usable = _position_weights(batch, sampler)
    count = max(1, int(usable.sum()))
    return NeighbourWeights(*(float(found[usable].sum()) / count for found in weights))


def _position_weights(batch: Batch, sampler: SamplerSpec) -> tuple[np.ndarray, np.ndarray]:
    """float64 [3, R, L] weight that each position puts on the token there, next and after that.

    With bool [R, L]: the positions t of which t + 1 and t + 2 are of the same document.
    """
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
    weight = np.where(np.asarray(batch.entry_id) >= 0, batch.entry_weight, 0.0)
    place = row * tokens.shape[1] + position
    found = []
    for offset in range(3):
        column = np.minimum(position + offset, tokens.shape[1] - 1)
        hit = batch.entry_id == tokens[row, column]
        found.append(np.bincount(place[hit], weight[hit], minlength=tokens.size))
    return np.stack(found).reshape(3, *tokens.shape), usable


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


# Of a sum of differences over the root of the sum of their squares: if neither token were favoured,
# it would exceed this once in 10^7 shards (Hoeffding: exp(-18)); a hundred tokens of a teacher that
# knows something are enough to exceed it.
_CERTAIN = 6.0


class ShardAlignment:
    """Holds the rows of each shard against their tokens, until it has been vouched for.

    One misplaced shard among many would not show in means over all. Costs a look at the first
    rows of each shard that this process reads, and nothing after; threads may share it.
    """

    def __init__(self, sampler: SamplerSpec, shard_sequences: int, where: str):
        self._sampler, self._shard_sequences, self._where = sampler, shard_sequences, where
        self._settled: set[int] = set()

    def check(self, rows: np.ndarray, batch: Batch) -> None:
        """Raise AlignmentError if rows of a shard favour a neighbour of the next token."""
        shards = rows // self._shard_sequences
        unsettled = [shard for shard in np.unique(shards).tolist() if shard not in self._settled]
        if not unsettled:
            return
        chosen = np.isin(shards, unsettled)
        part = Batch(*(np.asarray(array)[chosen] for array in batch))
        weights, usable = _position_weights(part, self._sampler)
        for shard in unsettled:
            own, following, after = weights[:, usable & (shards[chosen] == shard)[:, None]]
            scores = [_score(other - following) for other in (own, after)]
            if max(scores) > _CERTAIN:
                raise AlignmentError(
                    "Stored targets must put more weight on the next token than on its neighbours, "
                    f"but those of shard {shard} of {self._where} put {own.mean():.4f} on the "
                    f"token itself, {following.mean():.4f} on the next and {after.mean():.4f} on "
                    "the one after; dump this shard again from its tokens, or all of them with a "
                    "teacher that knows such text."
                )
            if max(scores) < -_CERTAIN:
                self._settled.add(shard)


def _score(differences: np.ndarray) -> float:
    norm = float(np.sqrt(np.sum(differences**2)))
    return float(differences.sum()) / norm if norm else 0.0
