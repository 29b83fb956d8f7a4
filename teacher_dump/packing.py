"""Documents to rows of one length: greedy, in order, cut where a row ends.

Pure: the rows of a split depend on its documents alone, and any of them can be had by themselves.
"""

from collections.abc import Iterable, Sequence

import numpy as np


def pack(
    documents: Sequence[np.ndarray], sequence_tokens: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens int32 [R, L] and segment ids uint16 [R, L].

    Segments count the documents of a row from 1; a document that is cut goes on as segment 1 of the
    next row. The last row is filled with `pad_id` in segment 0.
    """
    lengths = np.asarray([len(document) for document in documents], np.int64)
    rows = count_rows(lengths.tolist(), sequence_tokens)
    tokens = np.full(rows * sequence_tokens, pad_id, np.int32)
    for start, document in zip(np.cumsum(lengths) - lengths, documents, strict=True):
        tokens[start : start + len(document)] = document
    segment_ids = segments(lengths, 0, rows, sequence_tokens)
    return tokens.reshape(rows, sequence_tokens), segment_ids


def segments(
    lengths: np.ndarray, first_row: int, stop_row: int, sequence_tokens: int
) -> np.ndarray:
    """Segment ids uint16 [stop_row - first_row, L] of documents of lengths int64 [D]."""
    first, stop = first_row * sequence_tokens, stop_row * sequence_tokens
    ends = np.cumsum(lengths)
    inside = np.clip(ends, first, stop) - np.clip(ends - lengths, first, stop)
    flat = np.zeros(stop - first, np.int64)
    flat[: inside.sum()] = np.repeat(np.arange(1, len(lengths) + 1), inside)
    number = flat.reshape(stop_row - first_row, sequence_tokens)
    # Within a row, count the changes of document rather than subtract, as documents may be empty.
    changes = np.zeros(number.shape, np.int64)
    changes[:, 1:] = number[:, 1:] != number[:, :-1]
    return np.where(number > 0, 1 + np.cumsum(changes, axis=1), 0).astype(np.uint16)


def count_rows(lengths: Iterable[int], sequence_tokens: int) -> int:
    """Rows that `pack` makes of documents of these lengths."""
    return -(-sum(lengths) // sequence_tokens)
