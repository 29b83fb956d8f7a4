"""What a step is given: plain arrays, and nothing of where they were read from."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """B rows of L tokens, NumPy or JAX; E entry slots a row, 0 of them without stored targets."""

    tokens: np.ndarray | jax.Array
    """int32 [B, L]."""
    segment_ids: np.ndarray | jax.Array
    """int32 [B, L], 0 for padding."""
    entry_id: np.ndarray | jax.Array
    """int32 [B, E], -1 in unused slots."""
    entry_weight: np.ndarray | jax.Array
    """float32 [B, E], 0 in unused slots."""
    head_count: np.ndarray | jax.Array
    """uint16 [B, L], entries of each position that come first in their block's slots."""
    tail_count: np.ndarray | jax.Array
    """uint16 [B, L], entries of each position that follow those."""
    teacher_entropy: np.ndarray | jax.Array
    """float32 [B, L], nats; zeros without stored targets."""
    label_logprob: np.ndarray | jax.Array
    """float32 [B, L], the teacher's log-probability of the next token; zeros without targets."""


def label_batch(tokens: np.ndarray, segment_ids: np.ndarray) -> Batch:
    """A batch without stored targets."""
    none = np.zeros((len(tokens), 0), np.int32)
    counts, zeros = np.zeros(tokens.shape, np.uint16), np.zeros(tokens.shape, np.float32)
    return Batch(tokens, segment_ids, none, none.astype(np.float32), counts, counts, zeros, zeros)
