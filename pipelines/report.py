"""`report.html`: what a quickstart found, as one self-contained page with no scripts.

Pure: takes numbers and decoded rows, returns text. All corpus text is escaped by the template.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined

from logit_store.layout import predicted_mask
from logit_store.reader import TargetBatch

_PAGE_TOKENS = 120
_CARDS = 9
_CANDIDATES = 8


@dataclass(frozen=True)
class Result:
    """One model's held-out figures."""

    name: str
    parameters: int
    training_tokens: int
    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class Curve:
    """Cross-entropy in nats by training tokens seen, and held-out points on the same axes."""

    name: str
    tokens: Sequence[float]
    nats: Sequence[float]
    held_out: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Candidate:
    text: str
    weight: float
    is_label: bool


@dataclass(frozen=True)
class TokenCard:
    """One position with the stored candidates for the token after it."""

    text: str
    label: str
    entropy: float
    label_probability: float
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class Piece:
    text: str
    marked: bool


@dataclass(frozen=True)
class Page:
    """A passage, some of its tokens marked, and a card for each marked one."""

    sequence: int
    pieces: Sequence[Piece]
    tokens: Sequence[TokenCard]


def render(
    subtitle: str,
    results: Sequence[Result],
    verdict: str,
    curves: Sequence[Curve],
    store: Sequence[tuple[str, str]],
    arrays: Sequence[tuple[str, int, float]],
    page: Page,
) -> str:
    """The whole page as HTML text. `arrays` holds (name, bytes on disk, bytes per token)."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    return template.render(
        subtitle=subtitle,
        results=results,
        verdict=verdict,
        curves=_plot(curves),
        store=store,
        arrays=arrays,
        page=page,
    )


def choose_page(
    batch: TargetBatch, entry_position: np.ndarray, sequence: int, piece: Callable[[int], str]
) -> Page:
    """A passage from the middle of one decoded row (batch of 1), with its most telling tokens.

    Marked are positions spread over the passage's range of teacher entropy, so that certain and
    uncertain ones both show.
    """
    tokens = batch.tokens[0]
    has_label = predicted_mask(batch.segment_ids[0])
    predicted = np.flatnonzero(has_label)
    if predicted.size == 0:
        return Page(sequence, (), ())
    start = int(predicted[min(predicted.size // 3, predicted.size - 1)])
    passage = [t for t in range(start, min(start + _PAGE_TOKENS, tokens.size)) if has_label[t]]
    by_entropy = sorted(passage, key=lambda t: float(batch.teacher_entropy[0, t]))
    ranks = np.unique(np.linspace(0, len(by_entropy) - 1, _CARDS).round().astype(int))
    marked = sorted(by_entropy[rank] for rank in ranks)
    cards = [_card(batch, entry_position[0], position, piece) for position in marked]
    pieces = [Piece(piece(int(tokens[t])), t in set(marked)) for t in passage]
    return Page(sequence, pieces, cards)


def _card(
    batch: TargetBatch, entry_position: np.ndarray, position: int, piece: Callable[[int], str]
) -> TokenCard:
    label = int(batch.tokens[0, position + 1])
    slots = np.flatnonzero((entry_position == position) & (batch.entry_id[0] >= 0))
    order = slots[np.argsort(-batch.entry_weight[0, slots], kind="stable")][:_CANDIDATES]
    return TokenCard(
        text=_visible(piece(int(batch.tokens[0, position]))),
        label=_visible(piece(label)),
        entropy=float(batch.teacher_entropy[0, position]),
        label_probability=float(np.exp(batch.label_logprob[0, position])),
        candidates=[
            Candidate(
                _visible(piece(int(batch.entry_id[0, slot]))),
                float(batch.entry_weight[0, slot]),
                int(batch.entry_id[0, slot]) == label,
            )
            for slot in order
        ],
    )


def _visible(text: str) -> str:
    """White space as signs, so that a card can show a newline or an indent."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _plot(curves: Sequence[Curve]) -> str:
    """The curves as inline SVG."""
    # Drawn through the object interface: no global state, no display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        colour = f"C{index}"
        axes.plot(curve.tokens, curve.nats, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(
            curve.tokens, _running_mean(curve.nats), color=colour, linewidth=1.8, label=curve.name
        )
        if curve.held_out:
            axes.plot(*zip(*curve.held_out, strict=True), "o", color=colour, markersize=5)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _running_mean(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    width = max(1, min(len(array) // 10, 20))
    total = np.cumsum(np.concatenate([[0.0], array]))
    stop = np.arange(1, len(array) + 1)
    start = np.maximum(stop - width, 0)
    return (total[stop] - total[start]) / (stop - start)
