"""Packing: nothing is lost, added or reordered, and segments follow the documents."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logit_store.layout import predicted_mask
from teacher_dump.packing import count_rows, pack

PAD = 0
LENGTHS = st.lists(st.integers(0, 40), max_size=12)


def make_documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents of distinct non-zero tokens, so that any mix-up shows."""
    stops = np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=np.int32) + 1 for a, b in itertools.pairwise(stops)]


@given(lengths=LENGTHS, sequence_tokens=st.integers(2, 17))
def test_segments_give_the_documents_back(lengths: list[int], sequence_tokens: int) -> None:
    documents = make_documents(lengths)
    tokens, segments = pack(documents, sequence_tokens, PAD)
    assert tokens.dtype == np.int32
    assert segments.dtype == np.uint16
    assert tokens.shape == segments.shape == (count_rows(lengths, sequence_tokens), sequence_tokens)

    # A segment that fills a row to its end and begins the next goes on only if its tokens do.
    pieces = []
    for row, segment in zip(tokens, segments, strict=True):
        numbers = [int(n) for n in dict.fromkeys(segment.tolist()) if n]
        assert numbers == list(range(1, len(numbers) + 1))
        pieces += [row[segment == n] for n in numbers]
    cuts = {int(d[0]) for d in documents if len(d)}
    rebuilt: list[np.ndarray] = []
    for piece in pieces:
        if int(piece[0]) in cuts:
            rebuilt.append(piece)
        else:
            rebuilt[-1] = np.concatenate([rebuilt[-1], piece])
    assert [r.tolist() for r in rebuilt] == [d.tolist() for d in documents if len(d)]


@given(lengths=LENGTHS, sequence_tokens=st.integers(2, 17))
def test_only_the_end_of_the_last_row_is_padding(lengths: list[int], sequence_tokens: int) -> None:
    tokens, segments = pack(make_documents(lengths), sequence_tokens, PAD)
    total = sum(lengths)
    is_real = np.arange(tokens.size) < total
    np.testing.assert_array_equal(segments.reshape(-1) > 0, is_real)
    assert (tokens.reshape(-1)[~is_real] == PAD).all()
    assert tokens.size - total < sequence_tokens


@given(lengths=LENGTHS, sequence_tokens=st.integers(2, 17))
def test_labels_never_cross_documents(lengths: list[int], sequence_tokens: int) -> None:
    tokens, segments = pack(make_documents(lengths), sequence_tokens, PAD)
    starts = {int(d[0]) for d in make_documents(lengths) if len(d)}
    rows, positions = np.nonzero(predicted_mask(segments))
    assert not starts & set(tokens[rows, positions + 1].tolist())


def test_rows_of_a_known_case() -> None:
    tokens, segments = pack(make_documents([3, 4, 0, 2]), 4, pad_id=99)
    assert tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 99, 99, 99]]
    assert segments.tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [1, 0, 0, 0]]


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_pack_gives_no_rows(lengths: list[int]) -> None:
    tokens, segments = pack(make_documents(lengths), 4, PAD)
    assert tokens.shape == segments.shape == (0, 4)
