"""Which documents of the whole corpus are taken, and how often: what no worker can know alone.

The driver's part between the two passes. It holds a few dozen bytes for each document, and reads
signatures as many bands at a time as fit a budget.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from logit_store.documents import Index
from schemas.corpus import CorpusConfig
from schemas.errors import ConfigError
from schemas.manifest import GroupReport
from teacher_dump import duplicates, mixture
from teacher_dump.documents import Columns

_BAND_BYTES = 4 * 2**30

Load = Callable[[int], Columns]
"""The columns of a split, read again at each call."""


@dataclass(frozen=True)
class Selection:
    """Of each split the index, and what was dropped for what."""

    indices: tuple[Index, ...]
    dropped: dict[str, int]
    groups: tuple[GroupReport, ...] | None


def select(
    config: CorpusConfig, groups: Sequence[Sequence[tuple[int, int]]], load: Load
) -> Selection:
    """Decide for all documents; groups has (group, records) of each part of each split.

    Raises ConfigError if a group of a mixture has no document.
    """
    kept, dropped = _kept(groups, load)
    edges = np.cumsum([0, *(int(mask.sum()) for mask in kept)])
    alive = np.ones(edges[-1], bool)

    def whole(name: str) -> np.ndarray:
        """A column of all kept documents."""
        return np.concatenate([load(split)[name] for split in range(len(groups))])

    if config.duplicates.exact and len(alive):
        later = duplicates.later_copies(whole("digest"))
        alive &= ~later
        dropped["duplicates.exact"] += int(later.sum())
    if config.duplicates.near and len(alive):
        later = _near_copies(config, alive, edges, load)
        alive &= ~later
        dropped["duplicates.near"] += int(later.sum())
    copies = alive.astype(np.uint8)
    reports = None
    if config.mixture:
        tokens = np.concatenate(
            [load(split)["tokens"][mask] for split, mask in enumerate(kept)]
        ).astype(np.int64)
        reports, copies = _mix(config, alive, tokens, _groups_of(groups, kept), whole("draw"))
        dropped["mixture"] += int((alive & (copies == 0)).sum())
    indices = []
    for split, mask in enumerate(kept):
        every = np.zeros(len(mask), np.uint8)
        every[mask] = copies[edges[split] : edges[split + 1]]
        indices.append(Index(load(split)["tokens"], every))
    return Selection(tuple(indices), _sorted(dropped), reports)


def _kept(
    groups: Sequence[Sequence[tuple[int, int]]], load: Load
) -> tuple[list[np.ndarray], Counter[str]]:
    """bool [D] of each split, and how many of its records were dropped for what."""
    kept, dropped = [], Counter[str]()
    for split in range(len(groups)):
        columns = load(split)
        kept.append(columns["reason"] == 0)
        counts = np.bincount(columns["reason"], minlength=len(columns.reasons))
        for reason, number in zip(columns.reasons, counts.tolist(), strict=True):
            dropped[reason] += number
    return kept, dropped


def _sorted(dropped: Counter[str]) -> dict[str, int]:
    """Dead letters are counted elsewhere, each for its reason."""
    others = {"kept", "dead_letter"}
    return {name: dropped[name] for name in sorted(dropped) if dropped[name] and name not in others}


def _near_copies(
    config: CorpusConfig, alive: np.ndarray, edges: np.ndarray, load: Load
) -> np.ndarray:
    """bool [K] over all kept documents, of which only those alive are compared."""
    places = np.flatnonzero(alive)
    count, _ = duplicates.bands(config.duplicates)
    at_once = max(1, min(count, _BAND_BYTES // (8 * max(1, len(places)))))
    held: dict[int, np.ndarray] = {}

    def keys_of_band(band: int) -> np.ndarray:
        if band not in held:
            held.clear()
            some = range(band, min(band + at_once, count))
            parts: dict[int, list[np.ndarray]] = {one: [] for one in some}
            for split in range(len(edges) - 1):
                signatures = load(split)["signature"][alive[edges[split] : edges[split + 1]]]
                for one in some:
                    parts[one].append(duplicates.band_keys(signatures, config.duplicates, one))
            held.update({one: np.concatenate(found) for one, found in parts.items()})
        return held[band]

    def signatures_of(documents: np.ndarray) -> np.ndarray:
        wanted = places[documents]
        found = [np.empty((0, config.duplicates.permutations), np.uint32)]
        for split in range(len(edges) - 1):
            first, stop = np.searchsorted(wanted, edges[split : split + 2])
            if stop > first:
                found.append(load(split)["signature"][wanted[first:stop] - edges[split]])
        return np.concatenate(found)

    later = duplicates.near_copies(len(places), keys_of_band, signatures_of, config.duplicates)
    every = np.zeros(len(alive), bool)
    every[places] = later
    return every


def _groups_of(
    groups: Sequence[Sequence[tuple[int, int]]], kept: Sequence[np.ndarray]
) -> np.ndarray:
    """The group of every kept document, int64 [K]."""
    found = [np.empty(0, np.int64)]
    for parts, mask in zip(groups, kept, strict=True):
        names = [group for group, _ in parts]
        found.append(np.repeat(names, [records for _, records in parts])[mask])
    return np.concatenate(found)


def _mix(
    config: CorpusConfig,
    alive: np.ndarray,
    tokens: np.ndarray,
    group: np.ndarray,
    draws: np.ndarray,
) -> tuple[tuple[GroupReport, ...], np.ndarray]:
    """What is said of each group, and how often each document is taken, uint8 [K]."""
    weights = [one.weight for one in config.mixture]
    has = np.bincount(group, tokens * alive, len(weights)).astype(np.int64).tolist()
    for number, found in enumerate(has):
        if not found:
            raise ConfigError(
                f"Each group of a mixture must hold documents, but none of "
                f"{', '.join(config.mixture[number].paths)} passes the filters; leave the group "
                "out or mend corpus.*."
            )
    rates = np.asarray(mixture.epochs(weights, has, config.mixture_epochs))
    copies = mixture.copies(draws, rates[group]) * alive.astype(np.uint8)
    taken = np.bincount(group, tokens * copies, len(weights)).astype(np.int64).tolist()
    reports = tuple(
        GroupReport(weight=weight, tokens_read=read, tokens=got, epochs=rate)
        for weight, read, got, rate in zip(weights, has, taken, rates.tolist(), strict=True)
    )
    return reports, copies
