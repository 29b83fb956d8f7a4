"""Positions of entries, found on the device, are those that the store means."""

import jax
import numpy as np
import pytest

from logit_store import codec
from student_train.entries import entry_positions


def slow_positions(heads: np.ndarray, tails: np.ndarray, block: int, slots: int) -> np.ndarray:
    """One row, entry by entry."""
    found = []
    for start in range(0, len(heads), block):
        mine = [t for t in range(start, start + block) for _ in range(heads[t])]
        mine += [t for t in range(start, start + block) for _ in range(tails[t])]
        found += mine + [start + block - 1] * (slots - len(mine))
    return np.array(found)


@pytest.mark.parametrize(
    ("rows", "blocks", "block", "per_token"),
    [(1, 1, 1, 1), (3, 2, 8, 3), (2, 4, 5, 2), (2, 1, 64, 9)],
)
def test_positions_on_the_device_are_those_of_a_plain_loop(
    rows: int, blocks: int, block: int, per_token: int
) -> None:
    random = np.random.default_rng(rows * block)
    slots, length = block * per_token, blocks * block
    # Blocks without entries, full ones, and blocks that each have another number.
    for least, most in ((0, 0), (slots, slots), (0, slots), (0, slots)):
        heads = np.zeros((rows, length), np.uint16)
        tails = np.zeros((rows, length), np.uint16)
        for row in range(rows):
            for first in range(0, length, block):
                for _ in range(random.integers(least, most + 1)):
                    counts = (heads, tails)[random.integers(2)]
                    counts[row, first + random.integers(block)] += 1
        expected = np.stack(
            [slow_positions(h, t, block, slots) for h, t in zip(heads, tails, strict=True)]
        )
        on_device = jax.jit(entry_positions, static_argnums=(2, 3))(
            heads, tails, block, slots * blocks
        )
        np.testing.assert_array_equal(np.asarray(on_device), expected)
        on_host = codec.entry_positions(heads, tails, block, slots)
        np.testing.assert_array_equal(on_host, expected)
