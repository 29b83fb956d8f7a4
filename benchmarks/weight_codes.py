"""Which code for weights gives the least error at equal bytes, on real distributions.

`python -m benchmarks.weight_codes --states DIR/states --temperature 0.985` takes threshold sampling
with threshold 1/n, whose tail entries all weigh 1/n, and codes the heads' weights in several ways,
each rounded at random so that its mean is right: whole points of 1/n (which is what systematic
sampling stores), parts of points, 8 and 16 bits on a logarithmic scale from 1/n to 1, and float16.
Only with whole points does the number of tails follow from the rest; the others store it too.

Prints for each code the variance that it adds to that of the sampling, the bytes a token of heads'
codes and tails' counts after blosc (zstd 5, byte shuffle) as the store does it, and the total error
at the bytes of whole points, by the slope of error over bytes between the numbers of entries.
"""

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numcodecs import Blosc

from benchmarks.sampling_error import POINTS, TILE
from benchmarks.states import ROW_TOKENS, States, StatesTeacher
from teacher_dump import teacher

# Stored bytes beside those of weights, measured at 12 entries: of a token, and of an entry's id.
TOKEN_BYTES, ID_BYTES = 1.27 + 1.68 + 0.36, 15.72 / 12.02
CODES = ("points", "1/2 points", "1/4 points", "1/8 points", "log 8 bit", "log 16 bit", "float16")


def neighbours(code: str, p: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of weights p ≥ 1/points: the code below, and the values of it and of the next one."""
    if "points" in code:
        parts = points * {"points": 1, "1/2 points": 2, "1/4 points": 4, "1/8 points": 8}[code]
        low = np.floor(p * parts)
        return low.astype(np.uint16), low / parts, (low + 1) / parts
    if code == "float16":
        low = p.astype(np.float16)
        low = np.where(low.astype(np.float64) > p, np.nextafter(low, np.float16(0)), low)
        high = np.nextafter(low, np.float16(2)).astype(np.float64)
        return low.view(np.uint16), low.astype(np.float64), high
    last = 255 if code == "log 8 bit" else 65_535
    step = math.log(points) / last
    low = np.clip(np.floor(np.log(p * points) / step), 0, last - 1)
    values = np.exp(low * step) / points, np.exp((low + 1) * step) / points
    return low.astype(np.uint8 if last == 255 else np.uint16), *values


def stored(values: np.ndarray) -> int:
    shuffle = Blosc.SHUFFLE if values.itemsize > 1 else Blosc.NOSHUFFLE
    return len(Blosc("zstd", 5, shuffle).encode(np.ascontiguousarray(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", required=True, type=Path)
    parser.add_argument("--temperature", type=float, choices=sorted(POINTS), default=0.985)
    parser.add_argument("--rows", type=int, default=2)
    arguments = parser.parse_args()
    states = States(arguments.states, arguments.rows)
    small = StatesTeacher(states)
    numbers = {entries: points for entries, (points, _) in POINTS[arguments.temperature].items()}
    thresholds = jnp.asarray([1 / n for n in numbers.values()])

    @jax.jit
    def one_tile(hidden: jax.Array, predicted: jax.Array) -> tuple[jax.Array, ...]:
        tile, _ = teacher.score_tile(
            small.params, small.config, hidden, predicted, arguments.temperature,
            small.info.vocab_size,
        )  # fmt: skip
        p = jnp.exp(tile.scores() - tile.log_total[:, None])
        p = jnp.where(predicted[:, None], p, 0.0)
        tails = [jnp.where(p < t, p, 0.0) for t in thresholds]
        mass = jnp.stack([jnp.sum(tail, axis=1) for tail in tails])
        return p, mass, jnp.stack([jnp.sum(tail * tail, axis=1) for tail in tails])

    random = np.random.default_rng(0)
    lowest = 1 / max(numbers.values())
    heads: list[tuple[np.ndarray, np.ndarray]] = []
    masses, squares = [], []
    for row in range(arguments.rows):
        for start in range(0, ROW_TOKENS, TILE):
            where = slice(start, start + TILE)
            p, mass, square = one_tile(
                states.hidden[row, where], jnp.asarray(states.predicted[row, where])
            )
            values = np.asarray(p)
            position, column = np.nonzero(values >= lowest)
            heads.append((position + row * ROW_TOKENS + start, values[position, column]))
            masses.append(np.asarray(mass))
            squares.append(np.asarray(square))
    position = np.concatenate([h[0] for h in heads])
    p_of = np.concatenate([h[1] for h in heads]).astype(np.float64)
    mass, square = np.concatenate(masses, axis=1), np.concatenate(squares, axis=1)
    tokens = arguments.rows * ROW_TOKENS
    found: dict[int, dict[str, tuple[float, float, float]]] = {}
    for index, (entries, points) in enumerate(numbers.items()):
        is_head = p_of >= 1 / points
        at, p = position[is_head], p_of[is_head]
        sampling = float((mass[index] / points - square[index]).sum()) / tokens
        tails = np.floor(mass[index] * points + random.random(tokens)).astype(np.uint16)
        count_bytes = sum(stored(part) for part in np.split(tails, arguments.rows)) / tokens
        found[entries] = {}
        for code in CODES:
            low, below, above = neighbours(code, p, points)
            up = random.random(len(p)) * (above - below) < p - below
            added = float(((above - p) * (p - below)).sum()) / tokens
            codes = low + up.astype(low.dtype)
            if code == "points":
                kept = codes >= 2
                codes, rows = codes[kept] - 2, at[kept] // ROW_TOKENS
                codes = codes.astype(np.uint8 if points <= 257 else np.uint16)
            else:
                rows = at // ROW_TOKENS
            size = sum(stored(codes[rows == row]) for row in range(arguments.rows)) / tokens
            size += 0.0 if code == "points" else count_bytes
            total = size + TOKEN_BYTES + ID_BYTES * entries
            found[entries][code] = (sampling, added, total)
    print(f"{'entries':>8} {'points':>7} {'code':12}{'added':>9}{'bytes':>8}{'at equal bytes':>16}")
    for entries, points in numbers.items():
        other = min((e for e in numbers if e != entries), key=lambda e: abs(e - entries))
        one, two = found[entries]["points"], found[other]["points"]
        slope = math.log(two[0] / one[0]) / math.log(two[2] / one[2])
        base = one[0] + one[1]
        for code, (sampling, added, total) in found[entries].items():
            equal = (sampling + added) / base * (total / one[2]) ** -slope
            print(
                f"{entries:8} {points:7} {code:12}{added / sampling:9.2%}{total:8.2f}{equal:16.3f}"
            )


if __name__ == "__main__":
    main()
