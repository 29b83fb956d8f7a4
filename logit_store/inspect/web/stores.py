"""The stores that are served: opened once, looked at again while they are written.

Everything is found by a store's place on the command line and a set's name in its list; no path
ever comes from a request.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from logit_store import reader, statistics
from logit_store.inspect import shards
from logit_store.inspect.queries import Predictions, Row, targets_row, tokens_row
from logit_store.inspect.search import By, Ranking
from logit_store.inspect.shards import Shard
from logit_store.inspect.text import Pieces
from schemas.errors import CorruptStoreError, RetortError, StoreNotFoundError
from schemas.manifest import identity

Predict = Callable[[Row], Predictions]
"""What a model says of a row: entries for the ids that the row's own predictions have, for the most
probable ones, and one for all others."""
_KEPT_ROWS = 64
_KEPT_SEGMENTS = 64
_LOOK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Student:
    """A model that is asked while its page is made."""

    name: str
    predict: Predict


@dataclass(frozen=True)
class Progress:
    """How far a set of targets is, and how fast it has grown since it was first looked at."""

    committed: int
    shards: int
    shards_per_second: float | None
    seconds_left: float | None


class Served:
    """One store. Safe to ask from several threads; errors are those of the reader."""

    def __init__(self, url: str, label: str, pieces: Pieces | None, student: Student | None = None):
        self.url, self.label = url, label
        self.tokens = reader.TokensReader(url)
        self.has_text = pieces is not None
        vocab_size = self.tokens.manifest.tokenizer.vocab_size
        self.pieces = pieces or Pieces.numbers(vocab_size)
        self.student = student
        self.damaged: dict[tuple[str | None, int], str] = {}
        """What was met while reading, by set and shard."""
        self.sound: set[tuple[str | None, int]] = set()
        self._targets: dict[str, reader.TargetsReader] = {}
        self._names: list[str] = []
        self._rows: OrderedDict[tuple[str | None, int], Row] = OrderedDict()
        self._segments: OrderedDict[tuple[str | None, int], list[Shard]] = OrderedDict()
        self._summaries: dict[tuple[str | None, int], statistics.Summary] = {}
        self._figures: dict[tuple[str, int], dict[str, statistics.Histogram]] = {}
        self._rankings: dict[tuple[str, By, int], Ranking] = {}
        self._first_seen: dict[str | None, tuple[float, int]] = {}
        self._student_row: tuple[Row, Row] | None = None
        self._looked = -_LOOK_AGAIN_SECONDS
        self._lock = threading.RLock()
        self._warm()

    def _warm(self) -> None:
        """Open every set of targets and decode a row, so that the first page need not wait for it.

        What cannot be read is told by the page that needs it, which meets it again.
        """
        for name in self.names():
            with contextlib.suppress(RetortError):
                first = np.flatnonzero(self.targets(name).committed)[:1]
                for shard in first.tolist():
                    self.row(name, shard * self.targets(name).manifest.shard_sequences)

    @property
    def fingerprint(self) -> str:
        """Of the tokens: two stores with the same one can be compared row by row."""
        return identity(self.tokens.manifest)

    def names(self) -> list[str]:
        """The sets of targets, 'default' first."""
        self.look_again()
        return self._names

    def look_again(self) -> None:
        """See what was committed since, at most once a second."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _LOOK_AGAIN_SECONDS:
                return
            self._looked = now
            found = reader.list_targets(self.url)
            self._names = sorted(found, key=lambda name: (name != "default", name))
            for opened in (self.tokens, *self._targets.values()):
                if not opened.committed.all():
                    opened.refresh()
            for targets in self._targets.values():
                targets.tokens = self.tokens

    def targets(self, name: str) -> reader.TargetsReader:
        """An opened set of targets. Raises StoreNotFoundError for a name that is not listed."""
        if name not in self.names():
            raise StoreNotFoundError(
                f"A set of targets must be one of the store's, but '{name}' is none of "
                f"{', '.join(self._names) or 'none'}; choose one of them."
            )
        with self._lock:
            if name not in self._targets:
                opened = reader.TargetsReader(self.url, name)
                opened.tokens = self.tokens
                self._targets[name] = opened
            return self._targets[name]

    def group(self, name: str | None) -> reader.TokensReader | reader.TargetsReader:
        """The tokens (name None) or a set of targets."""
        return self.tokens if name is None else self.targets(name)

    def row(self, name: str | None, sequence: int) -> Row:
        """One sequence, with its targets unless name is None."""
        key = (name, sequence)
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
                return self._rows[key]
        self.look_again()
        place = (name, sequence // self.group(name).manifest.shard_sequences)
        try:
            if name is None:
                row = tokens_row(self.tokens, sequence)
            else:
                row = targets_row(self.targets(name), sequence)
        except CorruptStoreError as error:
            self.damaged[place] = str(error)
            raise
        self.sound.add(place)
        with self._lock:
            self._rows[key] = row
            while len(self._rows) > _KEPT_ROWS:
                self._rows.popitem(last=False)
        return row

    def student_row(self, row: Row) -> Row:
        """The same sequence as the student reads it; one row at a time is asked of it."""
        assert self.student is not None
        with self._lock:
            # Rows are kept, so that the same object is the same row of the same targets.
            kept = self._student_row
            if kept is None or kept[0] is not row:
                kept = (row, replace(row, predictions=self.student.predict(row)))
                self._student_row = kept
            return kept[1]

    def segment(self, name: str | None, number: int) -> list[Shard]:
        """The shards of one ledger segment; kept once all are committed."""
        key = (name, number)
        with self._lock:
            if key in self._segments:
                return self._segments[key]
        opened = self.group(name)
        found = shards.segment(opened.ledger, opened.manifest, number)
        if all(shard.state == "committed" for shard in found):
            with self._lock:
                self._segments[key] = found
                while len(self._segments) > _KEPT_SEGMENTS:
                    self._segments.popitem(last=False)
        return found

    def summary(self, name: str | None) -> statistics.Summary:
        """The ledger's sums, read again only when more is committed."""
        committed = int(self.group(name).committed.sum()) + int(self.tokens.committed.sum())
        key = (name, committed)
        with self._lock:
            if key not in self._summaries:
                self._summaries = {k: v for k, v in self._summaries.items() if k[0] != name}
                self._summaries[key] = statistics.summary(self.url, name)
            return self._summaries[key]

    def figures(self, name: str) -> dict[str, statistics.Histogram]:
        """Histograms of a sample of rows, read again only when more is committed."""
        key = (name, int(self.targets(name).committed.sum()))
        with self._lock:
            if key not in self._figures:
                self._figures = {k: v for k, v in self._figures.items() if k[0] != name}
                self._figures[key] = statistics.histograms(self.targets(name))
            return self._figures[key]

    def ranking(self, name: str, by: By, seconds: float) -> Ranking:
        """What stands out, looked for a while longer at each call."""
        committed = int(self.targets(name).committed.sum())
        with self._lock:
            key = (name, by, committed)
            if key not in self._rankings:
                # Of fewer shards none is of use any more.
                kept = {k: r for k, r in self._rankings.items() if k[:2] != key[:2]}
                self._rankings = kept | {key: Ranking(self.targets(name), by)}
            self._rankings[key].advance(seconds)
            return self._rankings[key]

    def progress(self, name: str | None) -> Progress:
        """Of the tokens or a set of targets."""
        self.look_again()
        opened = self.group(name)
        committed, total = int(opened.committed.sum()), len(opened.committed)
        now = time.monotonic()
        start, before = self._first_seen.setdefault(name, (now, committed))
        rate = (committed - before) / (now - start) if committed > before else None
        left = (total - committed) / rate if rate else None
        return Progress(committed, total, rate, left)
