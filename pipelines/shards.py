"""Runs a job over the shards of a store that are not written yet, and sums up what it wrote."""

import time
from dataclasses import dataclass, field

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console

from logit_store.ledger import Ledger
from pipelines import progress, runner
from schemas.errors import IncompleteStoreError
from schemas.manifest import ShardStatistics


@dataclass
class Work:
    """What a job has done, by the records of its shards; grows while it runs."""

    computed: int = 0
    reused: int = 0
    began: float = field(default_factory=time.time)
    seconds: float = 0.0
    bytes: int = 0
    statistics: ShardStatistics = field(default_factory=lambda: ShardStatistics(tokens=0))

    def line(self) -> str:
        """Rate and means so far; nothing before the first shard."""
        sums = self.statistics
        if not sums.tokens:
            return ""
        text = f"{sums.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        if sums.entries:
            text += f", {sums.entries / sums.tokens:.2f} entries/token"
            text += f", captured mass {sums.mass_sum / max(sums.predicted_tokens, 1):.4f}"
        return text


class _Counter:
    """Counts commits for whoever watches, and reads each new record once.

    Works on every runner: it asks the store, which is all that workers share with the driver.
    """

    def __init__(self, ledger: Ledger, work: Work):
        self._ledger, self._work = ledger, work
        self._seen = ledger.committed()
        self._start = time.monotonic()

    def __call__(self) -> int:
        """How many shards are committed."""
        self._ledger.compact()
        committed = self._ledger.committed()
        for index in np.flatnonzero(committed & ~self._seen).tolist():
            record = self._ledger.record(index)
            if record is not None:
                self._seen[index] = True
                self._work.computed += 1
                self._work.statistics = self._work.statistics.plus(record.statistics)
                self._work.bytes += sum(file.size_bytes for file in record.files)
        self._work.seconds = time.monotonic() - self._start
        return int(self._seen.sum())


def write_missing(
    ledger: Ledger,
    write: beam.DoFn,
    console: Console,
    options: PipelineOptions | None,
    *,
    verb: str,
    stage: str,
) -> tuple[int, int]:
    """Have `write` commit every shard that has no record; returns how many, and how many had.

    verb and stage are for what is printed. Raises IncompleteStoreError if any is left.
    """
    work = write_and_sum_up(ledger, write, console, options, verb=verb, stage=stage)
    return work.computed, work.reused


def write_and_sum_up(
    ledger: Ledger,
    write: beam.DoFn,
    console: Console,
    options: PipelineOptions | None,
    *,
    verb: str,
    stage: str,
) -> Work:
    """The same; returns what was done."""
    ledger.compact()
    pending = ledger.pending()
    total = len(ledger.committed())
    work = Work(reused=total - len(pending))
    if not pending:
        return work
    if work.reused:
        console.print(f"{verb}: resuming, {work.reused} of {total} shards are committed")
    count = _Counter(ledger, work)
    with progress.watch(console, stage, total, "shards", count, work.line):
        runner.run(pending, write, type(write).__name__, options)
    count()
    left = ledger.pending()
    if left:
        raise IncompleteStoreError(
            f"Every shard must be committed when the job ends, but {len(left)} of {total} are not "
            f"(first: {left[0].index}); run the same command again."
        )
    return work
