"""Words, sizes and times for what is printed in a terminal."""

from collections.abc import Sequence
from datetime import timedelta

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from logit_store.inspect.text import printable

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_LENGTHS = tuple(
    (unit, timedelta(**{field: 1}).total_seconds())
    for unit, field in (("days", "days"), ("h", "hours"), ("min", "minutes"))
)


def title(text: str) -> Text:
    """A heading."""
    return Text(printable(text), style="bold")


def pairs(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """Names and what there is to say of each."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(Text(f"  {key}"), Text(printable(value)))
    return table


def size(value: float) -> str:
    """Bytes, in the decimal unit that suits."""
    power = 0
    while value >= 1000 and power + 1 < len(_UNITS):
        value /= 1000
        power += 1
    return f"{three_digits(value)} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for unit, length in _LENGTHS:
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def giga(flops: float) -> str:
    """In units of 10^9."""
    return three_digits(flops / 1e9)


def three_digits(value: float) -> str:
    """At least so many."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
