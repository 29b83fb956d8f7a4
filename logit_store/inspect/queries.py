"""What a person asks of a store, answered through the one reader; both faces print these answers.

A `Row` is one sequence with what a teacher, or a student, said of each of its positions. Nothing
here formats or draws.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from logit_store import reader
from logit_store.entries import Entries, by_position
from logit_store.layout import predicted_mask
from schemas.errors import ConfigError

PieceText = Callable[[int], str]
# How the entry is shown that stands for all ids without one of their own.
REST = "(all others)"


@dataclass(frozen=True)
class Candidate:
    """One entry of a position's target."""

    id: int
    text: str
    weight: float
    is_label: bool


@dataclass(frozen=True)
class Answer:
    """What is known of the token after one position.

    `rank` is the true next token's place among the stored entries, the heaviest first, from 1; None
    and weight 0 if it was not sampled. `probability` is the teacher's own, over all ids.
    """

    entropy_nats: float
    label: int
    label_text: str
    probability: float
    rank: int | None
    weight: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Predictions:
    """Of each position of one row: entropy and surprise float32 [L], and the entries.

    Surprise is less the log-probability of the true next token, in nats. `vocab_size` as an id
    stands for all ids without an entry.
    """

    entropy_nats: np.ndarray
    surprise_nats: np.ndarray
    entries: Entries
    vocab_size: int


@dataclass(frozen=True)
class Row:
    """One sequence: tokens and segment_ids int32 [L]; predicted bool [L], where a target is."""

    sequence: int
    tokens: np.ndarray
    segment_ids: np.ndarray
    predicted: np.ndarray
    predictions: Predictions | None = None

    def answer(self, position: int, text: PieceText) -> Answer | None:
        """What is known at one position, or None where there is no target."""
        found = self.predictions
        if found is None or not self.predicted[position]:
            return None
        ids, weights = found.entries.of(position)
        label = int(self.tokens[position + 1])
        at = np.flatnonzero(ids == label)
        return Answer(
            entropy_nats=float(found.entropy_nats[position]),
            label=label,
            label_text=text(label),
            probability=float(np.exp(-found.surprise_nats[position])),
            rank=int(at[0]) + 1 if at.size else None,
            weight=float(weights[at[0]]) if at.size else 0.0,
            candidates=tuple(
                Candidate(
                    id=int(i),
                    text=REST if i == found.vocab_size else text(int(i)),
                    weight=float(w),
                    is_label=int(i) == label,
                )
                for i, w in zip(ids, weights, strict=True)
            ),
        )


def tokens_row(tokens: reader.TokensReader, sequence: int) -> Row:
    """A sequence's tokens alone. Raises ConfigError for no sequence, and as the reader does."""
    check_range("sequence", sequence, tokens.manifest.num_sequences)
    found = tokens.rows([sequence])
    segments = found.segment_ids[0]
    return Row(sequence, found.tokens[0], segments, predicted_mask(segments))


def targets_row(targets: reader.TargetsReader, sequence: int) -> Row:
    """A sequence with its stored targets. Raises as `tokens_row` does."""
    check_range("sequence", sequence, targets.manifest.num_sequences)
    batch = targets.rows([sequence])
    segments = batch.segment_ids[0]
    return Row(
        sequence,
        batch.tokens[0],
        segments,
        predicted_mask(segments),
        Predictions(
            batch.teacher_entropy[0],
            -batch.label_logprob[0],
            by_position(batch, targets.positions(batch)),
            targets.manifest.teacher.vocab_size,
        ),
    )


def check_range(what: str, value: int, stop: int) -> None:
    """Raise ConfigError unless value is in [0, stop)."""
    if not 0 <= value < stop:
        raise ConfigError(
            f"--{what} must be in [0, {stop}), but it is {value}; choose one in that range."
        )
