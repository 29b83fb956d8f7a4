"""Rows of tokens to rows as they are stored: batches of one shape, settled entries, codes.

What the accelerator proposes is settled here in NumPy, row by row: whole points on ids, all of them
there, and no more entries in a block than it has slots. All randomness is that of (seed, row).
"""

from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from logit_store import codec
from logit_store.codec import RowEntries, Vocabulary
from logit_store.rows import TargetRows
from schemas.errors import BudgetError
from schemas.manifest import SamplerSpec
from teacher_dump import samplers
from teacher_dump.teacher import RowCandidates, Teacher

# Batches that are computed or settled at a time, each settled by a thread of its own: the device
# has the next one meanwhile.
_BATCHES_AT_ONCE = 3
# A block that still has too many entries loses one of so many parts of its points at a time.
_THINNING_STEPS = 64


def begin_rows(
    teacher: Teacher,
    vocabulary: Vocabulary,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    rows: np.ndarray,
    *,
    spec: SamplerSpec,
    seed: int,
    batch_sequences: int,
) -> Callable[[], TargetRows]:
    """Targets of tokens and segment ids [R, L], which are the store's `rows` [R].

    Returns when the teacher has been handed all rows: what is returned waits for them. From then on
    the teacher may be handed other rows, in another order of ids too.

    The teacher always gets `batch_sequences` rows, the last batch padded, so that one program is
    compiled and results do not depend on how many rows are asked for. Raises BudgetError, here or
    when waited for, if the sampler's entries do not fit a block.
    """
    samplers.check(spec, teacher.info.vocab_size)
    pool = ThreadPoolExecutor(_BATCHES_AT_ONCE, thread_name_prefix="settle")
    batches: list[Future[list[dict[str, np.ndarray]]]] = []

    def settle(mine: np.ndarray, wait: Callable[[], RowCandidates]) -> list[dict[str, np.ndarray]]:
        result = wait()
        return [
            _encode_row(result, index, row, vocabulary, spec, seed)
            for index, row in enumerate(mine.tolist())
        ]

    def finish() -> TargetRows:
        with pool:
            found = [row for batch in batches for row in batch.result()]
        return TargetRows(**{name: np.stack([row[name] for row in found]) for name in found[0]})

    try:
        for number, start in enumerate(range(0, len(rows), batch_sequences)):
            if number >= _BATCHES_AT_ONCE:
                batches[number - _BATCHES_AT_ONCE].result()
            padded = np.minimum(np.arange(start, start + batch_sequences), len(rows) - 1)
            wait = teacher.begin(tokens[padded], segment_ids[padded], rows[padded], spec, seed)
            batches.append(pool.submit(settle, rows[start : start + batch_sequences], wait))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return finish


def _encode_row(
    result: RowCandidates,
    index: int,
    row: int,
    vocabulary: Vocabulary,
    spec: SamplerSpec,
    seed: int,
) -> dict[str, np.ndarray]:
    """The stored columns of one row of a batch."""
    random = np.random.Generator(np.random.Philox(key=[seed, row]))
    length = len(result.teacher_entropy[index])
    # Drawn first, so that they are the same whatever the entries need.
    nats = random.random((2, length))
    entries, block_points = settle_row(
        vocabulary,
        RowEntries(result.position[index], result.id[index], result.points[index]),
        spec,
        length,
        random,
        where=f"row {row}",
    )
    slots = length * spec.slots_per_token
    return codec.encode_row(vocabulary, entries, length, slots, spec.points) | {
        "block_points": block_points,
        "teacher_nats": codec.encode_nats(
            np.stack([result.teacher_entropy[index], -result.label_logprob[index]]), nats
        ),
    }


