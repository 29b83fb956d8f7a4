"""What each page shows, as plain data for its template: no markup but the plots'."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request

from logit_store.inspect import queries, shards
from logit_store.inspect import search as searching
from logit_store.inspect.queries import Row
from logit_store.inspect.web import svg
from logit_store.inspect.web.stores import Served
from logit_store.layout import group_path
from logit_store.statistics import Histogram
from schemas.errors import ConfigError, CorruptStoreError, IncompleteStoreError
from schemas.manifest import SEGMENT_SHARDS

Context = dict[str, Any]
STEP_NATS = (0.1, 0.3, 0.7, 1.3, 2.0, 3.0, 4.2, 5.6)
"""Edges between the steps of the colour scales, in nats."""
_SEARCH_SECONDS = 0.08
_BY = {
    "surprise": "most surprising",
    "entropy": "highest entropy",
    "mass": "worst captured mass",
}


def whole(value: str, what: str) -> int:
    """A number of a request. Raises ConfigError."""
    if not value.isascii() or not value.isdigit() or len(value) > 15:
        raise ConfigError(f"{what} must be a whole number, but it is '{value[:40]}'; give one.")
    return int(value)


def size(value: float) -> str:
    """Bytes in the decimal unit that suits."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB")
    power = 0
    while value >= 1000 and power + 1 < len(units):
        value /= 1000
        power += 1
    digits = 0 if power == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {units[power]}"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s"


def home(stores: Sequence[Served]) -> Context:
    """A card for each store."""
    cards = []
    for index, store in enumerate(stores):
        names = store.names()
        cards.append(
            {
                "index": index,
                "store": store,
                "names": names,
                "progress": store.progress(names[0] if names else None),
            }
        )
    return {"cards": cards, "store": None, "index": None}


def chosen(store: Served, request: Request) -> str | None:
    """The set of targets that a request names, or the first; None for the tokens alone."""
    name = request.query_params.get("targets")
    if name is not None:
        store.targets(name)
        return name
    names = store.names()
    return names[0] if names else None


