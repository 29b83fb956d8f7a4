"""Seals: each row carries a checksum of its place and its values.

The checksums of chunks and files vouch for bytes, wherever they lie. A seal says which row they
are: a row's tokens are sealed from the row's number, and its targets from the seal of its tokens.
So whoever reads a row knows it for itself, for whole, and for computed from just these tokens.
"""

import google_crc32c
import numpy as np

CARRIERS = ("segment_ids", "block_points")
"""The array of each group whose rows end in the seal: two uint16 values, the low one first."""
WIDTH = 2
"""Values by which a row of a carrier is longer than what it holds."""


def seal(start: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    """uint32 [R]: of each row, CRC-32C of its `start` (uint64 [R]) and of its values.

    Little-endian, array after array as the format lists them. `start` is the row's number for
    tokens, and the seal of the row's tokens for targets.
    """
    raw = [np.ascontiguousarray(v, v.dtype.newbyteorder("<")).view() for v in columns.values()]
    for values in raw:
        # The library takes bytes that are read-only, and then without a copy.
        values.flags.writeable = False
    seals = np.empty(len(start), np.uint32)
    for row, first in enumerate(start.tolist()):
        value = google_crc32c.value(first.to_bytes(8, "little"))
        for values in raw:
            value = google_crc32c.extend(value, values[row])
        seals[row] = value
    return seals


def attach(columns: dict[str, np.ndarray], seals: np.ndarray) -> dict[str, np.ndarray]:
    """The columns as they are stored, with the rows' seals uint32 [R]."""
    halves = seals.astype("<u4").view("<u2").reshape(-1, WIDTH)
    return {
        name: np.concatenate([values, halves], axis=1) if name in CARRIERS else values
        for name, values in columns.items()
    }


def detach(stored: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The columns of stored rows, and the seals uint32 [R] that they carry."""
    columns = dict(stored)
    (carrier,) = (name for name in CARRIERS if name in stored)
    columns[carrier] = stored[carrier][:, :-WIDTH]
    halves = np.ascontiguousarray(stored[carrier][:, -WIDTH:], "<u2")
    return columns, halves.view("<u4")[:, 0].astype(np.uint32)