def settle_row(
    vocabulary: Vocabulary,
    proposed: RowEntries,
    spec: SamplerSpec,
    length: int,
    random: np.random.Generator,
    where: str,
) -> tuple[RowEntries, np.ndarray]:
    """A row's entries, one for each id of a position, and the points of each block uint16 [blocks].

    proposed: points [n], 0 where there is nothing: whole numbers that have the same sum at each
    predicted position of a block, spec.points or (where the sampler saw that they will not fit)
    fewer; or, of top_k and full, probabilities in points, which are rounded here. Blocks with more
    entries than slots, and rows with more offset bits than there is room for, are thinned to fewer
    points. Raises BudgetError if that is not enough, or if the sampler cannot be thinned.
    """
    position, ids, points = _merged(proposed, spec, random)
    blocks = length // spec.block_tokens
    block_points = np.full(blocks, spec.points, np.int64)
    edges = np.searchsorted(position, np.arange(blocks + 1) * spec.block_tokens)
    spans = [slice(*edge) for edge in pairwise(edges)]
    for block, mine in enumerate(spans):
        totals = _totals(points[mine], position[mine])
        most = int(totals.min(initial=spec.points))
        if most == spec.points and mine.stop - mine.start <= spec.slots_per_block:
            continue
        _refuse_exact(spec, f"{mine.stop - mine.start} entries in block {block} of {where}")
        points[mine], block_points[block] = _thin_to_fit(
            points[mine], position[mine], most, spec, random
        )
    room = 8 * length * spec.slots_per_token
    while codec.offset_bits(vocabulary, ids[points > 0]) > room:
        _refuse_exact(spec, f"the offset bits of {where}")
        if (block_points == 1).all():
            raise BudgetError(
                f"The offset bits of a row must fit a byte for each slot, but those of {where} do "
                "not with one point per token; raise sampler.slots_per_token."
            )
        for block, mine in enumerate(spans):
            block_points[block] = max(1, block_points[block] * 7 // 8)
            points[mine] = _thin(points[mine], position[mine], block_points[block], random)
    kept = points > 0
    return RowEntries(position[kept], ids[kept], points[kept]), block_points.astype(np.uint16)


def _merged(
    proposed: RowEntries, spec: SamplerSpec, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """position, id and whole points > 0, int64 [n], sorted by position and id, each pair once."""
    used = proposed.points > 0
    position, ids = proposed.position[used].astype(np.int64), proposed.id[used]
    most_ids = int(ids.max(initial=0)) + 1
    flat, place = np.unique(position * most_ids + ids, return_inverse=True)
    points = np.bincount(place, proposed.points[used], minlength=len(flat))
    position, ids = flat // most_ids, flat % most_ids
    if spec.name in ("top_k", "full"):
        points = _round(points, position, spec.points, random)
    kept = points > 0
    return position[kept], ids[kept], points[kept].astype(np.int64)


def _refuse_exact(spec: SamplerSpec, what: str) -> None:
    if spec.name in ("top_k", "full"):
        raise BudgetError(
            f"What the {spec.name} sampler keeps must fit its slots, {spec.slots_per_token} per "
            f"token, but {what} do not; raise sampler.slots_per_token."
        )


def _runs(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of each run of equal positions."""
    starts = np.flatnonzero(np.diff(position, prepend=-1))
    return starts, np.diff(np.append(starts, len(position)))


def _totals(points: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Points of each position that has any."""
    starts, _ = _runs(position)
    return np.add.reduceat(points, starts) if len(starts) else points


def _round(
    points: np.ndarray, position: np.ndarray, total: int, random: np.random.Generator
) -> np.ndarray:
    """Whole points float64 [n] of mean `points` [n], which sum to `total` at each position.

    One random offset for each position, and the whole numbers that the cumulated points pass:
    a point more or less than the exact number at most, and the sum is kept.
    """
    if not len(points):
        return points
    starts, lengths = _runs(position)
    cumulated = np.cumsum(points)
    before = np.repeat(cumulated[starts] - points[starts], lengths)
    share = (cumulated - before) * np.repeat(total / _totals(points, position), lengths)
    reached = np.floor(share + np.repeat(random.random(len(starts)), lengths))
    # The share before the last is the total too where the last is almost 0, give or take rounding.
    reached = np.minimum(reached, total)
    reached[starts + lengths - 1] = total
    whole = np.diff(reached, prepend=0.0)
    whole[starts] = reached[starts]
    return whole


def _thin_to_fit(
    points: np.ndarray,
    position: np.ndarray,
    most: int,
    spec: SamplerSpec,
    random: np.random.Generator,
) -> tuple[np.ndarray, int]:
    """A block's points int64 [n] with as many of them per position as fit its slots, and how many.

    `most` is what each position has at least. The expected number of entries says how many are
    kept. Where more entries come out than expected, what is left is thinned further: thinning anew
    until it fits would favour outcomes of few entries, in which large probabilities weigh more.
    """
    share = points / np.repeat(_totals(points, position), _runs(position)[1])

    def expected(kept: int) -> float:
        return float(np.minimum(share * kept, 1.0).sum())

    # One point per position always fits: a block has a slot for each of its tokens at least.
    kept = max(1, bisect_right(range(1, most + 1), float(spec.slots_per_block), key=expected))
    points = _thin(points, position, kept, random)
    while np.count_nonzero(points) > spec.slots_per_block:
        kept -= max(1, kept // _THINNING_STEPS)
        points = _thin(points, position, kept, random)
    return points, kept


def _thin(
    points: np.ndarray, position: np.ndarray, kept: int, random: np.random.Generator
) -> np.ndarray:
    """int64 [n]: the points that are left when each position keeps `kept` of its own.

    A position's points are laid side by side, and evenly spaced ones from a random place on are
    kept: each with the same probability, so that a share of them has the mean that it had of all.
    """
    starts, lengths = _runs(position)
    total = _totals(points, position)
    # In whole numbers, so that a position keeps `kept` exactly and the probability is exact too.
    offset = np.repeat(random.integers(0, total), lengths)
    total = np.repeat(total, lengths)
    cumulated = np.cumsum(points)
    stop = cumulated - np.repeat(cumulated[starts] - points[starts], lengths)
    return (stop * kept + offset) // total - ((stop - points) * kept + offset) // total
