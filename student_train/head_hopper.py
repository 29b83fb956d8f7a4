"""The head's scores on Hopper GPUs: one Pallas kernel that forms logits and never writes them.

A matrix product whose epilogue turns each tile of logits, in registers, into what the loss keeps of
it: a tile of the unnormalised gradient and a part of each row's sum. Neither targets nor what is
done with the result are known here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

LOG2_E = math.log2(math.e)
# Two warpgroups compute, a third only copies and gives them its registers.
_COMPUTING, _COPYING_REGISTERS, _COMPUTING_REGISTERS = 2, 40, 232
# Tiles are rows of 128 bytes, which is how wgmma reads them.
DEPTH = 64
WIDTH_MULTIPLE = DEPTH
# The gradient has a column for each row of the table, and TMA wants strides of 16 bytes.
ROW_MULTIPLE = 8
OLDEST_JAX = (0, 11)


@dataclass(frozen=True)
class Tiles:
    """How the product is cut. Every choice gives the same sums, but for their order."""

    rows: int = 128
    """Rows (tokens) of a block's tile."""
    columns: int = 256
    """Columns (ids) of a block's tile."""
    by_rows: bool = True
    """The two warpgroups halve the rows of the tile, or else its columns."""
    stages: int = 4
    """Tiles of `rows` and `columns` by 64 that are in shared memory at once."""
    store_columns: int = 64
    """Columns that a warpgroup writes at once; its rows are those of its tile, at most 64."""
    cluster: int = 1
    """Blocks, one below the other, that read each tile of the table together: 1 or 2."""
    walk: int = 32
    """Tiles one below the other that are computed before the next column of tiles."""
    stagger: bool = False
    """The second warpgroup starts late, so that one's epilogue falls into the other's product."""
    fast_tanh: bool = False
    """tanh by the one instruction that has an error of 2^-11: 0.015 in a logit of 30."""


