"""A matrix product on Hopper GPUs, whose tiles are still in registers for what comes after it.

In Pallas (Mosaic GPU). A block has three warpgroups. One copies tiles of both matrices to shared
memory; two compute, each every second tile of the result: while one does its epilogue, the other
multiplies, and tensor cores wait for neither. What is multiplied, and why, is not known here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Two warpgroups compute in turns; the third gives them its registers.
COMPUTING = 2
_COPYING_REGISTERS, _COMPUTING_REGISTERS = 40, 232
# Tiles are rows of 128 bytes, which is how wgmma reads them.
DEPTH = 64


@dataclass(frozen=True)
class Tiles:
    """How a product is cut. Every choice gives the same sums, but for their order."""

    rows: int = 128
    """Rows of a warpgroup's tile of the result."""
    columns: int = 128
    """Its columns."""
    stages: int = 6
    """Pairs of tiles, of `rows` and of `columns` by 64, that are in shared memory at once."""
    cluster: int = 2
    """Blocks, one below the other, that read each tile of the right matrix together: 1 or 2."""


@dataclass(frozen=True)
class Work:
    """What there is to multiply, in items that clusters of blocks take in their order."""

    items: int
    steps: int
    """Tiles of depth 64 that each item multiplies and adds up."""
    place: Callable[[Any], tuple[Any, Any, Any]]
    """Item → (which rows, as many as a cluster's tiles; which columns, a tile's; first step)."""


Epilogue = Callable[[Any, Any, Any, Mapping[str, Any]], None]
"""Of (float32 tile in registers, its row and column among tiles, scratch)."""


