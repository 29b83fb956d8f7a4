"""Two sets of targets in the terminal: `retort diff`, as plain data and as something to print."""

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from logit_store import reader
from logit_store.inspect.compare import check_same_tokens, difference
from logit_store.inspect.text import printable
from logit_store.statistics import thinned
from schemas.errors import IncompleteStoreError

_PLACES = 10


def diff_data(
    left: tuple[str, str], right: tuple[str, str], max_sequences: int, most: int = 20
) -> dict[str, Any]:
    """Compare two sets of targets, each (store, name), on rows that both have committed.

    Raises ManifestMismatchError for other tokens and IncompleteStoreError for no rows in common.
    """
    a, b = (reader.TargetsReader(*side) for side in (left, right))
    check_same_tokens(a, b)
    committed = a.committed
    if len(b.committed) == len(committed):
        committed = committed & b.committed
    rows = thinned(a.manifest, committed, max_sequences)
    rows = rows[b.committed[rows // b.manifest.shard_sequences]]
    if not rows.size:
        raise IncompleteStoreError(
            f"Targets are compared on rows that both have, but '{left[1]}' of {left[0]} and "
            f"'{right[1]}' of {right[0]} have none in common yet; run the jobs that write them."
        )
    found = difference(a, b, rows, most)
    return {
        "left": {"store": left[0], "targets": left[1]},
        "right": {"store": right[0], "targets": right[1]},
        **asdict(found),
    }


def diff_view(data: dict[str, Any]) -> RenderableType:
    """Means side by side, then the positions that differ most."""
    sides = [data["left"], data["right"]]
    heading = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    heading.add_column(no_wrap=True)
    heading.add_column(overflow="fold")
    for name, side in zip(("left", "right"), sides, strict=True):
        heading.add_row(name, Text(printable(f"{side['store']}: targets '{side['targets']}'")))
    heading.add_row(
        "over",
        f"{data['positions']:,} positions of {data['sequences']:,} sequences that both have",
    )
    both = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    both.add_column("mean over positions")
    both.add_column("left", justify="right")
    both.add_column("right", justify="right")
    for title, key in (
        ("captured mass", "mass"),
        ("entries", "entries_per_position"),
        ("teacher entropy (nats)", "entropy_nats"),
        ("surprise (nats)", "surprise_nats"),
    ):
        both.add_row(title, *(f"{value:.4f}" for value in data[key]))
    joint = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    joint.add_column()
    joint.add_column(justify="right")
    for title, value in (
        ("the same entries", f"{100 * data['identical']:.2f} %"),
        ("the same heaviest id", f"{100 * data['top1_agreement']:.2f} %"),
        ("KL(left || right)", f"{data['kl_nats']:.4f} nats"),
        ("Jensen-Shannon", f"{data['js_nats']:.4f} nats"),
        ("difference of entropy", f"{data['entropy_difference_nats']:.4f} nats"),
    ):
        joint.add_row(title, value)
    parts: list[RenderableType] = [heading, both, joint]
    if data["largest"]:
        places = ", ".join(
            f"{p['sequence']}:{p['position']} ({p['kl_nats']:.2f})"
            for p in data["largest"][:_PLACES]
        )
        parts.append(Text("differ most, sequence:position (KL)", style="bold"))
        parts.append(Text(f"  {places}"))
    return Group(*parts)