def overview(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """What the store is, from its manifests and ledgers alone."""
    name = chosen(store, request)
    manifest = store.tokens.manifest
    summary = store.summary(name)
    sizes = sorted(summary.sizes.items(), key=lambda item: -item[1])
    return {
        "name": name,
        "names": store.names(),
        "manifest": manifest,
        "targets": None if name is None else store.targets(name).manifest,
        "summary": summary,
        "sizes": sizes,
        "stack": svg.stack(sizes),
        "progress": store.progress(name),
        "measures": _measures(name),
    }


def progress(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """How far the job is that writes."""
    name = chosen(store, request)
    return {"name": name, "progress": store.progress(name)}


def figures(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """Histograms of a sample of rows."""
    name = chosen(store, request)
    plots = []
    titles = {
        "entries per token": ("Entries per token", ""),
        "teacher entropy (nats)": ("Teacher entropy", "nats"),
        "stored mass": ("Captured mass", ""),
        "rank of the label": ("Rank of the true token", ""),
    }
    found: dict[str, Histogram] = {} if name is None else store.figures(name)
    for key, (title, unit) in titles.items():
        if key in found:
            plots.append(
                {
                    "title": title,
                    "unit": unit,
                    "mean": found[key].mean,
                    "is_constant": len(found[key].counts) == 1,
                    "svg": svg.histogram(found[key], title, unit),
                }
            )
    positions = int(next(iter(found.values())).counts.sum()) if found else 0
    return {"name": name, "plots": plots, "positions": positions}


def _measures(name: str | None) -> list[tuple[str, str]]:
    keys = shards.MEASURES if name is not None else shards.OF_TOKENS
    return [("health", "health"), *((key, shards.MEASURES[key].title) for key in keys)]


def shard_map(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """One ledger segment's shards, coloured by health or by a mean."""
    name = chosen(store, request)
    by = request.query_params.get("by", "health")
    allowed = dict(_measures(name))
    if by not in allowed:
        raise ConfigError(f"A map is by one of {', '.join(allowed)}, but not by '{by[:40]}'.")
    manifest = store.group(name).manifest
    segments = shards.num_segments(manifest)
    number = whole(request.query_params.get("segment", "0"), "segment")
    queries.check_range("segment", number, segments)
    found = store.segment(name, number)
    states = [_state(store, name, shard) for shard in found]
    counts = {state: states.count(state) for state in ("sound", "committed", "missing", "damaged")}
    values: dict[int, float] = {}
    if by != "health":
        measure = shards.MEASURES[by]
        values = {s.index: measure.of(s, s.statistics) for s in found if s.statistics is not None}
    colours = dict(zip(values, svg.steps(list(values.values())), strict=True))
    cells = []
    for shard, state in zip(found, states, strict=True):
        first = shard.index * manifest.shard_sequences
        note = f"shard {shard.index}, sequences from {first:,}: {_STATES[state]}"
        kind = f"h-{state}"
        if shard.index in values:
            note += f", {allowed[by]} {values[shard.index]:.4g}"
            kind = f"c{colours[shard.index]}"
        link = f"/s/{stores.index(store)}/shard/{shard.index}"
        cells.append((kind, note, link if name is None else f"{link}?targets={name}"))
    extremes = sorted(values.items(), key=lambda item: item[1])
    return {
        "name": name,
        "by": by,
        "measures": _measures(name),
        "title": allowed[by],
        "unit": "" if by == "health" else shards.MEASURES[by].unit,
        "number": number,
        "segments": segments,
        "first": number * SEGMENT_SHARDS,
        "map": svg.grid(cells),
        "counts": counts,
        "states": _STATES,
        "least": extremes[0] if extremes else None,
        "greatest": extremes[-1] if extremes else None,
    }


_STATES = {
    "sound": "read here without fault",
    "committed": "committed, not read here",
    "missing": "not written yet",
    "damaged": "damaged",
}


def _state(store: Served, name: str | None, shard: shards.Shard) -> str:
    if shard.state != "committed":
        return shard.state
    place = (name, shard.index)
    if place in store.damaged:
        return "damaged"
    return "sound" if place in store.sound else "committed"


def shard(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """One shard: its record, and whether its first, middle and last row can be read."""
    name = chosen(store, request)
    number = request.path_params["shard"]
    manifest = store.group(name).manifest
    queries.check_range("shard", number, manifest.num_shards)
    part = store.segment(name, number // SEGMENT_SHARDS)[number % SEGMENT_SHARDS]
    first = number * manifest.shard_sequences
    stop = min(first + manifest.shard_sequences, manifest.num_sequences)
    tried, fault = sorted({first, (first + stop) // 2, stop - 1}), None
    if part.state == "committed":
        for row in tried:
            try:
                store.row(name, row)
            except (CorruptStoreError, IncompleteStoreError) as error:
                fault = str(error)
                break
    means = []
    if part.statistics is not None:
        keys = shards.MEASURES if name is not None else shards.OF_TOKENS
        means = [
            (
                shards.MEASURES[k].title,
                shards.MEASURES[k].of(part, part.statistics),
                shards.MEASURES[k].unit,
            )
            for k in keys
        ]
    return {
        "name": name,
        "group": group_path(name) or "tokens",
        "shard": part,
        "shards": manifest.num_shards,
        "first": first,
        "stop": stop,
        "tried": tried,
        "fault": fault,
        "means": means,
    }


def steps(nats: np.ndarray) -> list[int]:
    """The colour step of each value."""
    return np.searchsorted(STEP_NATS, nats, side="right").tolist()


def sequence(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """Every token of a sequence; without its targets if only these cannot be read."""
    name = chosen(store, request)
    number = request.path_params["sequence"]
    total = store.tokens.manifest.num_sequences
    queries.check_range("sequence", number, total)
    problem = None
    try:
        row = store.row(name, number)
    except (CorruptStoreError, IncompleteStoreError) as error:
        problem = str(error)
        row = None
        if name is not None:
            try:
                row = store.row(None, number)
            except (CorruptStoreError, IncompleteStoreError) as tokens_error:
                problem = str(tokens_error)
    return {
        "name": name,
        "names": store.names(),
        "number": number,
        "total": total,
        "problem": problem,
        "row": row,
        "tokens": [] if row is None else list(_tokens(store, row)),
        "mean": None if row is None else _means(row),
        "step_nats": STEP_NATS,
        "position": asked_position(request, store),
    }


def asked_position(request: Request, store: Served) -> int | None:
    """The position that an address opens, or None. Raises ConfigError."""
    given = request.query_params.get("position")
    if given is None:
        return None
    value = whole(given, "position")
    queries.check_range("position", value, store.tokens.manifest.sequence_tokens)
    return value


def _means(row: Row) -> dict[str, float] | None:
    if row.predictions is None or not row.predicted.any():
        return None
    found = row.predictions
    return {
        "entropy": float(found.entropy_nats[row.predicted].mean()),
        "surprise": float(found.surprise_nats[row.predicted].mean()),
    }


def _tokens(store: Served, row: Row) -> Iterator[tuple[int, str, int | None, int | None, bool]]:
    """(position, text, step of entropy, step of surprise, begins a document) up to the padding."""
    texts = [store.pieces.text(int(i)) for i in row.tokens]
    begins = np.diff(row.segment_ids, prepend=row.segment_ids[:1]) != 0
    used = np.flatnonzero(row.segment_ids)
    stop = int(used[-1]) + 1 if used.size else 0
    if row.predictions is None:
        for t in range(stop):
            yield t, texts[t], None, None, bool(begins[t])
        return
    entropy, surprise = steps(row.predictions.entropy_nats), steps(row.predictions.surprise_nats)
    for t in range(stop):
        if row.predicted[t]:
            yield t, texts[t], entropy[t], surprise[t], bool(begins[t])
        else:
            yield t, texts[t], None, None, bool(begins[t])


def position(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """What the teacher said after one token."""
    name = chosen(store, request)
    number, t = request.path_params["sequence"], request.path_params["position"]
    queries.check_range("position", t, store.tokens.manifest.sequence_tokens)
    row = store.row(name, number)
    return {
        "name": name,
        "number": number,
        "position": t,
        "token": int(row.tokens[t]),
        "token_text": store.pieces.text(int(row.tokens[t])),
        "answer": row.answer(t, store.pieces.text),
    }


def search(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """Text in the tokens, a bounded stretch of them at a time."""
    text = request.query_params.get("text", "")
    first = whole(request.query_params.get("from", "0"), "from")
    ignore_case = request.query_params.get("case") == "ignore"
    found = None
    if text:
        store.look_again()
        # A browser sends line ends as \r\n.
        found = searching.find_text(
            store.tokens,
            store.pieces,
            text.replace("\r\n", "\n"),
            first,
            ignore_case=ignore_case,
            seconds=_SEARCH_SECONDS,
        )
    return {
        "name": chosen(store, request),
        "text": text,
        "ignore_case": ignore_case,
        "found": found,
        "total": store.tokens.manifest.num_sequences,
        "rankings": _BY,
    }


def find(store: Served, request: Request, stores: Sequence[Served]) -> Context:
    """The sequences that stand out."""
    name = chosen(store, request)
    by = request.query_params.get("by", "surprise")
    if by not in _BY:
        raise ConfigError(f"What stands out is by {', '.join(_BY)}, but not by '{by[:40]}'.")
    ranking = None if name is None else store.ranking(name, by, _SEARCH_SECONDS)  # type: ignore[arg-type]
    lines = []
    for standing in ranking.best if ranking else []:
        lines.append(
            {
                "standing": standing,
                "before": "".join(store.pieces.text(i) for i in standing.context),
                "next": store.pieces.text(standing.label),
            }
        )
    return {
        "name": name,
        "by": by,
        "title": _BY[by],
        "rankings": _BY,
        "ranking": ranking,
        "lines": lines,
        "unit": "" if by == "mass" else "nats",
    }
