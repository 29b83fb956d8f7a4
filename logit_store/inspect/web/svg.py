"""Small plots as SVG, made on the server: bars, histograms, and a map of shards.

Colours are classes of the style sheet, so that they follow light and dark; sizes are attributes, so
that no inline style is needed.
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from logit_store.statistics import Histogram

_WIDTH, _HEIGHT, _FOOT = 320, 110, 18
COLOURS = 9
"""Steps of the style sheet's colour scales."""


def histogram(found: Histogram, title: str, unit: str = "") -> Markup:
    """Bars with a tick at either end and the mean as a line. Text is escaped."""
    total = max(int(found.counts.sum()), 1)
    most = max(int(found.counts.max()), 1)
    width = _WIDTH / len(found.counts)
    low, high = float(found.edges[0]), float(found.edges[-1])
    is_whole = _is_whole(found)
    parts = []
    for index, count in enumerate(found.counts.tolist()):
        height = (_HEIGHT - 2) * count / most
        if is_whole:
            between = f"{found.edges[index] + 0.5:.0f}"
        else:
            between = f"{found.edges[index]:.3g} to {found.edges[index + 1]:.3g}"
        parts.append(
            Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}">').format(
                _n(index * width), _n(_HEIGHT - height), _n(max(width - 1, 0.5)), _n(height)
            )
            + Markup("<title>{} {}: {:.1f} %</title></rect>").format(
                between, unit, 100 * count / total
            )
        )
    mean = _WIDTH * (found.mean - low) / (high - low) if high > low else 0.0
    label = f"{title}: mean {found.mean:.3g} {unit}, from {total:,} positions"
    first, last = (low + 0.5, high - 0.5) if is_whole else (low, high)
    # A last bin of whole numbers takes all that are larger.
    more = " +" if is_whole and len(found.counts) > 20 else ""
    return Markup(
        '<svg class="plot" role="img" aria-label="{label}" viewBox="0 0 {w} {h}">'
        '{bars}<line class="mean" x1="{m}" x2="{m}" y1="0" y2="{base}"/>'
        '<line class="axis" x1="0" x2="{w}" y1="{base}" y2="{base}"/>'
        '<text class="tick" x="0" y="{foot}">{first}</text>'
        '<text class="tick end" x="{w}" y="{foot}">{last}</text></svg>'
    ).format(
        label=label,
        w=_WIDTH,
        h=_HEIGHT + _FOOT,
        bars=Markup("").join(parts),
        m=_n(min(max(mean, 0.5), _WIDTH - 0.5)),
        base=_HEIGHT,
        foot=_HEIGHT + 14,
        first=f"{first:.3g}",
        last=f"{last:.3g}{more}",
    )


def meter(share: float, kind: str = "") -> Markup:
    """A bar that is filled to a share in [0, 1]; what it says must be written beside it."""
    return Markup(
        '<svg class="meter {}" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="back" width="100" height="8"/>'
        '<rect class="fill" width="{}" height="8"/></svg>'
    ).format(kind, _n(100 * min(max(share, 0.0), 1.0)))


def stack(sizes: Sequence[tuple[str, float]]) -> Markup:
    """One bar, cut in proportion; its parts are told apart by a legend beside it."""
    total = sum(size for _, size in sizes) or 1.0
    parts, x = [], 0.0
    for index, (name, size) in enumerate(sizes):
        width = 400 * size / total
        parts.append(
            Markup(
                '<rect class="k{}" x="{}" width="{}" height="16"><title>{}</title></rect>'
            ).format(
                index % 10, _n(x), _n(max(width - 1, 0)), f"{name}: {100 * size / total:.1f} %"
            )
        )
        x += width
    return Markup(
        '<svg class="stack" viewBox="0 0 400 16" preserveAspectRatio="none" role="img" '
        'aria-label="bytes by array">{}</svg>'
    ).format(Markup("").join(parts))


def grid(cells: Sequence[tuple[str, str, str]]) -> Markup:
    """A map: a square for each (class, title, link), in rows of 32 or 64."""
    columns = 64 if len(cells) > 128 else 32
    rows = -(-len(cells) // columns)
    parts = []
    for index, (kind, title, link) in enumerate(cells):
        y, x = divmod(index, columns)
        parts.append(
            Markup(
                '<a href="{}" tabindex="-1"><rect class="{}" x="{}" y="{}" width="9" height="9" '
                'rx="1.5"><title>{}</title></rect></a>'
            ).format(link, kind, x * 10, y * 10, title)
        )
    return Markup(
        '<svg class="map" viewBox="0 0 {} {}" role="img" aria-label="map of {} shards">{}</svg>'
    ).format(columns * 10, rows * 10, len(cells), Markup("").join(parts))


def steps(values: Sequence[float]) -> list[int]:
    """Each value's step of a colour scale, between the least and the greatest of them."""
    array = np.asarray(values, float)
    if not array.size:
        return []
    low, high = float(array.min()), float(array.max())
    if high - low < 1e-12:
        return [COLOURS // 2] * len(array)
    return np.minimum((array - low) / (high - low) * COLOURS, COLOURS - 1).astype(int).tolist()


def _is_whole(found: Histogram) -> bool:
    return bool(np.all(np.mod(found.edges, 1) == 0.5))


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
