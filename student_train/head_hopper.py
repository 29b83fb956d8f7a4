"""The head's scores on Hopper GPUs: one Pallas kernel that forms logits and never writes them.

A matrix product whose epilogue turns each tile of logits, in registers, into what the loss keeps of
it: a tile of the unnormalised gradient and a part of each row's sum. Neither targets nor what is
done with the result are known here.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

LOG2_E = math.log2(math.e)
# Two warpgroups compute in turns, a third only copies and gives them its registers.
_COMPUTING, _COPYING_REGISTERS, _COMPUTING_REGISTERS = 2, 40, 232
# Tiles are rows of 128 bytes, which is how wgmma reads them.
DEPTH = 64
# Pieces of results that a warpgroup has in shared memory: one is written, one on its way.
_OUT_SLOTS = 2
WIDTH_MULTIPLE = DEPTH
# The gradient has a column for each row of the table, and TMA wants strides of 16 bytes.
ROW_MULTIPLE = 8
OLDEST_JAX = (0, 11)


@dataclass(frozen=True)
class Tiles:
    """How the product is cut. Every choice gives the same sums, but for their order."""

    rows: int = 128
    """Rows (tokens) of a warpgroup's tile."""
    columns: int = 128
    """Columns (ids) of a warpgroup's tile."""
    stages: int = 6
    """Tiles of `rows` and `columns` by 64 that are in shared memory at once."""
    store_columns: int = 64
    """Columns that a warpgroup writes at once; its rows are those of its tile, at most 64."""
    cluster: int = 2
    """Blocks, one below the other, that read each tile of the table together: 1 or 2."""
    walk: int = 32
    """Tiles one below the other that are computed before the next column of tiles."""


