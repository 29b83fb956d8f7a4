"""The head on Hopper GPUs: scores whose logits are never written, and the hidden states' gradient.

Two products with tiles of `hopper_product`. The first one's epilogue turns each tile of logits, in
registers, into what the loss keeps of it: a tile of the unnormalised gradient and a part of each
row's sum. Neither targets nor what is done with the results are known here.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from student_train.hopper_product import (
    COMPUTING,
    DEPTH,
    Tiles,
    Work,
    clusters,
    cover,
    launch,
    multiply,
)

LOG2_E = math.log2(math.e)
WIDTH_MULTIPLE = DEPTH
# The gradient has a column for each row of the table, and TMA wants strides of 16 bytes.
ROW_MULTIPLE = 8
OLDEST_JAX = (0, 11)
# The fastest of eight on an H200 (`benchmarks/head_speed.py --trials`), and one that is nearly as
# fast, for rows that a cluster's tiles do not divide: what lies beyond them is slow to load.
SQUARE, FLAT = Tiles(), Tiles(rows=64, columns=256, stages=4)
# Tiles one below the other that are computed before the next column of tiles.
_WALK = 32
# A piece of a tile on its way to memory has lines of 128 bytes. One is written, one on its way.
_PIECE_ROWS, _PIECE_BYTES, _PIECES = 64, 128, 2
# An item of fewer steps than this is mostly its epilogue.
_FEWEST_STEPS = 32
_MOST_SPLITS = 24
# From here on XLA's product leaves no processor idle either, and takes less energy.
_ENOUGH_ROWS = 2048


def scores(
    hidden: Array,
    table: Array,
    valid: Array,
    *,
    cap: float,
    tiles: Tiles | None = None,
    gradient: bool = True,
    interpret: Any = None,
) -> tuple[Array | None, Array]:
    """(s'·exp(s) as bfloat16 [C, V], float32 [C], Σ exp(s)) with s = cap·tanh(z/cap), z = h·wᵀ.

    Args:
      hidden: bfloat16 [C, D], D a multiple of 64.
      table: bfloat16 [V, D], V a multiple of 8.
      valid: int32 []; columns from here on hold 0 and add nothing.
      cap: so small that exp(cap)·V fits float32.
      tiles: how the product is cut; if not given, what is fastest for these rows.
      gradient: without, the first result is None and not computed.
      interpret: for a machine without a GPU, parameters of Pallas' interpreter.
    """
    count, width = hidden.shape[0], table.shape[0]
    tiles = tiles or _fastest(count)
    rows, columns = _grid(count, width, tiles)
    sums = jax.ShapeDtypeStruct((columns, rows * tiles.cluster * tiles.rows), jnp.float32)
    out = jax.ShapeDtypeStruct((count, width), jnp.bfloat16)
    run = launch(
        partial(_scores, cap=cap, tiles=tiles),
        tiles,
        out_type=(sums, out) if gradient else (sums,),
        name="head_scores",
        interpret=interpret,
    )
    found = run(hidden, table, jnp.reshape(valid, (1,)).astype(jnp.int32))
    return found[1] if gradient else None, 0.25 * jnp.sum(found[0], axis=0)[:count]


def hidden_gradient(
    unnormalised: Array,
    table: Array,
    *,
    tiles: Tiles | None = None,
    splits: int | None = None,
    interpret: Any = None,
) -> Array:
    """float32 [C, D], the product of bfloat16 [C, V] with the table, bfloat16 [V, D].

    The result of a small chunk has fewer tiles than a GPU has processors, or a few more, which
    would leave most of them waiting. So V is cut into `splits` parts, whose products are added in
    memory, in any order. Without `splits`, as many as give all processors the same to do; without
    `tiles` either, rows enough are left to XLA.
    """
    (count, width), depth = unnormalised.shape, table.shape[1]
    if tiles is None and splits is None and count >= _ENOUGH_ROWS:
        return jnp.einsum("cv,vd->cd", unnormalised, table, preferred_element_type=jnp.float32)
    tiles = tiles or _fastest(count)
    rows, columns = _grid(count, depth, tiles)
    if splits is None:
        splits = _splits(rows * columns, clusters(tiles), cover(width, DEPTH))
    shape = (count, depth)
    kernel = partial(
        launch,
        partial(_hidden_gradient, tiles=tiles, splits=splits),
        tiles,
        name="head_hidden_gradient",
        interpret=interpret,
    )
    if splits == 1:
        return kernel(out_type=jax.ShapeDtypeStruct(shape, jnp.float32))(unnormalised, table)
    total = jax.new_ref(jnp.zeros(shape, jnp.float32))
    kernel(out_type=())(unnormalised, table, total)
    return jax.freeze(total)


def _fastest(rows: int) -> Tiles:
    return FLAT if rows % (SQUARE.rows * SQUARE.cluster) else SQUARE


def _grid(rows: int, columns: int, tiles: Tiles) -> tuple[int, int]:
    """Tiles of a result: as many as a cluster has one below the other, and side by side."""
    return cover(rows, tiles.rows * tiles.cluster), cover(columns, tiles.columns)


def _splits(results: int, workers: int, steps: int) -> int:
    """Into how many parts to cut the depth, so that the last round of `workers` is nearly full."""

    def rounds(splits: int) -> int:
        return cover(results * splits, workers) * cover(steps, splits)

    return min(range(1, max(1, min(_MOST_SPLITS, steps // _FEWEST_STEPS)) + 1), key=rounds)


def _scores(hidden: Any, table: Any, valid: Any, *results: Any, cap: float, tiles: Tiles) -> None:
    import jax.experimental.pallas.mosaic_gpu as plgpu

    grid = _grid(hidden.shape[0], table.shape[0], tiles)

    def place(item: Any) -> tuple[Any, Any, Any]:
        # What runs at the same time is near each other, so that the L2 cache holds what it reads.
        return *plgpu.planar_snake(item, grid, 0, min(_WALK, grid[0])), 0

    multiply(
        hidden,
        table,
        Work(math.prod(grid), hidden.shape[1] // DEPTH, place),
        tiles,
        right_is_transposed=True,
        scratch={"sums": plgpu.SMEM((COMPUTING, tiles.rows), jnp.float32)}
        | (_pieces(jnp.bfloat16) if len(results) > 1 else {}),
        epilogue=partial(_keep_scores, valid=valid, results=results, cap=cap),
    )


def _keep_scores(
    logits: Any,
    row: Any,
    column: Any,
    scratch: Mapping[str, Any],
    *,
    valid: Any,
    results: tuple[Any, ...],
    cap: float,
) -> None:
    """Only tiles with unknown ids are masked.

    The branch has another use. Without one the compiler lets the arithmetic begin before the last
    tiles that were read are given back to the copying warpgroup, which then loads them late.
    """
    import jax.experimental.pallas as pl

    limit = valid[0]
    keep = partial(_keep_pieces, logits, row, column, scratch, results=results, cap=cap)
    all_known = (column + 1) * logits.shape[1] <= limit

    @pl.when(all_known)
    def _known() -> None:
        keep(limit=None)

    @pl.when(jnp.logical_not(all_known))
    def _masked() -> None:
        keep(limit=limit)


def _keep_pieces(
    logits: Any,
    row: Any,
    column: Any,
    scratch: Mapping[str, Any],
    *,
    limit: Any | None,
    results: tuple[Any, ...],
    cap: float,
) -> None:
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    warpgroup = lax.axis_index("warpgroup")
    total: dict[int, Any] = {}

    def keep(piece: Any, down: int, right: int) -> Any:
        exponential, gradient = _exponential(piece, cap)
        if limit is not None:
            ids = plgpu.broadcasted_iota(jnp.int32, piece.shape, 1, layout=plgpu.Layout.WGMMA)
            known = ids < limit - column * logits.shape[1] - right
            exponential = jnp.where(known, exponential, 0.0)
            gradient = jnp.where(known, gradient, 0.0)
        summed = jnp.sum(exponential, axis=1)
        total[down] = total[down] + summed if down in total else summed
        return gradient.astype(jnp.bfloat16)

    _send(logits, row, column, jnp.bfloat16, scratch, results[1:], keep)
    for down, summed in total.items():
        scratch["sums"][warpgroup, pl.ds(down, _PIECE_ROWS)] = summed
    plgpu.commit_smem()
    rows = pl.ds(row * logits.shape[0], logits.shape[0])
    plgpu.copy_smem_to_gmem(scratch["sums"].at[warpgroup], results[0].at[column, rows])


def _exponential(logits: Any, cap: float) -> tuple[Any, Any]:
    """(4·exp(s), s'·exp(s)) of s = cap·tanh(z/cap).

    With u = 1 / (1 + exp(2z/cap)): tanh = 1 - 2u and its derivative 4u(1 - u), which is exact to a
    few units of 2^-21 and, for |z| however large, neither NaN nor infinite. The reciprocal is the
    square of that of the root: one instruction, where a division is ten. The 4 is in the exponent,
    where it costs nothing; the sum is divided by it afterwards.
    """
    root = lax.rsqrt(1 + jnp.exp2(logits * (2 * LOG2_E / cap)))
    share = root * root
    exponential = jnp.exp2((cap * LOG2_E + 2) - (2 * cap * LOG2_E) * share)
    part = share * exponential
    return exponential, part - part * share


def _hidden_gradient(
    unnormalised: Any, table: Any, total: Any, *, tiles: Tiles, splits: int
) -> None:
    import jax.experimental.pallas.mosaic_gpu as plgpu

    grid = _grid(unnormalised.shape[0], table.shape[1], tiles)
    results = jnp.int32(math.prod(grid))
    # The last part may be shorter; beyond the table are zeros.
    steps = cover(cover(table.shape[0], DEPTH), splits)

    def place(item: Any) -> tuple[Any, Any, Any]:
        # All tiles of one part before the next: what is read of it is in the L2 cache.
        row, column = plgpu.planar_snake(lax.rem(item, results), grid, 0, grid[0])
        return row, column, lax.div(item, results) * steps

    def send(tile: Any, row: Any, column: Any, scratch: Mapping[str, Any]) -> None:
        _send(
            tile, row, column, jnp.float32, scratch, (total,), lambda piece, *_: piece, splits > 1
        )

    multiply(
        unnormalised,
        table,
        Work(math.prod(grid) * splits, steps, place),
        tiles,
        right_is_transposed=False,
        scratch=_pieces(jnp.float32),
        epilogue=send,
    )


def _pieces(dtype: DTypeLike) -> dict[str, Any]:
    """Shared memory for what leaves a tile."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    columns = _PIECE_BYTES // jnp.dtype(dtype).itemsize
    lines = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(_PIECE_BYTES))
    shape = (COMPUTING, _PIECES, _PIECE_ROWS, columns)
    return {"pieces": plgpu.SMEM(shape, dtype, transforms=lines)}


def _send(
    tile: Any,
    row: Any,
    column: Any,
    dtype: DTypeLike,
    scratch: Mapping[str, Any],
    out: tuple[Any, ...],
    result_of: Callable[[Any, int, int], Any],
    add: bool = False,
) -> None:
    """Write, or add, result_of(piece, its first row and column) of a tile's pieces to memory.

    One piece is computed while another is on its way. Without `out` they are only computed.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    warpgroup = lax.axis_index("warpgroup")
    height, width = _PIECE_ROWS, _PIECE_BYTES // jnp.dtype(dtype).itemsize
    corners = itertools.product(range(0, tile.shape[0], height), range(0, tile.shape[1], width))
    for index, (down, right) in enumerate(corners):
        result = result_of(tile[down : down + height, right : right + width], down, right)
        for target in out:
            place = scratch["pieces"].at[warpgroup, index % _PIECES]
            if index >= _PIECES:
                plgpu.wait_smem_to_gmem(_PIECES - 1, wait_read_only=True)
            place[...] = result
            plgpu.commit_smem()
            rows = pl.ds(row * tile.shape[0] + down, height)
            columns = pl.ds(column * tile.shape[1] + right, width)
            plgpu.copy_smem_to_gmem(
                place, target.at[rows, columns], reduction_op="add" if add else None
            )
