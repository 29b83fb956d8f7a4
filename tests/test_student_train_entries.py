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
def test_positions_on_the_device_are_those_of_a_plain_loop(rows, blocks, block, per_token):
    random = np.random.default_rng(rows * block)
    slots, length = block * per_token, blocks * block
    for fill in (0.0, 0.5, 1.0):
        heads = np.zeros((rows, length), np.uint16)
        tails = np.zeros((rows, length), np.uint16)
        for row in range(rows):
            for entry in range(int(fill * slots) * blocks):
                counts = (heads, tails)[random.integers(2)]
                counts[row, (entry % blocks) * block + random.integers(block)] += 1
        expected = np.stack(
            [slow_positions(h, t, block, slots) for h, t in zip(heads, tails, strict=True)]
        )
        on_device = jax.jit(entry_positions, static_argnums=(2, 3))(
            heads, tails, block, slots * blocks
        )
        np.testing.assert_array_equal(np.asarray(on_device), expected)
        on_host = codec.entry_positions(heads, tails, block, slots)
        np.testing.assert_array_equal(on_host, expected)