def cover(size: int, tile: int) -> int:
    return -(-size // tile)


def clusters(tiles: Tiles) -> int:
    """How many clusters of blocks run at once: all of an H100 or H200, if this machine has none."""
    device = jax.devices()[0]
    processors = int(device.core_count) if device.platform == "gpu" else 132
    return processors // tiles.cluster


def launch(
    body: Callable[..., None], tiles: Tiles, *, out_type: Any, name: str, interpret: Any
) -> Callable[..., Any]:
    """The kernel of `body`, which gets references to operands and results and calls `multiply`."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(clusters(tiles),),
        grid_names=("clusters",),
        cluster=(tiles.cluster,),
        cluster_names=("cluster",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        # Rows of a tile are summed by the threads of one warp, without shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name=name,
        interpret=interpret,
    )


def multiply(
    left: Any,
    right: Any,
    work: Work,
    tiles: Tiles,
    *,
    right_is_transposed: bool,
    scratch: Mapping[str, Any],
    epilogue: Epilogue,
) -> None:
    """Multiply bfloat16 left [M, K] with right [K, N], or the transpose of right [N, K].

    Inside a kernel of `launch`. What lies beyond the matrices is read as zeros. `scratch` is what
    the epilogue needs in shared memory.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    lines = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
    right_tile = (tiles.columns, DEPTH) if right_is_transposed else (DEPTH, tiles.columns)
    barrier: Callable[..., Any] = plgpu.Barrier
    if tiles.cluster > 1:
        barrier = partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    product = partial(_Product, left, right, work, tiles, right_is_transposed, epilogue)

    def run(left_tiles: Any, right_tiles: Any, loaded: Any, read: Any, **scratch: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        of_block = product(left_tiles, right_tiles, loaded, read, scratch)

        @pl.when(warpgroup < COMPUTING)
        def _compute() -> None:
            plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
            of_block.compute()

        @pl.when(warpgroup == COMPUTING)
        def _copy() -> None:
            plgpu.set_max_registers(_COPYING_REGISTERS, action="decrease")
            of_block.copy()

    pl.run_scoped(
        run,
        collective_axes="warpgroup",
        left_tiles=plgpu.SMEM((tiles.stages, tiles.rows, DEPTH), jnp.bfloat16, transforms=lines),
        right_tiles=plgpu.SMEM((tiles.stages, *right_tile), jnp.bfloat16, transforms=lines),
        # Whoever waits at a barrier must wait every time: each warpgroup has its own.
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING * tiles.stages),
        read=barrier(num_arrivals=1, num_barriers=tiles.stages),
        **scratch,
    )


@dataclass(frozen=True)
class _Product:
    """One block's part, as its warpgroups see it."""

    left: Any
    right: Any
    work: Work
    tiles: Tiles
    right_is_transposed: bool
    epilogue: Epilogue
    left_tiles: Any
    right_tiles: Any
    loaded: Any
    read: Any
    scratch: Mapping[str, Any]

    def _for_each_item(self, visit: Callable[[Any, Any, Any, Any], None]) -> None:
        """visit(row tile, column tile, first step, items before it) for those of this block."""
        import jax.experimental.pallas.mosaic_gpu as plgpu

        @plgpu.nd_loop((self.work.items,), collective_axes="clusters")
        def _visit(info: Any) -> None:
            rows, column, first = self.work.place(info.index[0])
            row = rows * self.tiles.cluster + lax.axis_index("cluster")
            visit(row, column, first, info.local_index)

    def _slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.tiles.stages))

    def _signal(self, before: Any, slot: Any) -> Any:
        """Where the warpgroup that computes the item learns that a pair of tiles is loaded."""
        return self.loaded.at[_warpgroup_of(before) * self.tiles.stages + slot]

    def copy(self) -> None:
        """Keep `stages` pairs of tiles on their way, from one item's to the next's."""
        import jax.experimental.pallas as pl
        import jax.experimental.pallas.mosaic_gpu as plgpu

        tiles, steps = self.tiles, self.work.steps
        together = "cluster" if tiles.cluster > 1 else None

        def visit(row: Any, column: Any, first: Any, before: Any) -> None:
            rows = pl.ds(row * tiles.rows, tiles.rows)
            columns = pl.ds(column * tiles.columns, tiles.columns)

            @pl.loop(0, steps)
            def _step(k: Any) -> None:
                step = before * steps + k
                slot = self._slot(step)

                @pl.when(step >= tiles.stages)
                def _wait() -> None:
                    plgpu.barrier_wait(self.read.at[slot])

                signal = self._signal(before, slot)
                depth = pl.ds((first + k) * DEPTH, DEPTH)
                right = (columns, depth) if self.right_is_transposed else (depth, columns)
                plgpu.copy_gmem_to_smem(self.left.at[rows, depth], self.left_tiles.at[slot], signal)
                plgpu.copy_gmem_to_smem(
                    self.right.at[right],
                    self.right_tiles.at[slot],
                    signal,
                    collective_axes=together,
                )

        self._for_each_item(visit)
        blocks, own = lax.axis_size("clusters"), lax.axis_index("clusters")
        items = lax.div(self.work.items - own + blocks - 1, jnp.int32(blocks))

        # A block may end only when nobody will arrive at its barriers any more.
        @pl.loop(lax.max(items * steps - tiles.stages, jnp.int32(0)), items * steps)
        def _drain(step: Any) -> None:
            plgpu.barrier_wait(self.read.at[self._slot(step)])

    def compute(self) -> None:
        """Every second item. Nothing orders the warpgroups but that items are loaded in order."""
        import jax.experimental.pallas as pl
        import jax.experimental.pallas.mosaic_gpu as plgpu

        tiles, steps = self.tiles, self.work.steps

        def visit(row: Any, column: Any, first: Any, before: Any) -> None:
            def accumulate(total: Any) -> Any:
                @pl.loop(0, steps)
                def _step(k: Any) -> None:
                    step = before * steps + k
                    slot = self._slot(step)
                    plgpu.barrier_wait(self._signal(before, slot))
                    right = self.right_tiles.at[slot]
                    if self.right_is_transposed:
                        right = right.transpose((1, 0))
                    plgpu.wgmma(total, self.left_tiles.at[slot], right)
                    # One product is in flight; the one before it has read its tiles.
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _release() -> None:
                        plgpu.barrier_arrive(self.read.at[self._slot(step - 1)])

                return total[...]

            @pl.when(_warpgroup_of(before) == lax.axis_index("warpgroup"))
            def _own() -> None:
                total = pl.run_scoped(
                    accumulate, plgpu.ACC((tiles.rows, tiles.columns), jnp.float32)
                )
                plgpu.barrier_arrive(self.read.at[self._slot((before + 1) * steps - 1)])
                # What the last epilogue sent has long left its scratch.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                self.epilogue(total, row, column, self.scratch)

        self._for_each_item(visit)
        plgpu.wait_smem_to_gmem(0)


def _warpgroup_of(before: Any) -> Any:
    """int32 [], which warpgroup computes the item that comes after `before` others of its block."""
    return lax.rem(before, jnp.int32(COMPUTING))
