"""Duplicates among all documents: digests and signatures of each, and which are then dropped.

A worker computes what is of one document; the driver compares. MinHash signatures agree in each
place with the probability that is the documents' Jaccard similarity (Broder 1997). They are cut
into bands; documents with a band in common are candidates, whose whole signatures are compared.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from schemas.corpus import DuplicatesConfig
from schemas.errors import MissingDependencyError
from teacher_dump import decontamination

_SEED = 1


def digest(data: bytes) -> np.ndarray:
    """What equal documents have in common, uint64 [2]."""
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")


class Signer:
    """Computes signatures. Raises MissingDependencyError without rensa."""

    def __init__(self, config: DuplicatesConfig):
        try:
            import rensa
        except ImportError as error:
            raise MissingDependencyError(
                "corpus.duplicates.near needs rensa, which is not installed; "
                "pip install 'retort[corpus]'."
            ) from error
        self._new, self._config = rensa.RMinHash, config

    def __call__(self, text: str) -> np.ndarray:
        """uint32 [permutations]; of a text shorter than an n-gram, of the text itself."""
        found = self._new(num_perm=self._config.permutations, seed=_SEED)
        found.update(list(decontamination.ngrams(text, self._config.ngram_words)) or [text])
        return np.asarray(found.digest(), np.uint32)


def later_copies(digests: np.ndarray) -> np.ndarray:
    """bool [D]: documents whose digest [D, 2] an earlier one has."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    found = np.zeros(len(digests), bool)
    found[order[1:][same]] = True
    return found


def bands(config: DuplicatesConfig) -> tuple[int, int]:
    """(bands, places of each) for a threshold.

    Of all that fit the signature, the fewest bands by which documents that are just similar enough
    become candidates with a probability of 0.99 or more, which is 1 - (1 - t^r)^b.
    """
    for rows in range(config.permutations, 0, -1):
        count = config.permutations // rows
        if 1 - (1 - config.threshold**rows) ** count >= 0.99:
            return count, rows
    return config.permutations, 1


def near_copies(
    count: int,
    keys_of_band: Callable[[int], np.ndarray],
    signatures_of: Callable[[np.ndarray], np.ndarray],
    config: DuplicatesConfig,
) -> np.ndarray:
    """bool [count]: documents to which an earlier one is similar.

    keys_of_band gives uint64 [count] of one band, all of which is in memory at a time;
    signatures_of gives the signatures uint32 [n, permutations] of documents int64 [n], ascending.
    A candidate is compared with the first document that has its band and with the last before it.
    """
    pairs = [_candidates(keys_of_band(band)) for band in range(bands(config)[0])]
    pairs_found = np.unique(np.concatenate([np.empty((0, 2), np.int64), *pairs]), axis=0)
    involved = np.unique(pairs_found)
    signatures = signatures_of(involved)
    found = np.zeros(count, bool)
    for some in _chunks(pairs_found):
        one, two = (signatures[np.searchsorted(involved, some[:, side])] for side in (0, 1))
        similar = (one == two).mean(axis=1) >= config.threshold
        found[some[similar, 1]] = True
    return found


def band_keys(signatures: np.ndarray, config: DuplicatesConfig, band: int) -> np.ndarray:
    """uint64 [D] of signatures uint32 [D, permutations]: equal where the band is."""
    rows = bands(config)[1]
    keys = np.full(len(signatures), band, np.uint64)
    for column in signatures[:, band * rows : (band + 1) * rows].astype(np.uint64).T:
        # The finaliser of splitmix64, after each place.
        keys = (keys ^ column) + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys = keys ^ (keys >> np.uint64(31))
    return keys


def _candidates(keys: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2] of documents with the same key, the earlier first."""
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    # Where a run of equal keys begins, for each place.
    begins = np.maximum.accumulate(np.where(np.append(True, ~same), np.arange(len(keys)), 0))
    at = np.flatnonzero(same) + 1
    first, before, later = order[begins[at]], order[at - 1], order[at]
    return np.concatenate([np.stack([first, later], 1), np.stack([before, later], 1)])


def _chunks(pairs: np.ndarray, size: int = 1 << 16) -> Iterator[np.ndarray]:
    return (pairs[at : at + size] for at in range(0, len(pairs), size))
