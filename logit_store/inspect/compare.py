"""Two sets of targets over the same tokens: where they differ, and by how much.

Stored targets are samples, so that an id may be missing by chance. Two divergences are therefore
taken that stay finite, position by position:

- Jensen-Shannon, in nats, of the estimates as they are: 0 for equal ones, ln 2 for disjoint ones;
- KL(left || right) over the ids that both have and all others as one. It is at most the KL of the
  estimates (merging outcomes never adds). Where the right has no mass on those others and the left
  has, it is given half a point of its sampler, as it cannot tell less from none.

Both are above 0 for two samples of one distribution. Entropy and the log-probability of the true
next token are the teacher's own, over all ids, and have no such noise.
"""

from dataclasses import dataclass, field

import numpy as np

from logit_store import layout, reader
from logit_store.entries import Entries, by_position
from logit_store.statistics import stored_mass
from schemas.errors import ManifestMismatchError
from schemas.manifest import TargetsManifest

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Divergence:
    """Of each of P positions: kl and js float64 [P] in nats, same_top and identical bool [P]."""

    kl: np.ndarray
    js: np.ndarray
    same_top: np.ndarray
    identical: np.ndarray


def divergence(left: Entries, right: Entries, vocab_size: int, floor: float) -> Divergence:
    """Compare the entries of the same positions; `floor` is the right's least share, half a point.

    `vocab_size` as an id stands for all ids without an entry.
    """
    positions = len(left.ends) - 1
    keys, weights = zip(*(_keyed(side, vocab_size) for side in (left, right)), strict=True)
    union = np.union1d(*keys)
    p, q = (np.zeros(len(union)) for _ in range(2))
    for into, key, weight in zip((p, q), keys, weights, strict=True):
        into[np.searchsorted(union, key)] = weight
    position = union // (vocab_size + 1)
    middle = (p + q) / 2

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(position, values, positions)

    js = total(_term(p, middle) + _term(q, middle)) / 2
    common = (p > 0) & (q > 0) & (union % (vocab_size + 1) < vocab_size)
    others_p = np.maximum(total(p) - total(p * common), 0)
    others_q = np.maximum(total(q) - total(q * common), 0)
    # Of sums that should be 0, what rounding leaves.
    others_p[others_p < 1e-6] = 0
    is_bare = (others_q < floor) & (others_p > 0)
    given = np.where(is_bare, floor - others_q, 0)
    kl = total(np.where(common, _term(p, q), 0)) + _term(others_p, others_q + given)
    kl += np.log1p(given) * total(p)
    return Divergence(
        np.maximum(kl, 0),
        np.maximum(js, 0),
        _top(left) == _top(right),
        total(np.abs(p - q) > 1e-6) == 0,
    )


