"""How often each document of a weighted mixture is taken.

A group's share of the store's tokens is its weight's share of all weights. The group that is
shortest for its weight is taken `mixture_epochs` times, which settles how often the others are.
Which documents are taken once more is decided by a hash of the seed and of where the document is,
so that it depends on nothing else.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def draw(seed: int, path: str, place: str) -> int:
    """A document's number, uniform in uint64."""
    name = f"{seed}\0{path}\0{place}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def epochs(weights: Sequence[float], tokens: Sequence[int], most: float) -> list[float]:
    """How often, on average, documents of each group are taken; 0 of a group without tokens."""
    total = min(most * has / weight for weight, has in zip(weights, tokens, strict=True) if has)
    return [
        total * weight / has if has else 0.0 for weight, has in zip(weights, tokens, strict=True)
    ]


def copies(draws: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """uint8 [D]: floor(rate), and one more with the probability that is left; draws uint64 [D]."""
    whole = np.floor(rate)
    return (whole + (draws / 2.0**64 < rate - whole)).astype(np.uint8)