# The fastest of nine on an H200 (`benchmarks/head_speed.py --trials`).
TILES = Tiles(cluster=2, stagger=True)


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
      tiles: how the product is cut; `TILES` if not given.
      gradient: without, the first result is None and not computed.
      interpret: for a machine without a GPU, parameters of Pallas' interpreter.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    tiles = TILES if tiles is None else tiles
    count, width = hidden.shape[0], table.shape[0]
    row_tiles = _cover(count, tiles.rows * tiles.cluster) * tiles.cluster
    column_tiles = _cover(width, tiles.columns)
    parts = column_tiles if tiles.by_rows else _COMPUTING * column_tiles
    sums = jax.ShapeDtypeStruct((parts, row_tiles * tiles.rows), jnp.float32)
    out = jax.ShapeDtypeStruct((count, width), jnp.bfloat16)
    run = plgpu.kernel(
        partial(_body, cap=cap, tiles=tiles, gradient=gradient),
        out_type=(sums, out) if gradient else (sums,),
        grid=(_processors() // tiles.cluster,),
        grid_names=("cluster_grid",),
        cluster=(tiles.cluster,),
        cluster_names=("cluster",),
        num_threads=_COMPUTING + 1,
        thread_name="warpgroup",
        # A row of logits is summed by the threads of one warp, without shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="head_scores",
        interpret=interpret,
    )
    found = run(hidden, table, jnp.reshape(valid, (1,)).astype(jnp.int32))
    return found[1] if gradient else None, jnp.sum(found[0], axis=0)[:count]


def _cover(size: int, tile: int) -> int:
    return -(-size // tile)


def _processors() -> int:
    """Streaming multiprocessors; what an H100 or H200 has if this machine has no GPU."""
    device = jax.devices()[0]
    return int(device.core_count) if device.platform == "gpu" else 132


def _body(
    hidden: Any, table: Any, valid: Any, *results: Any, cap: float, tiles: Tiles, gradient: bool
) -> None:
    """The kernel of one block; every block has the same shared memory and barriers."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    rows, _ = _warpgroup_tile(tiles)
    lines = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
    swizzle = plgpu.find_swizzle(tiles.store_columns * 16)
    out_lines = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    buffers = {
        "hidden_tiles": plgpu.SMEM(
            (tiles.stages, tiles.rows, DEPTH), jnp.bfloat16, transforms=lines
        ),
        "table_tiles": plgpu.SMEM(
            (tiles.stages, tiles.columns, DEPTH), jnp.bfloat16, transforms=lines
        ),
        "sums": plgpu.SMEM((_COMPUTING, rows), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "started": plgpu.Barrier(num_arrivals=1),
    }
    if gradient:
        shape = (_COMPUTING, 2, min(rows, 64), tiles.store_columns)
        buffers["out"] = plgpu.SMEM(shape, jnp.bfloat16, transforms=out_lines)
    if tiles.cluster == 1:
        buffers["read"] = plgpu.Barrier(num_arrivals=_COMPUTING, num_barriers=tiles.stages)
    else:
        buffers["read"] = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=_COMPUTING, num_barriers=tiles.stages
        )

    def run(**shared: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < _COMPUTING)
        def _compute() -> None:
            plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
            limit = valid[0]
            _compute_tiles(hidden, table, limit, results, shared, cap=cap, tiles=tiles)

        @pl.when(warpgroup == _COMPUTING)
        def _copy() -> None:
            plgpu.set_max_registers(_COPYING_REGISTERS, action="decrease")
            _copy_tiles(hidden, table, shared, tiles)

    pl.run_scoped(run, collective_axes="warpgroup", **buffers)


def _warpgroup_tile(tiles: Tiles) -> tuple[int, int]:
    if tiles.by_rows:
        return tiles.rows // _COMPUTING, tiles.columns
    return tiles.rows, tiles.columns // _COMPUTING


def _grid(hidden: Any, table: Any, tiles: Tiles) -> tuple[int, int]:
    """Tiles, or clusters of them, one below the other and side by side."""
    return (
        _cover(hidden.shape[0], tiles.rows * tiles.cluster),
        _cover(table.shape[0], tiles.columns),
    )


def _own_tiles(grid: tuple[int, int]) -> Any:
    """int32 [], how many tiles this block computes."""
    blocks, own = lax.axis_size("cluster_grid"), lax.axis_index("cluster_grid")
    return lax.div(grid[0] * grid[1] - own + blocks - 1, jnp.int32(blocks))


def _for_each_tile(
    grid: tuple[int, int], tiles: Tiles, visit: Callable[[Any, Any, Any], None]
) -> None:
    """visit(row tile, column tile, tiles before it) for those of this block.

    Blocks that run at the same time work on tiles near each other, which the L2 cache then holds.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="cluster_grid")
    def _visit(info: Any) -> None:
        group, column = plgpu.planar_snake(info.index[0], grid, 0, min(tiles.walk, grid[0]))
        row = group * tiles.cluster + lax.axis_index("cluster")
        visit(row, column, info.local_index)


def _copy_tiles(hidden: Any, table: Any, shared: dict[str, Any], tiles: Tiles) -> None:
    """Keep `stages` pairs of tiles on their way, from one output tile's to the next's."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    steps = hidden.shape[1] // DEPTH
    loaded, read = shared["loaded"], shared["read"]
    stages = jnp.int32(tiles.stages)

    def visit(row: Any, column: Any, before: Any) -> None:
        @pl.loop(0, steps)
        def _step(k: Any) -> None:
            step = before * steps + k
            slot = lax.rem(step, stages)

            @pl.when(step >= stages)
            def _wait() -> None:
                plgpu.barrier_wait(read.at[slot])

            depth = pl.ds(k * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(
                hidden.at[pl.ds(row * tiles.rows, tiles.rows), depth],
                shared["hidden_tiles"].at[slot],
                loaded.at[slot],
            )
            plgpu.copy_gmem_to_smem(
                table.at[pl.ds(column * tiles.columns, tiles.columns), depth],
                shared["table_tiles"].at[slot],
                loaded.at[slot],
                collective_axes=None if tiles.cluster == 1 else "cluster",
            )

    grid = _grid(hidden, table, tiles)
    _for_each_tile(grid, tiles, visit)
    total = _own_tiles(grid) * steps

    # A block may end only when nobody will arrive at its barriers any more.
    @pl.loop(lax.max(total - stages, jnp.int32(0)), total)
    def _drain(step: Any) -> None:
        plgpu.barrier_wait(read.at[lax.rem(step, stages)])


def _compute_tiles(
    hidden: Any,
    table: Any,
    limit: Any,
    results: tuple[Any, ...],
    shared: dict[str, Any],
    *,
    cap: float,
    tiles: Tiles,
) -> None:
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    steps, stages = hidden.shape[1] // DEPTH, jnp.int32(tiles.stages)
    rows, columns = _warpgroup_tile(tiles)
    warpgroup = lax.axis_index("warpgroup")
    row_in_tile = warpgroup * rows if tiles.by_rows else jnp.int32(0)
    column_in_tile = jnp.int32(0) if tiles.by_rows else warpgroup * columns
    loaded, read, started = shared["loaded"], shared["read"], shared["started"]
    # The first warpgroup may be as many steps ahead as there are stages; one is left for loading.
    lead = min(tiles.stages - 1, steps - 1)
    grid = _grid(hidden, table, tiles)
    if tiles.stagger:

        @pl.when((warpgroup == 1) & (_own_tiles(grid) > 0))
        def _start_late() -> None:
            plgpu.barrier_wait(started)

    def visit(row: Any, column: Any, before: Any) -> None:
        def multiply(logits: Any) -> Any:
            @pl.loop(0, steps)
            def _step(k: Any) -> None:
                step = before * steps + k
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(loaded.at[slot])
                left = shared["hidden_tiles"].at[slot]
                right = shared["table_tiles"].at[slot].transpose((1, 0))
                if tiles.by_rows:
                    left = left.at[pl.ds(row_in_tile, rows)]
                else:
                    right = right.at[:, pl.ds(column_in_tile, columns)]
                plgpu.wgmma(logits, left, right)
                # One product is in flight; the one before it has read its tiles.
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _release() -> None:
                    plgpu.barrier_arrive(read.at[lax.rem(step - 1, stages)])

                if tiles.stagger:

                    @pl.when((warpgroup == 0) & (step == lead))
                    def _let_start() -> None:
                        plgpu.barrier_arrive(started)

            return logits[...]

        logits = pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))
        plgpu.barrier_arrive(read.at[lax.rem((before + 1) * steps - 1, stages)])
        first_row = row * tiles.rows + row_in_tile
        first_column = column * tiles.columns + column_in_tile
        part = column if tiles.by_rows else column * _COMPUTING + warpgroup
        _write(logits, first_row, first_column, part, limit, results, shared, cap=cap, tiles=tiles)

    _for_each_tile(grid, tiles, visit)
    plgpu.wait_smem_to_gmem(0)


def _write(
    logits: Any,
    first_row: Any,
    first_column: Any,
    part: Any,
    limit: Any,
    results: tuple[Any, ...],
    shared: dict[str, Any],
    *,
    cap: float,
    tiles: Tiles,
) -> None:
    """The epilogue: from a warpgroup's logits, in pieces that fit its shared memory, to results."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    warpgroup = lax.axis_index("warpgroup")
    rows, columns = logits.shape
    store_rows = min(rows, 64)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    pieces = [
        (row, column)
        for row in range(0, rows, store_rows)
        for column in range(0, columns, tiles.store_columns)
    ]
    total: dict[int, Any] = {}
    for index, (row, column) in enumerate(pieces):
        piece = logits[row : row + store_rows, column : column + tiles.store_columns]
        ids = plgpu.broadcasted_iota(jnp.int32, piece.shape, 1, layout=plgpu.Layout.WGMMA)
        known = ids < limit - first_column - column
        exponential, gradient = _exponential(piece, cap, tiles.fast_tanh)
        exponential = jnp.where(known, exponential, 0.0)
        summed = jnp.sum(exponential, axis=1)
        total[row] = summed if column == 0 else total[row] + summed
        if len(results) == 1:
            continue
        slot = index % 2
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        shared["out"][warpgroup, slot] = (gradient * exponential).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            shared["out"].at[warpgroup, slot],
            results[1].at[
                pl.ds(first_row + row, store_rows),
                pl.ds(first_column + column, tiles.store_columns),
            ],
        )
    for row, summed in total.items():
        shared["sums"][warpgroup, pl.ds(row, store_rows)] = summed
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        shared["sums"].at[warpgroup], results[0].at[part, pl.ds(first_row, rows)]
    )


def _exponential(logits: Any, cap: float, fast_tanh: bool) -> tuple[Any, Any]:
    """(exp(s), s') of s = cap·tanh(z/cap).

    With u = 1 / (1 + exp(2z/cap)): tanh = 1 - 2u and its derivative 4u(1 - u), which is exact to a
    few units of 2^-22 and, for |z| however large, neither NaN nor infinite. The reciprocal is that
    of a square's root: one instruction, where a division is ten.
    """
    if fast_tanh:
        ratio = jnp.tanh(logits * (1 / cap))
        return jnp.exp2(ratio * (cap * LOG2_E)), 1 - ratio * ratio
    above = 1 + jnp.exp2(logits * (2 * LOG2_E / cap))
    share = lax.rsqrt(above * above)
    exponential = jnp.exp2(cap * LOG2_E - (2 * cap * LOG2_E) * share)
    return exponential, 4 * (share - share * share)
