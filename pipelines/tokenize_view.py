"""What `retort tokenize` says: at its end the store's corpus report for a person. Pure."""

from collections.abc import Sequence

from logit_store import layout
from pipelines.words import size
from schemas.manifest import CorpusReport
from teacher_dump.corpus import Part


def text(report: CorpusReport, store: str, seconds: tuple[float, float] | None) -> str:
    """Lines of text; seconds are those of counting and of writing, if this run did both."""
    dropped, letters = sum(report.dropped.values()), sum(report.dead_letters.values())
    lines = [
        f"documents: {report.documents_read:,} read, {report.documents_kept:,} kept, "
        f"{dropped:,} dropped, {letters:,} dead letters"
    ]
    if report.dropped:
        lines.append(f"  dropped: {_counts(report.dropped)}")
    if report.dead_letters:
        where = f"{store.rstrip('/')}/{layout.DEAD_LETTERS}"
        lines.append(f"  dead letters: {_counts(report.dead_letters)}; see {where}")
    if report.masked:
        lines.append(f"  masked: {_counts(report.masked)}")
    for number, group in enumerate(report.mixture or ()):
        share = group.tokens / max(report.tokens, 1)
        lines.append(
            f"  group {number}: weight {group.weight:g}, {share:.1%} of the tokens, "
            f"taken {group.epochs:.3g} times"
        )
    lines.append(
        f"tokens: {report.tokens:,} in {report.rows:,} rows, {report.padding_share:.2%} padding, "
        f"{report.text_bytes / max(report.tokens, 1):.2f} bytes a token, from {report.files:,} "
        f"files in {report.splits:,} splits"
    )
    if seconds is not None:
        counting, writing = seconds
        rate = report.tokens / max(counting + writing, 1e-9)
        lines.append(
            f"time: {counting:,.1f} s counting, {writing:,.1f} s writing, {rate:,.0f} tokens/s"
        )
    return "\n".join(lines)


def too_large(parts: Sequence[Part], most_bytes: int) -> str:
    """One sentence about parts that hold a job up, the largest first."""
    others = f", the largest of {len(parts):,}" if len(parts) > 1 else ""
    return (
        f"a compressed or Arrow file and a Parquet row group should be under {size(most_bytes)}, "
        "as one worker reads all of it, again for each shard of its rows, but "
        f"{parts[0].path} has {size(parts[0].size_bytes)}{others}; decompress it or cut it up."
    )


def _counts(found: dict[str, int]) -> str:
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {number:,}" for name, number in ordered)