# The fastest of eight on an H200 (`benchmarks/head_speed.py --trials`), by little.
TILES = Tiles()


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
    sums = jax.ShapeDtypeStruct((column_tiles, row_tiles * tiles.rows), jnp.float32)
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
    return found[1] if gradient else None, 0.25 * jnp.sum(found[0], axis=0)[:count]


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

    lines = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
    swizzle = plgpu.find_swizzle(tiles.store_columns * 16)
    out_lines = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    barrier: Callable[..., Any] = plgpu.Barrier
    if tiles.cluster > 1:
        barrier = partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    buffers = {
        "hidden_tiles": plgpu.SMEM(
            (tiles.stages, tiles.rows, DEPTH), jnp.bfloat16, transforms=lines
        ),
        "table_tiles": plgpu.SMEM(
            (tiles.stages, tiles.columns, DEPTH), jnp.bfloat16, transforms=lines
        ),
        "sums": plgpu.SMEM((_COMPUTING, tiles.rows), jnp.float32),
        # Whoever waits at a barrier must wait every time: a warpgroup has its own.
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=_COMPUTING * tiles.stages),
        "read": barrier(num_arrivals=1, num_barriers=tiles.stages),
    }
    if gradient:
        shape = (_COMPUTING, _OUT_SLOTS, min(tiles.rows, 64), tiles.store_columns)
        buffers["out"] = plgpu.SMEM(shape, jnp.bfloat16, transforms=out_lines)

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
    """Keep `stages` pairs of tiles on their way, from one warpgroup's product to the other's."""
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

            signal = loaded.at[_warpgroup_of(before) * stages + slot]
            depth = pl.ds(k * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(
                hidden.at[pl.ds(row * tiles.rows, tiles.rows), depth],
                shared["hidden_tiles"].at[slot],
                signal,
            )
            plgpu.copy_gmem_to_smem(
                table.at[pl.ds(column * tiles.columns, tiles.columns), depth],
                shared["table_tiles"].at[slot],
                signal,
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
    """Every second tile of this block: one warpgroup multiplies while the other does its epilogue.

    Nothing more orders them. The tiles of one product are loaded before those of the next.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    steps, stages = hidden.shape[1] // DEPTH, jnp.int32(tiles.stages)
    warpgroup = lax.axis_index("warpgroup")
    loaded, read = shared["loaded"], shared["read"]

    def visit(row: Any, column: Any, before: Any) -> None:
        def multiply(logits: Any) -> Any:
            @pl.loop(0, steps)
            def _step(k: Any) -> None:
                step = before * steps + k
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(loaded.at[warpgroup * stages + slot])
                left = shared["hidden_tiles"].at[slot]
                right = shared["table_tiles"].at[slot].transpose((1, 0))
                plgpu.wgmma(logits, left, right)
                # One product is in flight; the one before it has read its tiles.
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _release() -> None:
                    plgpu.barrier_arrive(read.at[lax.rem(step - 1, stages)])

            return logits[...]

        @pl.when(_warpgroup_of(before) == warpgroup)
        def _own() -> None:
            logits = pl.run_scoped(multiply, plgpu.ACC((tiles.rows, tiles.columns), jnp.float32))
            plgpu.barrier_arrive(read.at[lax.rem((before + 1) * steps - 1, stages)])
            _write(logits, row, column, limit, results, shared, cap=cap, tiles=tiles)

    _for_each_tile(_grid(hidden, table, tiles), tiles, visit)
    plgpu.wait_smem_to_gmem(0)


def _warpgroup_of(before: Any) -> Any:
    """int32 [], which warpgroup has the tile that comes after `before` others of this block."""
    return lax.rem(before, jnp.int32(_COMPUTING))


def _write(
    logits: Any,
    row: Any,
    column: Any,
    limit: Any,
    results: tuple[Any, ...],
    shared: dict[str, Any],
    *,
    cap: float,
    tiles: Tiles,
) -> None:
    """The epilogue: a warpgroup's logits become results; only tiles with unknown ids are masked.

    The branch has another use. Without one the compiler lets the arithmetic begin before the last
    tiles that were read are given back to the copying warpgroup, which then loads them late.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    write = partial(_write_pieces, logits, row, column, results, shared, cap=cap, tiles=tiles)
    all_known = (column + 1) * tiles.columns <= limit
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(all_known)
    def _known() -> None:
        write(limit=None)

    @pl.when(jnp.logical_not(all_known))
    def _masked() -> None:
        write(limit=limit)


def _write_pieces(
    logits: Any,
    row: Any,
    column: Any,
    results: tuple[Any, ...],
    shared: dict[str, Any],
    *,
    limit: Any | None,
    cap: float,
    tiles: Tiles,
) -> None:
    """In pieces that fit the warpgroup's shared memory, one written while the next is computed."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    warpgroup = lax.axis_index("warpgroup")
    store = min(tiles.rows, 64), tiles.store_columns
    first_row, first_column = row * tiles.rows, column * tiles.columns
    pieces = itertools.product(range(0, tiles.rows, store[0]), range(0, tiles.columns, store[1]))
    total: dict[int, Any] = {}
    for index, (down, right) in enumerate(pieces):
        piece = logits[down : down + store[0], right : right + store[1]]
        exponential, gradient = _exponential(piece, cap)
        if limit is not None:
            ids = plgpu.broadcasted_iota(jnp.int32, store, 1, layout=plgpu.Layout.WGMMA)
            known = ids < limit - first_column - right
            exponential = jnp.where(known, exponential, 0.0)
            gradient = jnp.where(known, gradient, 0.0)
        summed = jnp.sum(exponential, axis=1)
        total[down] = summed if right == 0 else total[down] + summed
        if len(results) == 1:
            continue
        out = shared["out"].at[warpgroup, index % _OUT_SLOTS]
        if index >= _OUT_SLOTS:
            plgpu.wait_smem_to_gmem(_OUT_SLOTS - 1, wait_read_only=True)
        out[...] = gradient.astype(jnp.bfloat16)
        plgpu.commit_smem()
        rows, columns = pl.ds(first_row + down, store[0]), pl.ds(first_column + right, store[1])
        plgpu.copy_smem_to_gmem(out, results[1].at[rows, columns])
    for down, summed in total.items():
        shared["sums"][warpgroup, pl.ds(down, store[0])] = summed
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        shared["sums"].at[warpgroup], results[0].at[column, pl.ds(first_row, tiles.rows)]
    )


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
