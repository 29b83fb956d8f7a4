"""A plan in the terminal: one table for each question, then all that went in."""

from collections.abc import Sequence
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from logit_store.inspect.terminal import printable
from pipelines.plan import SECONDS_PER_HOUR, Plan

_SECONDS_PER_DAY = timedelta(days=1).total_seconds()
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def view(found: Plan) -> RenderableType:
    """Everything on one screen and a half, in 80 columns."""
    config = found.config
    title = (
        f"plan: {config.tokens:,} tokens, {config.entries} entries per token, "
        f"teacher {config.teacher}"
    )
    return Group(
        _title(title),
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
        (", ".join(part.arrays), f"{part.bytes_per_token:.2f}", _bytes(part.bytes))
        for part in store.parts
    ]
    rows += [
        ("ledger", f"{store.ledger_bytes / tokens:.4f}", _bytes(store.ledger_bytes)),
        ("all", f"{store.bytes / tokens:.2f}", _bytes(store.bytes)),
    ]
    return [_title("store (predicted)"), _table(("array", "bytes per token", "size"), rows)]


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
            _bytes(choice.shard_bytes),
            _bytes(choice.id_bytes),
            f"{choice.index_share:,.0%}".replace("%", " %"),
            _duration(choice.teacher_seconds),
        )
        for choice in found.shard_choices
    ]
    headings = ("shard_sequences", "objects", "a shard", "its ids", "index reads", "one chip")
    return [_title("objects (predicted)"), _pairs(rows), _table(headings, choices)]


def _teacher(found: Plan) -> list[RenderableType]:
    teacher, config = found.teacher, found.config
    per_token = teacher.flops_per_token
    rows = [
        (
            "per token",
            f"{_giga(per_token.total)} GFLOP: layers {_giga(per_token.linear)}, head "
            f"{_giga(per_token.head)}, local attention {_giga(per_token.local_attention)}, global "
            f"{_giga(per_token.global_attention)}",
        ),
        ("FLOPs", f"{teacher.flops:.4g}"),
        (
            "chip-hours",
            f"{teacher.chip_hours:,.0f} on {config.accelerator} at "
            f"{teacher.flops_per_second_per_chip / 1e12:,.1f} TFLOP/s",
        ),
        (
            "weights",
            f"{_bytes(teacher.weight_bytes)} in bfloat16: at least {teacher.chips_for_weights} "
            f"{config.accelerator}",
        ),
    ]
    if teacher.price is not None:
        rows.append(("price", _dollars(teacher.price)))
    return [_title("teacher (predicted)"), _pairs(rows)]


def _reader(found: Plan) -> list[RenderableType]:
    reader, config = found.reader, found.config
    run = ""
    if reader.student_flops_per_token is not None:
        run = (
            f": {config.student} on {config.student_chips:,} {config.student_accelerator}, "
            f"{_giga(reader.student_flops_per_token)} GFLOP per token"
        )
    rows = [
        ("training", f"{reader.tokens_per_second:,.0f} tokens/s{run}"),
        (
            "bandwidth",
            f"{_bytes(reader.bytes_per_second)}/s, and "
            f"{_bytes(reader.index_bytes_per_second)}/s of shard indices",
        ),
        ("requests", f"{reader.requests_per_second:,.0f}/s"),
        (
            "one pass",
            f"{_duration(reader.seconds_per_pass)}, {reader.requests_per_pass:,} requests",
        ),
    ]
    return [_title("reader (predicted)"), _pairs(rows)]


def _price(found: Plan) -> list[RenderableType]:
    rows = [
        ("keeping it", f"{_dollars(found.price_per_month)} a month"),
        ("not counted", "requests, network, padding, metadata"),
    ]
    return [_title("price (predicted)"), _pairs(rows)]


def _assumptions(found: Plan) -> list[RenderableType]:
    rows = []
    for item in found.assumptions:
        flag = f" (--{item.flag})" if item.flag else ""
        source = f": {item.source}" if item.source else ""
        rows.append((item.kind, f"{item.name} {_quantity(item.value, item.unit)}{flag}{source}"))
    return [_title("what went in"), _pairs(rows)]


def _title(text: str) -> Text:
    return Text(printable(text), style="bold")


def _pairs(rows: Sequence[tuple[str, str]]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(Text(f"  {key}"), Text(printable(value)))
    return table


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        first = heading == headings[0]
        table.add_column(f"  {heading}" if first else heading, justify="left" if first else "right")
    for first_cell, *others in rows:
        table.add_row(f"  {first_cell}", *others)
    return table


def _bytes(value: float) -> str:
    power = 0
    while value >= 1000 and power + 1 < len(_UNITS):
        value /= 1000
        power += 1
    return f"{_three_digits(value)} {_UNITS[power]}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", _SECONDS_PER_DAY), ("h", SECONDS_PER_HOUR), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def _giga(flops: float) -> str:
    return _three_digits(flops / 1e9)


def _dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 100 else f"${value:,.2f}"


def _three_digits(value: float) -> str:
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _quantity(value: float, unit: str) -> str:
    if unit == "bytes":
        return _bytes(value)
    if unit == "FLOP/s":
        return f"{value / 1e12:,.1f} TFLOP/s"
    if unit == "dollars":
        return f"${value:,.3f}"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
    return f"{number} {unit}".rstrip()
