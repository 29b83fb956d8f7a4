"""Two sets of targets, or targets and a student, on the same sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request

from logit_store.inspect import queries
from logit_store.inspect.compare import Divergence, cross_entropy, divergence, floor
from logit_store.inspect.queries import Answer, Row
from logit_store.inspect.web import pages
from logit_store.inspect.web.stores import Served
from schemas.errors import ConfigError, CorruptStoreError, IncompleteStoreError

_STUDENT = "student"
# Least share of a student, which says all of its distribution.
_STUDENT_FLOOR = 1e-6


@dataclass(frozen=True)
class _Side:
    """One of two things compared: its key in an address, and how it is called."""

    key: str
    label: str
    store: Served
    name: str | None

    def row(self, sequence: int, other: Row | None) -> Row:
        if self.name is not None:
            return self.store.row(self.name, sequence)
        # A student is asked about the ids that the other side has.
        return self.store.student_row(other or self.store.row(None, sequence))

    @property
    def floor(self) -> float:
        if self.name is None:
            return _STUDENT_FLOOR
        return floor(self.store.targets(self.name).manifest)


def _sides(store: Served, stores: Sequence[Served]) -> dict[str, _Side]:
    """All that is over the same tokens as a store."""
    found = {}
    same = [(i, s) for i, s in enumerate(stores) if s.fingerprint == store.fingerprint]
    for index, other in same:
        for name in other.names():
            key = f"{index}.{name}"
            label = f"{other.label}: {name}" if len(same) > 1 else name
            found[key] = _Side(key, label, other, name)
    if store.student is not None:
        found[_STUDENT] = _Side(_STUDENT, f"student {store.student.name}", store, None)
    return found


def _chosen(store: Served, request: Request, stores: Sequence[Served]) -> list[_Side]:
    """The two sides that are asked for, or the first two that there are; fewer if there are not."""
    sides = _sides(store, stores)
    own = f"{list(stores).index(store)}.{request.query_params.get('targets', '')}"
    order = sorted(sides, key=lambda key: (key != own, sides[key].store is not store))
    chosen: list[_Side] = []
    for what in ("left", "right"):
        key = request.query_params.get(what)
        if key is None:
            key = next((k for k in order if sides[k] not in chosen), None)
        elif key not in sides:
            raise ConfigError(
                f"{what} must be one of {', '.join(sides)}, but it is '{key[:60]}'; choose one."
            )
        if key is not None:
            chosen.append(sides[key])
    return chosen


def _rows(left: _Side, right: _Side, sequence: int) -> tuple[Row, Row]:
    if left.name is None and right.name is not None:
        second = right.row(sequence, None)
        return left.row(sequence, second), second
    first = left.row(sequence, None)
    return first, right.row(sequence, first)


def _divergence(left: Row, right: Row, least: float) -> Divergence:
    assert left.predictions is not None
    assert right.predictions is not None
    vocab_size = max(left.predictions.vocab_size, right.predictions.vocab_size)
    return divergence(left.predictions.entries, right.predictions.entries, vocab_size, least)


def _student_kl(chosen: list[_Side], left: Row, right: Row) -> np.ndarray | None:
    """An unbiased estimate of KL(teacher || student), nats [L], or None if that is not compared.

    Single positions may be below 0; their mean is right.
    """
    name = chosen[0].name
    if name is None or chosen[1].name is not None:
        return None
    manifest = chosen[0].store.targets(name).manifest
    if manifest.sampler.name == "top_k":
        return None
    assert left.predictions is not None
    assert right.predictions is not None
    nats = cross_entropy(
        left.predictions.entries, right.predictions.entries, manifest.teacher.vocab_size
    )
    return nats - left.predictions.entropy_nats


def compare(store: Served, request: Request, stores: Sequence[Served]) -> dict[str, Any]:
    """Every token of a sequence, coloured by how much the two sides differ after it."""
    number = pages.whole(request.query_params.get("sequence", "0"), "sequence")
    total = store.tokens.manifest.num_sequences
    queries.check_range("sequence", number, total)
    chosen = _chosen(store, request, stores)
    context: dict[str, Any] = {
        "name": pages.chosen(store, request),
        "number": number,
        "total": total,
        "sides": list(_sides(store, stores).values()),
        "chosen": chosen,
        "problem": None,
        "tokens": [],
        "means": None,
        "step_nats": pages.STEP_NATS,
        "position": pages.asked_position(request, store),
    }
    if len(chosen) < 2:
        return context
    try:
        left, right = _rows(chosen[0], chosen[1], number)
    except (CorruptStoreError, IncompleteStoreError) as error:
        return context | {"problem": str(error)}
    assert left.predictions is not None
    assert right.predictions is not None
    found = _divergence(left, right, chosen[1].floor)
    kl = _student_kl(chosen, left, right)
    is_unbiased = kl is not None
    kl = found.kl if kl is None else kl
    colours = [
        pages.steps(values)
        for values in (kl, left.predictions.surprise_nats, right.predictions.surprise_nats)
    ]
    texts = [store.pieces.text(int(i)) for i in left.tokens]
    used = np.flatnonzero(left.segment_ids)
    stop = int(used[-1]) + 1 if used.size else 0
    begins = np.diff(left.segment_ids, prepend=left.segment_ids[:1]) != 0
    mask = left.predicted

    def mean(values: np.ndarray) -> float:
        return float(values[mask].mean()) if mask.any() else 0.0

    return context | {
        "tokens": [
            (t, texts[t], tuple(c[t] for c in colours) if mask[t] else None, bool(begins[t]))
            for t in range(stop)
        ],
        "means": {
            "kl": mean(kl),
            "is_unbiased": is_unbiased,
            "js": mean(found.js),
            "top": mean(found.same_top),
            "left": mean(left.predictions.surprise_nats),
            "right": mean(right.predictions.surprise_nats),
        },
    }


def position(store: Served, request: Request, stores: Sequence[Served]) -> dict[str, Any]:
    """What both sides said after one token, candidate by candidate."""
    number, t = request.path_params["sequence"], request.path_params["position"]
    queries.check_range("sequence", number, store.tokens.manifest.num_sequences)
    queries.check_range("position", t, store.tokens.manifest.sequence_tokens)
    chosen = _chosen(store, request, stores)
    if len(chosen) < 2:
        raise ConfigError("Two sides are compared, but there is one; name another store.")
    rows = _rows(chosen[0], chosen[1], number)
    answers = [row.answer(t, store.pieces.text) for row in rows]
    found = _divergence(rows[0], rows[1], chosen[1].floor)
    kl = _student_kl(chosen, rows[0], rows[1])
    return {
        "number": number,
        "position": t,
        "token_text": store.pieces.text(int(rows[0].tokens[t])),
        "chosen": chosen,
        "answers": answers,
        "lines": _lines(answers[0], answers[1]),
        "kl": float((found.kl if kl is None else kl)[t]),
        "js": float(found.js[t]),
    }


def _lines(left: Answer | None, right: Answer | None) -> list[dict[str, Any]]:
    """The candidates of either side, the heaviest on one of them first, all others last."""
    lines: dict[int, dict[str, Any]] = {}
    for index, answer in enumerate((left, right)):
        for c in answer.candidates if answer else ():
            line = lines.setdefault(
                c.id,
                {
                    "text": c.text,
                    "is_label": c.is_label,
                    "is_rest": c.text == queries.REST,
                    "weights": [None, None],
                },
            )
            line["weights"][index] = c.weight
    return sorted(
        lines.values(), key=lambda line: (line["is_rest"], -max(w or 0.0 for w in line["weights"]))
    )
