"""What a dump leaves in the store about itself: `reports/dump-NAME/TIME.json`, one for each run.

Apart from the data: times differ between runs whose stores are otherwise the same to the byte, so
that comparisons of stores leave this folder out, and nothing ever reads it to decide anything.
"""

from datetime import UTC, datetime

from pydantic import Field

from logit_store import layout, storage
from pipelines.shards import Work
from schemas.base import Document
from schemas.manifest import ShardStatistics, TargetsManifest


class DumpReport(Document):
    """One run of `retort dump` that computed anything."""

    targets: str
    teacher: str
    runner: str = Field(description="Beam's name of it.")
    started: str = Field(description="UTC.")
    seconds: float
    shards_computed: int
    shards_reused: int
    tokens_per_second: float
    entries_per_token: float
    bytes_per_token: float
    captured_mass: float = Field(description="Mean stored mass of a predicted token.")
    entropy_nats: float = Field(description="Teacher's mean entropy.")
    label_nats: float = Field(description="Teacher's mean loss on the next token.")
    statistics: ShardStatistics = Field(description="Sums over the shards of this run.")

    def text(self) -> str:
        """Two lines for a person."""
        return (
            f"  {self.statistics.tokens:,} tokens in {self.seconds:,.1f} s: "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.entries_per_token:.2f} entries and "
            f"{self.bytes_per_token:.1f} bytes a token\n"
            f"  captured mass {self.captured_mass:.4f}; the teacher's entropy "
            f"{self.entropy_nats:.4f} nats, its loss {self.label_nats:.4f}"
        )


def make(name: str, manifest: TargetsManifest, runner: str, work: Work) -> DumpReport:
    sums = work.statistics
    tokens, predicted = max(sums.tokens, 1), max(sums.predicted_tokens, 1)
    return DumpReport(
        targets=name,
        teacher=manifest.teacher.name,
        runner=runner,
        started=datetime.fromtimestamp(work.began, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        seconds=round(work.seconds, 3),
        shards_computed=work.computed,
        shards_reused=work.reused,
        tokens_per_second=sums.tokens / max(work.seconds, 1e-9),
        entries_per_token=sums.entries / tokens,
        bytes_per_token=work.bytes / tokens,
        captured_mass=sums.mass_sum / predicted,
        entropy_nats=sums.entropy_sum_nats / predicted,
        label_nats=-sums.label_logprob_sum_nats / predicted,
        statistics=sums,
    )


def keep(url: str, report: DumpReport) -> None:
    """Write a report beside the data."""
    key = f"{layout.REPORTS}dump-{report.targets}/{report.started.replace(':', '')}.json"
    storage.write_bytes(storage.open_kvstore(url), key, report.model_dump_json(indent=1).encode())
