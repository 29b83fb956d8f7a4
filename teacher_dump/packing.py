"""Documents to rows of one length: greedy, in order, cut where a row ends.

Pure: the rows of a split depend on its documents alone.
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
    lengths = [len(document) for document in documents]
    rows = count_rows(lengths, sequence_tokens)
    total = sum(lengths)
    tokens = np.full(rows * sequence_tokens, pad_id, np.int32)
    if total:
        tokens[:total] = np.concatenate([d for d in documents if len(d)])
    flat = np.zeros(rows * sequence_tokens, np.int64)
    flat[:total] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    number = flat.reshape(rows, sequence_tokens)
    # Within a row, count the changes of document rather than subtract, as documents may be empty.
    changes = np.zeros(number.shape, np.int64)
    changes[:, 1:] = number[:, 1:] != number[:, :-1]
    segments = np.where(number > 0, 1 + np.cumsum(changes, axis=1), 0)
    return tokens.reshape(rows, sequence_tokens), segments.astype(np.uint16)


def count_rows(lengths: Iterable[int], sequence_tokens: int) -> int:
    """Rows that `pack` makes of documents of these lengths."""
    return -(-sum(lengths) // sequence_tokens)