def cross_entropy(left: Entries, right: Entries, vocab_size: int) -> np.ndarray:
    """Sum over the left's ids of its weight times less the right's log-probability, nats [P].

    Where the left is an unbiased sample of a teacher, and the right has each of its ids, as a
    student has, this is an unbiased estimate of their cross-entropy; less the entropy, of their KL.
    """
    key, weight = _keyed(left, vocab_size)
    other, probability = _keyed(right, vocab_size)
    order = np.argsort(other)
    at = np.minimum(np.searchsorted(other, key, sorter=order), len(other) - 1)
    found = np.where(other[order[at]] == key, probability[order[at]], 0)
    nats = -np.log(np.maximum(found, np.finfo(np.float32).tiny))
    return np.bincount(key // (vocab_size + 1), weight * nats, len(left.ends) - 1)


def _keyed(entries: Entries, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    position = np.repeat(np.arange(len(entries.ends) - 1), np.diff(entries.ends))
    return position * (vocab_size + 1) + entries.id, entries.weight.astype(np.float64)


def _term(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p ln(p / q), 0 where p is."""
    is_there = (p > 0) & (q > 0)
    return np.where(is_there, p * np.log(np.where(is_there, p, 1) / np.where(is_there, q, 1)), 0)


def _top(entries: Entries) -> np.ndarray:
    """Id of each position's heaviest entry, int64 [P]; -1 where there is none."""
    has_any = np.diff(entries.ends) > 0
    found = np.full(len(has_any), -1, np.int64)
    found[has_any] = entries.id[entries.ends[:-1][has_any]]
    return found


@dataclass(frozen=True)
class Place:
    """A position, and its KL in nats."""

    sequence: int
    position: int
    kl_nats: float


@dataclass(frozen=True)
class Difference:
    """Means over the predicted positions of the rows that were compared; pairs are left, right."""

    sequences: int
    positions: int
    identical: float
    """Share of positions whose entries are the same."""
    top1_agreement: float
    kl_nats: float
    js_nats: float
    mass: tuple[float, float]
    entries_per_position: tuple[float, float]
    entropy_nats: tuple[float, float]
    entropy_difference_nats: float
    """Mean of the absolute difference at each position."""
    surprise_nats: tuple[float, float]
    largest: list[Place] = field(default_factory=list)


def check_same_tokens(left: reader.TargetsReader, right: reader.TargetsReader) -> None:
    """Raise ManifestMismatchError unless both are over the same tokens and ids."""
    a, b = left.manifest.tokens_fingerprint, right.manifest.tokens_fingerprint
    if a != b:
        raise ManifestMismatchError(
            f"Two sets of targets are compared over the same tokens, but those of {left.url} are "
            f"{a[:12]} and those of {right.url} are {b[:12]}; name stores of the same tokens."
        )
    ids = left.manifest.teacher.vocab_size, right.manifest.teacher.vocab_size
    if ids[0] != ids[1]:
        raise ManifestMismatchError(
            f"Two sets of targets are compared over the same ids, but one teacher has {ids[0]} "
            f"and the other {ids[1]}; name targets of one vocabulary."
        )


def floor(manifest: TargetsManifest) -> float:
    """Half a point."""
    return 0.5 / manifest.sampler.points


def difference(
    left: reader.TargetsReader, right: reader.TargetsReader, rows: np.ndarray, most: int = 20
) -> Difference:
    """Compare some rows, and list the `most` positions that differ most.

    Raises ManifestMismatchError for other tokens, and what the reader raises.
    """
    check_same_tokens(left, right)
    vocab_size = left.manifest.teacher.vocab_size
    sums: dict[str, np.ndarray] = {}
    positions = 0
    largest: list[Place] = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        a, b = left.rows(some), right.rows(some)
        predicted = layout.predicted_mask(a.segment_ids)
        found = divergence(
            by_position(a, left.positions(a)),
            by_position(b, right.positions(b)),
            vocab_size,
            floor(right.manifest),
        )
        shape = predicted.shape
        positions += int(predicted.sum())
        figures = {
            "identical": found.identical.reshape(shape),
            "top": found.same_top.reshape(shape),
            "kl": found.kl.reshape(shape),
            "js": found.js.reshape(shape),
            "mass": np.stack([stored_mass(left, a), stored_mass(right, b)]),
            "entries": np.stack([_counts(a), _counts(b)]),
            "entropy": np.stack([a.teacher_entropy, b.teacher_entropy]),
            "entropy difference": np.abs(a.teacher_entropy - b.teacher_entropy),
            "surprise": -np.stack([a.label_logprob, b.label_logprob]),
        }
        for name, values in figures.items():
            total = np.where(predicted, values, 0).sum(axis=(-2, -1), dtype=np.float64)
            sums[name] = sums.get(name, 0) + total
        largest += _largest(figures["kl"], predicted, some, most)
        largest = sorted(largest, key=lambda p: (-p.kl_nats, p.sequence, p.position))[:most]
    mean = {name: (total / max(positions, 1)).tolist() for name, total in sums.items()}
    pair = (0.0, 0.0)
    return Difference(
        sequences=len(rows),
        positions=positions,
        identical=mean.get("identical", 0.0),
        top1_agreement=mean.get("top", 0.0),
        kl_nats=mean.get("kl", 0.0),
        js_nats=mean.get("js", 0.0),
        mass=tuple(mean.get("mass", pair)),
        entries_per_position=tuple(mean.get("entries", pair)),
        entropy_nats=tuple(mean.get("entropy", pair)),
        entropy_difference_nats=mean.get("entropy difference", 0.0),
        surprise_nats=tuple(mean.get("surprise", pair)),
        largest=largest,
    )


def _counts(batch: reader.TargetBatch) -> np.ndarray:
    return batch.head_count.astype(np.int64) + batch.tail_count


def _largest(kl: np.ndarray, predicted: np.ndarray, rows: np.ndarray, most: int) -> list[Place]:
    values = np.where(predicted, kl, 0).reshape(-1)
    order = np.argsort(-values, kind="stable")[:most]
    return [
        Place(int(rows[i // kl.shape[1]]), int(i % kl.shape[1]), float(values[i]))
        for i in order.tolist()
        if values[i] > 0
    ]
