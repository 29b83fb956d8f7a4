"""Runs a job over the shards of a store that are not written yet."""

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console

from logit_store.ledger import Ledger
from pipelines import progress, runner
from schemas.errors import IncompleteStoreError


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
    ledger.compact()
    pending = ledger.pending()
    total = len(ledger.committed())
    reused = total - len(pending)
    if not pending:
        return 0, reused
    if reused:
        console.print(f"{verb}: resuming, {reused} of {total} shards are committed")
    with progress.watch(console, stage, total, "shards", ledger.compact):
        runner.run(pending, write, type(write).__name__, options)
    ledger.compact()
    left = ledger.pending()
    if left:
        raise IncompleteStoreError(
            f"Every shard must be committed when the job ends, but {len(left)} of {total} are not "
            f"(first: {left[0].index}); run the same command again."
        )
    return len(pending), reused
