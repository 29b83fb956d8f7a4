"""Token ids in Zarr arrays: a row is a document, or one row holds all, each ended by the end id."""

from collections.abc import Iterator
from typing import Any

import numpy as np

SUFFIX = ".zarr"
_BLOCK_TOKENS = 1 << 20


def root_of(name: str) -> str | None:
    """The array that a file is of, or None."""
    at = f"{name}/".find(f"{SUFFIX}/")
    return None if at < 0 else name[: at + len(SUFFIX)]


def open_array(path: str) -> Any:
    """The zarr.Array at a path or URL. Raises ValueError unless it holds integers, 1-D or 2-D."""
    # Takes a moment to import, and few corpora have any.
    import zarr

    array = zarr.open_array(path, mode="r")
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError(
            f"token ids must be integers [T] or [N, T], not {array.dtype} {array.shape}"
        )
    return array


def length(path: str) -> int:
    """Places along the first axis; 0 if it cannot be told, so that the array is left whole."""
    try:
        return int(open_array(path).shape[0])
    except (ValueError, OSError, KeyError):
        return 0


def documents(
    array: Any, first: int, stop: int, end_id: int, pad_id: int, most: int, digest: Any
) -> Iterator[tuple[int, np.ndarray | None]]:
    """(place along the first axis, ids int64 [n]) of the documents that begin in [first, stop).

    Ids are None if there are more than `most`. Padding at a row's end is left out. All that is read
    goes into `digest`.
    """
    if array.ndim == 2:
        rows = max(1, _BLOCK_TOKENS // max(1, array.shape[1]))
        for at in range(first, stop, rows):
            block = np.asarray(array[at : min(at + rows, stop)])
            digest.update(block.astype("<i8").tobytes())
            for row, ids in enumerate(block.astype(np.int64), at):
                used = np.flatnonzero(ids != pad_id)
                ids = ids[: used[-1] + 1 if len(used) else 0]
                yield row, ids if len(ids) <= most else None
        return
    yield from _stream(array, first, stop, end_id, most, digest)


def _stream(
    array: Any, first: int, stop: int, end_id: int, most: int, digest: Any
) -> Iterator[tuple[int, np.ndarray | None]]:
    size = array.shape[0]
    # A document begins at the start and after each end.
    at = max(first - 1, 0)
    inside = first > 0
    begin, held, kept = first, [], 0
    while at < size and (begin < stop or inside):
        block = np.asarray(array[at : min(at + _BLOCK_TOKENS, size)]).astype(np.int64)
        ends = np.flatnonzero(block == end_id) + 1
        used = 0
        for end in (*ends.tolist(), None):
            piece = block[used:end]
            if inside:
                if end is None:
                    break
            else:
                digest.update(piece.astype("<i8").tobytes())
                kept += len(piece)
                if kept <= most:
                    held.append(piece)
                if end is None:
                    break
                yield begin, np.concatenate(held) if kept <= most else None
            inside, used, begin, held, kept = False, end, at + end, [], 0
            if begin >= stop:
                return
        at += len(block)
        if inside and at >= stop:
            return
    if kept:
        yield begin, np.concatenate(held) if kept <= most else None
