"""Looking through a store for text, and for the sequences that stand out, in bounded time.

A search reads as many rows as its time allows and says where it stopped; the next call goes on from
there. Text is compared byte by byte with what the tokens spell, so that nothing is missed however
it was cut into tokens; nothing is found across documents or sequences.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from logit_store import layout, reader
from logit_store.inspect.shards import MEASURES, num_segments, segment
from logit_store.inspect.text import Pieces
from logit_store.statistics import stored_mass
from schemas.errors import ConfigError, CorruptStoreError

_TOKENS_AT_ONCE = 16_384
_CONTEXT_TOKENS = 12
By = Literal["surprise", "entropy", "mass"]


@dataclass(frozen=True)
class Match:
    """A place where the text was found: `position` and `stop` are its tokens, stop exclusive."""

    sequence: int
    position: int
    stop: int
    before: str
    hit: str
    after: str


@dataclass(frozen=True)
class Found:
    """Matches in sequences [first, next); `next` is None at the end of the store.

    `unread` are sequences in between that are not committed or whose bytes are damaged.
    """

    first: int
    next: int | None
    seconds: float
    unread: int
    matches: list[Match] = field(default_factory=list)


def find_text(
    tokens: reader.TokensReader,
    pieces: Pieces,
    text: str,
    first: int = 0,
    *,
    ignore_case: bool = False,
    most: int = 50,
    seconds: float = 0.15,
) -> Found:
    """Matches of a text from sequence `first` on, until there are `most` or the time is over.

    `ignore_case` is of ASCII letters. Raises ConfigError for an empty text.
    """
    wanted = text.encode("utf-8", "surrogatepass")
    if not wanted:
        raise ConfigError("A search must be for some text, but it is empty; give at least a sign.")
    if ignore_case:
        wanted = wanted.lower()
    started, total = time.monotonic(), tokens.manifest.num_sequences
    at_once = max(1, _TOKENS_AT_ONCE // tokens.manifest.sequence_tokens)
    step = tokens.manifest.shard_sequences
    matches: list[Match] = []
    unread = 0
    row = first
    while row < total:
        # Within one shard, so that rows are either all committed or none is.
        stop = min(row + at_once, total, (row // step + 1) * step)
        try:
            if not tokens.committed[row // step]:
                raise CorruptStoreError("not committed")
            found = tokens.rows(np.arange(row, stop)).tokens
        except CorruptStoreError:
            unread += stop - row
        else:
            for match in _matches(found, row, pieces, wanted, ignore_case):
                if len(matches) == most:
                    # The next page begins with the row that did not fit; a row fills one at most.
                    kept = [m for m in matches if m.sequence < match.sequence]
                    goes_on = match.sequence if kept else match.sequence + 1
                    last = goes_on if goes_on < total else None
                    elapsed = time.monotonic() - started
                    return Found(first, last, elapsed, unread, kept or matches)
                matches.append(match)
        row = stop
        if time.monotonic() - started > seconds:
            break
    end = row if row < total else None
    return Found(first, end, time.monotonic() - started, unread, matches)


def _matches(
    tokens: np.ndarray, first: int, pieces: Pieces, wanted: bytes, ignore_case: bool
) -> Iterator[Match]:
    """Each Match in rows [R, L] in order."""
    length = tokens.shape[1]
    # A sign that no text has between rows.
    ended = np.concatenate([tokens, np.full((len(tokens), 1), -1)], axis=1)
    data, begins = pieces.spell(ended.reshape(-1))
    seen = data.lower() if ignore_case else data
    at = seen.find(wanted)
    while at >= 0:
        place = int(np.searchsorted(begins, at, "right")) - 1
        last = int(np.searchsorted(begins, at + len(wanted) - 1, "right")) - 1
        row, position = divmod(place, length + 1)
        left = begins[max(row * (length + 1), place - _CONTEXT_TOKENS)]
        right = begins[min(row * (length + 1) + length, last + 1 + _CONTEXT_TOKENS)]
        stop = at + len(wanted)
        yield Match(
            first + row,
            position,
            last - row * (length + 1) + 1,
            _text(data[left:at]),
            _text(data[at:stop]),
            _text(data[stop:right]),
        )
        at = seen.find(wanted, stop)


def _text(raw: bytes) -> str:
    """Bytes that may begin and end inside a character."""
    return raw.decode("utf-8", "ignore")


@dataclass(frozen=True)
class Standing:
    """A sequence by its mean of a measure, and the position that stands out most in it.

    `context` are the ids up to and with that position, `label` is the one after it.
    """

    sequence: int
    mean: float
    peak: float
    position: int
    context: tuple[int, ...]
    label: int


class Ranking:
    """The sequences that stand out by one measure: the ledger names the shards, these the rows.

    `advance` goes on where it stopped: first through the ledger, a segment at a time, then through
    the rows of the shards whose means stand out most. So the list is of `shards_read` shards, and
    a single strange sequence in a shard that is otherwise plain is not in it.
    """

    def __init__(self, targets: reader.TargetsReader, by: By, most: int = 50):
        self.by, self.most = by, most
        self.shards_read = 0
        self.rows_read = 0
        self.unread = 0
        self.best: list[Standing] = []
        self._targets, self._segments_read = targets, 0
        self._sign = 1.0 if by == "mass" else -1.0
        self._means: list[tuple[float, int]] = []
        self._row: int | None = None

    @property
    def shards(self) -> int:
        """Shards that are ranked so far."""
        return len(self._means)

    @property
    def is_ledger_read(self) -> bool:
        return self._segments_read == num_segments(self._targets.manifest)

    @property
    def is_complete(self) -> bool:
        """Whether every committed row has been looked at."""
        return self.is_ledger_read and self.shards_read == len(self._means)

    def advance(self, seconds: float) -> None:
        """Read on for about so long; one step at least, and until there is something to show."""
        started = time.monotonic()
        while not self.is_complete:
            if self.is_ledger_read:
                self._read_rows()
            else:
                self._read_segment()
            has_some = self.best or not self.is_ledger_read
            if has_some and time.monotonic() - started > seconds:
                return

    def _read_segment(self) -> None:
        manifest = self._targets.manifest
        measure = MEASURES[self.by]
        for shard in segment(self._targets.ledger, manifest, self._segments_read):
            if shard.statistics is not None:
                mean = measure.of(shard, shard.statistics)
                self._means.append((self._sign * mean, shard.index))
        self._segments_read += 1
        if self.is_ledger_read:
            self._means.sort()

    def _read_rows(self) -> None:
        manifest = self._targets.manifest
        shard = self._means[self.shards_read][1]
        first = shard * manifest.shard_sequences
        end = min(first + manifest.shard_sequences, manifest.num_sequences)
        row = first if self._row is None else self._row
        stop = min(row + max(1, _TOKENS_AT_ONCE // 2 // manifest.sequence_tokens), end)
        try:
            self._judge(np.arange(row, stop))
            self.rows_read += stop - row
        except CorruptStoreError:
            self.unread += stop - row
        self._row = stop
        if stop == end:
            self._row, self.shards_read = None, self.shards_read + 1

    def _judge(self, rows: np.ndarray) -> None:
        batch = self._targets.rows(rows)
        predicted = layout.predicted_mask(batch.segment_ids)
        if self.by == "mass":
            values = stored_mass(self._targets, batch)
        elif self.by == "entropy":
            values = batch.teacher_entropy
        else:
            values = -batch.label_logprob
        counts = predicted.sum(axis=1)
        means = np.where(predicted, values, 0).sum(axis=1) / np.maximum(counts, 1)
        peaks = np.where(predicted, self._sign * values, np.inf).argmin(axis=1)
        for r in np.flatnonzero(counts):
            t = int(peaks[r])
            context = batch.tokens[r, max(0, t + 1 - _CONTEXT_TOKENS) : t + 1].tolist()
            self.best.append(
                Standing(
                    int(rows[r]),
                    float(means[r]),
                    float(values[r, t]),
                    t,
                    tuple(context),
                    int(batch.tokens[r, t + 1]),
                )
            )
        self.best.sort(key=lambda s: (self._sign * s.mean, s.sequence))
        del self.best[self.most :]
