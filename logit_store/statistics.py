"""Figures about a store: means from its ledger alone, distributions from a sample of its rows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logit_store import layout, manifests, reader, storage
from logit_store.documents import RECORD_BYTES, read_index
from logit_store.entries import by_position
from logit_store.ledger import Ledger, summary_bytes
from schemas.errors import CorruptStoreError, IncompleteStoreError
from schemas.manifest import Corpus, Manifest, ShardStatistics, TokensManifest

_PERCENTILES = (1, 10, 50, 90, 99, 100)
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Summary:
    """A set of targets, or the tokens alone, as its ledger sums it up; sizes are bytes on disk.

    Bytes per token count everything: tokens, targets, documents, dead letters, metadata and ledger,
    over the tokens that are not padding. Documents and dead letters are None, and not counted,
    where the corpus report is damaged or of before it said so.
    """

    sequences: int
    shards: int
    committed_shards: int
    tokens: int
    predicted_tokens: int
    entries_per_token: float
    max_entries: int
    mean_mass: float
    mean_entropy_nats: float
    mean_label_logprob_nats: float
    array_bytes: dict[str, int]
    documents_bytes: int | None
    dead_letters_bytes: int | None
    metadata_bytes: int
    bytes_per_token: float

    @property
    def sizes(self) -> dict[str, int]:
        """All bytes that are counted, by array or by what they are; nothing that is empty."""
        others = {
            "documents": self.documents_bytes,
            "dead letters": self.dead_letters_bytes,
            "metadata, ledger": self.metadata_bytes,
        }
        return self.array_bytes | {name: size for name, size in others.items() if size}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summary(url: str, name: str | None) -> Summary:
    """Sum up the tokens (name None) or the tokens and one set of targets, from ledgers alone.

    Of a finished store two summaries are read; of an unfinished one, every record.
    """
    manifest = manifests.read_manifest(url, name)
    groups = [None] if name is None else [None, name]
    array_bytes: dict[str, int] = {}
    metadata = 0
    tokens = 0
    for group in groups:
        group_manifest = manifests.read_manifest(url, group)
        found = _ledger(url, group, group_manifest)
        # A manifest, and each table below, is stored twice.
        metadata += 2 * len(layout.group_json(group_manifest)) + found.ledger_bytes
        metadata += sum(len(layout.array_json(a)) for a in layout.arrays(group_manifest).values())
        array_bytes |= found.array_bytes
        if isinstance(group_manifest, TokensManifest):
            tokens = found.statistics.tokens
            store = storage.open_kvstore(url)
            metadata += len(storage.read_bytes(store, layout.corpus_key(group_manifest)) or b"")
        for table in layout.table_arrays(group_manifest):
            copy = layout.table_copy_key(group or "", table)
            size = len(storage.read_bytes(storage.open_kvstore(url), copy) or b"")
            array_bytes[table] = 2 * size
    statistics = found.statistics
    documents, letters, report = _corpus_bytes(url)
    metadata += report

    def mean(total: float, count: int) -> float:
        return total / count if count else 0.0

    return Summary(
        sequences=manifest.num_sequences,
        shards=manifest.num_shards,
        committed_shards=found.shards,
        tokens=tokens,
        predicted_tokens=statistics.predicted_tokens,
        entries_per_token=mean(statistics.entries, statistics.tokens),
        max_entries=statistics.max_entries,
        mean_mass=mean(statistics.mass_sum, statistics.predicted_tokens),
        mean_entropy_nats=mean(statistics.entropy_sum_nats, statistics.predicted_tokens),
        mean_label_logprob_nats=mean(
            statistics.label_logprob_sum_nats, statistics.predicted_tokens
        ),
        array_bytes=array_bytes,
        documents_bytes=documents,
        dead_letters_bytes=letters,
        metadata_bytes=metadata,
        bytes_per_token=mean(
            sum(array_bytes.values()) + (documents or 0) + (letters or 0) + metadata, tokens
        ),
    )


def _corpus_bytes(url: str) -> tuple[int | None, int | None, int]:
    """Bytes of documents, of dead letters and of the report that tells them."""
    report_bytes = len(storage.read_bytes(storage.open_kvstore(url), layout.REPORT_KEY) or b"")
    try:
        report = manifests.read_report(url)
    except CorruptStoreError:
        return None, None, report_bytes
    if report is None:
        return 0, 0, 0
    letters = report.dead_letter_bytes
    if letters is None and not report.dead_letters:
        letters = 0
    return report.documents_read * RECORD_BYTES, letters, report_bytes


@dataclass(frozen=True)
class _Sums:
    """What a ledger sums up, finished or not."""

    shards: int
    statistics: ShardStatistics
    array_bytes: dict[str, int]
    ledger_bytes: int


def _ledger(url: str, name: str | None, manifest: Manifest) -> _Sums:
    ledger = Ledger(url, name, manifest)
    summary = ledger.summary()
    found = summary or ledger.sum_up()
    return _Sums(
        int(ledger.committed().sum()),
        found.statistics,
        dict(found.array_bytes),
        found.record_bytes + (0 if summary is None else len(summary_bytes(summary))),
    )


@dataclass(frozen=True)
class Distribution:
    """Percentiles and mean of one quantity over predicted positions."""

    mean: float
    percentiles: dict[int, float]


@dataclass(frozen=True)
class SourceFigures:
    """Means of `columns` over the sampled positions of one source file, or of a part of one.

    Of a store without `documents/` they are of a split, which may have several `files`, of which
    `first_file` is the first. `sequences` are those that have such a position.
    """

    first_file: str
    files: int
    sequences: int
    positions: int
    means: dict[str, float]


class SourcesOfPositions:
    """Says of positions which source they are of: its place in the corpus.

    Of a split whose documents are not known, the place of its first; of rows of no split, -1.
    """

    def __init__(self, url: str, corpus: Corpus):
        self._url, self._corpus = url, corpus
        self._stops = np.array([split.stop_row for split in corpus.splits], np.int64)
        self._known: tuple[int, np.ndarray | None, np.ndarray | None] = (-1, None, None)
        self._together: dict[int, int] = {}

    def of(self, row: int, mask: np.ndarray) -> np.ndarray:
        """int64 [N], of the positions of a row where mask bool [L] is True."""
        number = int(np.searchsorted(self._stops, row, side="right"))
        positions = np.flatnonzero(mask)
        if number == len(self._corpus.splits):
            return np.full(len(positions), -1)
        split = self._corpus.splits[number]
        if split.stop_file - split.first_file == 1:
            return np.full(len(positions), split.first_file)
        if self._known[0] != number:
            # Rows come in order, so that each is read once.
            index = read_index(self._url, number, split)
            ends = sources = None
            if index is not None:
                files = self._corpus.sources[split.first_file : split.stop_file]
                sources = index.sources(np.array([file.documents for file in files]))
                ends = np.cumsum(index.layout()[1])
            self._known = (number, ends, sources)
        _, ends, sources = self._known
        if ends is None or sources is None:
            self._together[split.first_file] = split.stop_file - split.first_file
            return np.full(len(positions), split.first_file)
        start = (row - split.first_row) * len(mask)
        return split.first_file + sources[np.searchsorted(ends, start + positions, side="right")]

    def name(self, label: int) -> tuple[str, int]:
        """The path, and how many files it stands for."""
        return self._corpus.sources[label].path, self._together.get(label, 1)


def distributions(url: str, name: str, max_sequences: int = 1024) -> dict[str, Distribution]:
    """Distributions over committed rows, evenly thinned to `max_sequences`.

    entries per token; stored mass; teacher entropy and label log-probability in nats; weight of the
    stored label, and its rank by weight from 1 (0 where the label was not sampled).
    """
    return profile(url, name, max_sequences)[0]


def profile(
    url: str, name: str, max_sequences: int = 1024
) -> tuple[dict[str, Distribution], list[SourceFigures]]:
    """`distributions`, and of the same rows the means by source, in the corpus's order.

    Raises CorruptStoreError for a list of sources that is not the manifest's.
    """
    targets = reader.TargetsReader(url, name)
    corpus = manifests.read_corpus(url, targets.tokens.manifest)
    finder = SourcesOfPositions(url, corpus)
    parts: dict[str, list[np.ndarray]] = {}
    labels: list[np.ndarray] = []
    rows_of: Counter[int] = Counter()
    for rows, batch in _sample(targets, max_sequences):
        for key, values in columns(targets, batch).items():
            parts.setdefault(key, []).append(values)
        for row, mask in zip(rows.tolist(), layout.predicted_mask(batch.segment_ids), strict=True):
            found_of = finder.of(row, mask)
            rows_of.update(np.unique(found_of).tolist())
            labels.append(found_of)
    values_of = {key: np.concatenate(some) for key, some in parts.items()}
    found = {
        key: Distribution(
            float(values.mean()), {p: float(np.percentile(values, p)) for p in _PERCENTILES}
        )
        for key, values in values_of.items()
        if values.size
    }
    label_of = np.concatenate(labels) if labels else np.zeros(0, np.int64)
    sources = []
    for label in sorted(rows_of.keys() - {-1}):
        mine = label_of == label
        means = {key: float(values[mine].mean()) for key, values in values_of.items()}
        path, files = finder.name(label)
        sources.append(SourceFigures(path, files, rows_of[label], int(mine.sum()), means))
    return found, sources


def entropy_quantile(url: str, name: str, share: float, max_sequences: int) -> float:
    """The entropy in nats below which about `share` of the predicted positions lie.

    Of committed rows, evenly thinned to `max_sequences`. Stored entropies are few distinct values,
    so no cut may give the share exactly: this is the one that comes nearest. Raises
    IncompleteStoreError if nothing is committed.
    """
    targets = reader.TargetsReader(url, name)
    parts = [
        batch.teacher_entropy[layout.predicted_mask(batch.segment_ids)]
        for _, batch in _sample(targets, max_sequences)
    ]
    if not parts:
        raise IncompleteStoreError(
            f"A share of positions is found on committed rows, but of the targets '{name}' of "
            f"{url} there are none; run the job that writes them."
        )
    values, counts = np.unique(np.concatenate(parts), return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)]) / max(1, counts.sum())
    # Below value i lie `below[i]`; never all of them, as a share is less than 1.
    return float(values[np.argmin(np.abs(below[:-1] - share))]) if len(values) else 0.0


def _sample(
    targets: reader.TargetsReader, max_sequences: int
) -> Iterator[tuple[np.ndarray, reader.TargetBatch]]:
    """Committed rows, evenly thinned to `max_sequences`, a few at a time: numbers and targets."""
    return _read(targets, thinned(targets.manifest, targets.committed, max_sequences))


def _read(
    targets: reader.TargetsReader, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, reader.TargetBatch]]:
    for start in range(0, rows.size, _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        yield some, targets.rows(some)


def thinned(manifest: Manifest, committed: np.ndarray, max_sequences: int) -> np.ndarray:
    """Row numbers, int64 [at most max_sequences], evenly spread over shards that are committed.

    `committed` is bool [num_shards]. Costs no more for shards of more rows.
    """
    firsts = np.flatnonzero(committed) * manifest.shard_sequences
    sizes = np.minimum(firsts + manifest.shard_sequences, manifest.num_sequences) - firsts
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if ends.size else 0
    if total == 0:
        return np.zeros(0, np.int64)
    place = np.unique(np.linspace(0, total - 1, min(max_sequences, total)).astype(np.int64))
    shard = np.searchsorted(ends, place, side="right")
    return firsts[shard] + place - (ends[shard] - sizes[shard])


@dataclass(frozen=True)
class Histogram:
    """Counts int64 [bins] of predicted positions between edges float64 [bins + 1], and the mean."""

    edges: np.ndarray
    counts: np.ndarray
    mean: float


_HISTOGRAM_TOKENS = 8_192
_HISTOGRAM_SHARDS = 8
_BINS = 24


def histograms(targets: reader.TargetsReader) -> dict[str, Histogram]:
    """Of each of `columns`, over about 8,192 tokens of rows from up to 8 committed shards.

    From few shards, as the index of each that is read is as long as its rows are many. Whole
    numbers have a bin each, of which the last takes all that are larger.
    """
    manifest = targets.manifest
    there = np.flatnonzero(targets.committed)
    most = max(1, _HISTOGRAM_TOKENS // manifest.sequence_tokens)
    few = np.zeros_like(targets.committed)
    if there.size:
        spread = np.linspace(0, there.size - 1, min(_HISTOGRAM_SHARDS, most, there.size))
        few[there[spread.astype(int)]] = True
    parts: dict[str, list[np.ndarray]] = {}
    for _, batch in _read(targets, thinned(manifest, few, most)):
        for key, values in columns(targets, batch).items():
            parts.setdefault(key, []).append(values)
    found = {}
    for key, some in parts.items():
        values = np.concatenate(some)
        if values.size:
            found[key] = _histogram(values, is_whole=values.dtype.kind == "i")
    return found


def _histogram(values: np.ndarray, is_whole: bool) -> Histogram:
    low, high = float(values.min()), float(values.max())
    if is_whole:
        edges = np.arange(min(low, 1.0), min(high, _BINS) + 2) - 0.5
        counts = np.histogram(np.minimum(values, edges[-1] - 0.5), edges)[0]
    else:
        # Of what hardly varies, as masses of 1, one bin says it all.
        spread = high - low > 1e-6
        edges = np.linspace(min(low, 0.0), high, _BINS + 1) if spread else np.array([low, low + 1])
        counts = np.histogram(values, edges)[0]
    return Histogram(edges, counts, float(values.mean()))


def columns(targets: reader.TargetsReader, batch: reader.TargetBatch) -> dict[str, np.ndarray]:
    """Of each predicted position of decoded rows, one after another: what is told of it."""
    predicted = layout.predicted_mask(batch.segment_ids)
    entries = by_position(batch, targets.positions(batch))
    counts = np.diff(entries.ends)
    position = np.repeat(np.arange(counts.size), counts)
    is_label = entries.id == np.roll(batch.tokens, -1, axis=1).reshape(-1)[position]
    rank = np.arange(position.size) - entries.ends[position] + 1

    def per_position(values: np.ndarray) -> np.ndarray:
        found = np.bincount(position, values, minlength=counts.size)
        return found.reshape(predicted.shape)[predicted]

    ranks = per_position(rank * is_label).astype(np.int64)
    return {
        "entries per token": counts.reshape(predicted.shape)[predicted],
        "stored mass": stored_mass(targets, batch)[predicted],
        "stored weight of the label": per_position(entries.weight * is_label),
        "rank of the label": ranks,
        "teacher entropy (nats)": batch.teacher_entropy[predicted],
        "label log-probability (nats)": batch.label_logprob[predicted],
    }


def stored_mass(targets: reader.TargetsReader, batch: reader.TargetBatch) -> np.ndarray:
    """float64 [R, L]: each position's weights on ids of the vocabulary, so without the rest's."""
    rows, length = batch.tokens.shape
    is_id = (batch.entry_id >= 0) & (batch.entry_id < targets.manifest.teacher.vocab_size)
    flat = (targets.positions(batch) + np.arange(rows)[:, None] * length)[is_id]
    found = np.bincount(flat, batch.entry_weight[is_id], rows * length)
    return found.reshape(rows, length)
