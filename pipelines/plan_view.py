"""A plan in the terminal: one table for each question, then all that went in."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from logit_store.documents import RECORD_BYTES
from pipelines.plan import Plan
from pipelines.words import duration, giga, pairs, size, title


def view(found: Plan) -> RenderableType:
    """Everything on one screen and a half, in 80 columns."""
    config = found.config
    heading = (
        f"plan: {config.tokens:,} tokens, {config.entries} entries per token, "
        f"teacher {config.teacher}"
    )
    return Group(
        title(heading),
        *_store(found),
        *_objects(found),
        *_teacher(found),
        *_reader(found),
        *_price(found),
        *_assumptions(found),
    )


def _store(found: Plan) -> list[RenderableType]:
    store, tokens = found.store, found.config.tokens
    rows = [
        (", ".join(part.arrays), f"{part.bytes_per_token:.2f}", size(part.bytes))
        for part in store.parts
    ]
    rows += [
        ("ledger", f"{store.ledger_bytes / tokens:.4f}", size(store.ledger_bytes)),
        ("all", f"{store.bytes / tokens:.2f}", size(store.bytes)),
    ]
    return [title("store (predicted)"), _table(("array", "bytes per token", "size"), rows)]


def _objects(found: Plan) -> list[RenderableType]:
    objects, config = found.objects, found.config
    rows = [
        ("sequences", f"{objects.sequences:,} of {config.sequence_tokens:,} tokens"),
        ("shards", f"{objects.shards:,} of {config.shard_sequences:,} sequences"),
        ("shard files", f"{objects.shard_files:,} ({objects.arrays} arrays)"),
        (
            "ledger",
            f"{objects.ledger_records:,} records; {objects.ledger_objects:,} objects once complete",
        ),
        ("metadata", f"{objects.metadata:,}"),
        ("objects", f"{objects.while_written:,}; {objects.complete:,} once complete"),
    ]
    choices = [
        (
            f"{choice.shard_sequences:,}",
            f"{choice.objects:,}",
            size(choice.shard_bytes),
            size(choice.id_bytes),
            f"{choice.index_share:,.0%}".replace("%", " %"),
            duration(choice.teacher_seconds),
        )
        for choice in found.shard_choices
    ]
    headings = ("shard_sequences", "objects", "a shard", "its ids", "index reads", "one chip")
    return [title("objects (predicted)"), pairs(rows), _table(headings, choices)]


def _teacher(found: Plan) -> list[RenderableType]:
    teacher, config = found.teacher, found.config
    per_token = teacher.flops_per_token
    rows = [
        (
            "per token",
            f"{giga(per_token.total)} GFLOP: layers {giga(per_token.linear)}, head "
            f"{giga(per_token.head)}, local attention {giga(per_token.local_attention)}, global "
            f"{giga(per_token.global_attention)}",
        ),
        ("FLOPs", f"{teacher.flops:.4g}"),
        (
            "chip-hours",
            f"{teacher.chip_hours:,.0f} on {config.accelerator} at "
            f"{teacher.flops_per_second_per_chip / 1e12:,.1f} TFLOP/s",
        ),
        (
            "weights",
            f"{size(teacher.weight_bytes)} in bfloat16: at least {teacher.chips_for_weights} "
            f"{config.accelerator}",
        ),
    ]
    if teacher.price is not None:
        rows.append(("price", _dollars(teacher.price)))
    return [title("teacher (predicted)"), pairs(rows)]


def _reader(found: Plan) -> list[RenderableType]:
    reader, config = found.reader, found.config
    run = ""
    if reader.student_flops_per_token is not None:
        run = (
            f": {config.student} on {config.student_chips:,} {config.student_accelerator}, "
            f"{giga(reader.student_flops_per_token)} GFLOP per token"
        )
    rows = [
        ("training", f"{reader.tokens_per_second:,.0f} tokens/s{run}"),
        (
            "bandwidth",
            f"{size(reader.bytes_per_second)}/s, and "
            f"{size(reader.index_bytes_per_second)}/s of shard indices",
        ),
        ("requests", f"{reader.requests_per_second:,.0f}/s"),
        (
            "one pass",
            f"{duration(reader.seconds_per_pass)}, {reader.requests_per_pass:,} requests",
        ),
    ]
    return [title("reader (predicted)"), pairs(rows)]


def _price(found: Plan) -> list[RenderableType]:
    rows = [
        ("keeping it", f"{_dollars(found.price_per_month)} a month"),
        (
            "not counted",
            f"requests, network, padding, metadata, documents/ ({RECORD_BYTES} bytes a document), "
            "dead_letters/",
        ),
    ]
    return [title("price (predicted)"), pairs(rows)]


def _assumptions(found: Plan) -> list[RenderableType]:
    rows = []
    for item in found.assumptions:
        flag = f" (--{item.flag})" if item.flag else ""
        source = f": {item.source}" if item.source else ""
        rows.append((item.kind, f"{item.name} {_quantity(item.value, item.unit)}{flag}{source}"))
    return [title("what went in"), pairs(rows)]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        first = heading == headings[0]
        table.add_column(f"  {heading}" if first else heading, justify="left" if first else "right")
    for first_cell, *others in rows:
        table.add_row(f"  {first_cell}", *others)
    return table


def _dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 100 else f"${value:,.2f}"


def _quantity(value: float, unit: str) -> str:
    if unit == "bytes":
        return size(value)
    if unit == "FLOP/s":
        return f"{value / 1e12:,.1f} TFLOP/s"
    if unit == "dollars":
        return f"${value:,.3f}"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
    return f"{number} {unit}".rstrip()
