"""Decoded entries in the order that a person and a file want them: position by position."""

from dataclasses import dataclass

import numpy as np

from logit_store.reader import TargetBatch


@dataclass(frozen=True)
class Entries:
    """Used entries of R rows, the heaviest of a position first.

    Position t of row r has those from ends[r L + t] to ends[r L + t + 1], exclusive: ends int64
    [R L + 1]; id int32 and weight float32 [used].
    """

    ends: np.ndarray
    id: np.ndarray
    weight: np.ndarray

    def of(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights of one position, counted over all rows."""
        some = slice(int(self.ends[position]), int(self.ends[position + 1]))
        return self.id[some], self.weight[some]


def by_position(batch: TargetBatch, positions: np.ndarray) -> Entries:
    """The used entries of decoded rows; `positions` int32 [R, E] as the reader gives them."""
    rows, length = batch.tokens.shape
    used = batch.entry_id >= 0
    flat = (positions + np.arange(rows)[:, None] * length)[used]
    ids, weights = batch.entry_id[used], batch.entry_weight[used]
    order = np.lexsort((ids, -weights, flat))
    ends = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=rows * length))])
    return Entries(ends, ids[order], weights[order])
