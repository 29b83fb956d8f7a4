"""What the ledger says of each shard: whether it is there, and its means.

A segment's worth of shards is read at a time, so that no question costs more for a larger store.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from logit_store.ledger import Ledger
from schemas.errors import CorruptStoreError
from schemas.manifest import SEGMENT_SHARDS, Manifest, ShardStatistics

State = Literal["committed", "missing", "damaged"]


@dataclass(frozen=True)
class Shard:
    """One shard by its ledger record; `damaged` means the record, as its files are not read."""

    index: int
    state: State
    statistics: ShardStatistics | None = None
    size_bytes: int = 0


@dataclass(frozen=True)
class Measure:
    """A mean that every shard's record has: how it is called, and how it is got from the sums."""

    title: str
    unit: str
    of: Callable[[Shard, ShardStatistics], float]


def _mean(total: float, count: int) -> float:
    return total / count if count else 0.0


MEASURES = {
    "entropy": Measure(
        "teacher entropy", "nats", lambda _, s: _mean(s.entropy_sum_nats, s.predicted_tokens)
    ),
    "surprise": Measure(
        "surprise", "nats", lambda _, s: -_mean(s.label_logprob_sum_nats, s.predicted_tokens)
    ),
    "entries": Measure("entries per token", "", lambda _, s: _mean(s.entries, s.tokens)),
    "mass": Measure("captured mass", "", lambda _, s: _mean(s.mass_sum, s.predicted_tokens)),
    "bytes": Measure("bytes per token", "", lambda d, s: _mean(d.size_bytes, s.tokens)),
    "tokens": Measure("tokens", "", lambda _, s: float(s.tokens)),
}
OF_TOKENS = ("bytes", "tokens")
"""The measures that a group without targets has."""


def num_segments(manifest: Manifest) -> int:
    """Segments that the shards fill."""
    return -(-manifest.num_shards // SEGMENT_SHARDS)


def segment(ledger: Ledger, manifest: Manifest, number: int) -> list[Shard]:
    """Every shard of one segment, those not committed included, in order."""
    first = number * SEGMENT_SHARDS
    stop = min(first + SEGMENT_SHARDS, manifest.num_shards)
    found = {index: Shard(index, "missing") for index in range(first, stop)}
    for index, key, raw in ledger.lines_of(number):
        try:
            record = ledger.parse(raw, index, key)
        except CorruptStoreError:
            found[index] = Shard(index, "damaged")
            continue
        size = sum(file.size_bytes for file in record.files)
        found[index] = Shard(index, "committed", record.statistics, size)
    return list(found.values())
