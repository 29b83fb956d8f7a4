"""The backward of attention with heads of 256 on Hopper: blocks in pairs, which add half as much.

What such a backward waits for is adding the queries' gradients to memory: a block has registers for
the gradients of 64 keys, and for every tile of so many keys a float32 array as large as the queries
is added. Here the two blocks of a cluster have neighbouring tiles of keys and walk over the queries
together. Each sends the other its dS, and forms half of the columns of the queries' gradient, for
the keys of both. Of the other's keys it needs only those columns, which stay in registers.

A block walks over all heads that share its keys, so that the gradients of keys and values are
written once, in their dtype: of theirs nothing is added to memory, and they are the same each time.
The mathematics is that of `gemma2.flash_kernels`, whose remark on the origin of the order of work
holds here too: the pipelines are those of FlashAttention-4's backward.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import LayoutEnum, hopper_helpers
from fa4_jax.cute import pipeline, utils
from fa4_jax.cute.copy_utils import cpasync_bulk_s2cluster
from fa4_jax.cute.cute_dsl_utils import assume_tensor_aligned
from fa4_jax.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess
from fa4_jax.cute.quack import copy_utils, layout_utils
from fa4_jax.cute.quack.sm90_utils import (
    gemm_w_idx,
    gemm_zero_init,
    make_smem_layout,
    partition_fragment_ABC,
)

from gemma2.flash_kernels import (
    BACKWARD_QUERIES,
    DTYPE,
    LOG2_E,
    STAGES,
    THREADS,
    Visible,
    add_to_memory,
)

HEAD_SIZE = 256
_HALF = HEAD_SIZE // 2
_TILE = BACKWARD_QUERIES  # of keys as well
_COMPUTING = THREADS - 128
_WARPS = _COMPUTING // 32
_LOADING_REGISTERS, _COMPUTING_REGISTERS = 24, 240
_TILE_BYTES = _TILE * HEAD_SIZE * 2
_NUMBERS_BYTES = _TILE * 4
_SLOPES_BYTES = _TILE * _TILE * 2
# Barriers of a block: both warp groups have written, one of them has read, results may be staged.
_WRITTEN, _READ, _STAGED = 1, 2, 4


class _Streamed(NamedTuple):
    """What is loaded tile by tile of queries: an array, and a number for each of its rows."""

    atom: Any
    array: Any
    tiles: Any
    """In shared memory, STAGES of them."""
    numbers: Any
    own_numbers: Any
    line: Any
    """The pipeline."""

    def copies(self, head, row):
        """(copy a tile, copy its numbers) of one head."""
        array = self.array[None, None, head, row]
        tiles = cute.local_tile(array, (_TILE, HEAD_SIZE), (None, 0))
        copy, _, _ = copy_utils.tma_get_copy_fn(
            self.atom, 0, cute.make_layout(1), tiles, self.tiles
        )
        numbers = cute.local_tile(self.numbers[None, head, row], (_TILE,), (None,))
        copy_numbers = copy_utils.cpasync_bulk_get_copy_fn(numbers, self.own_numbers)
        return (
            copy_utils.tma_producer_copy_fn(copy, self.line),
            copy_utils.tma_producer_copy_fn(copy_numbers, self.line),
        )


class _Kept(NamedTuple):
    """What is loaded once, the array itself or its gradient's, which is written at the end."""

    atom: Any
    array: Any
    tile: Any
    """In shared memory."""

    def copy(self, n_block, head, row, is_store: bool = False):
        array = self.array[None, None, head, row]
        ends = (cute.local_tile(array, (_TILE, HEAD_SIZE), (n_block, 0)), self.tile)
        if is_store:
            ends = ends[::-1]
        one = cute.make_layout(1)
        return copy_utils.tma_get_copy_fn(self.atom, 0, one, *ends, single_stage=True)[0]


class PairedBackward:
    """Gradients of queries as float32 sums, and of keys and values in their dtype.

    groups: heads that share a key's.
    """

    def __init__(self, groups: int, cap: float):
        self.groups, self.cap = groups, cap

    def _set_layouts(self) -> None:
        make = partial(make_smem_layout, DTYPE, LayoutEnum.ROW_MAJOR)
        # Read transposed too, each warp group its half of the columns.
        self.streamed = make((_TILE, HEAD_SIZE), STAGES, major_mode_size=_HALF)
        self.key = make((_TILE, HEAD_SIZE), None, major_mode_size=_HALF)
        self.value = make((_TILE, HEAD_SIZE), None)
        self.slopes = make((_TILE, _TILE), STAGES, major_mode_size=_TILE // 2)
        self.square = make((_TILE, _TILE), 1, major_mode_size=_TILE // 2)

    def _products(self) -> tuple[Any, ...]:
        """Of scores, of sums over queries, and of the queries' transposed gradient's two parts."""
        rows, columns = warpgroup.OperandMajorMode.K, warpgroup.OperandMajorMode.MN
        make = partial(hopper_helpers.make_trivial_tiled_mma, DTYPE, DTYPE)
        side_by_side = {"atom_layout_mnk": (1, 2, 1)}
        below = {"atom_layout_mnk": (2, 1, 1), "tiler_mn": (64, _TILE)}
        registers = warpgroup.OperandSource.RMEM
        return (
            make(rows, rows, Float32, tiler_mn=(64, _TILE // 2), **side_by_side),
            make(columns, columns, Float32, tiler_mn=(64, _HALF), **side_by_side),
            make(columns, rows, Float32, **below),
            make(rows, rows, Float32, a_source=registers, **below),
        )

    def _storage(self) -> Any:
        """What is in shared memory, which one more square of 8 KiB would not fit."""

        def tiles(layout: Any) -> Any:
            return cute.struct.Align[cute.struct.MemRange[DTYPE, cute.cosize(layout)], 1024]

        def barriers(count: int) -> Any:
            return cute.struct.MemRange[cutlass.Int64, count]

        numbers = cute.struct.Align[cute.struct.MemRange[Float32, _TILE * STAGES], 128]
        fields = {
            "query_barriers": barriers(2 * STAGES),
            "gradient_barriers": barriers(2 * STAGES),
            "exchange_barriers": barriers(2),
            "log_sum": numbers,
            "product_sum": numbers,
            "query": tiles(self.streamed),
            "value": tiles(self.value),
            "key": tiles(self.key),
            "gradient": tiles(self.streamed),
            "weights": tiles(self.square),
            "slopes": tiles(self.slopes),
            "others": tiles(self.square),
        }
        return cute.struct(type("Storage", (), {"__annotations__": fields}))

    @cute.jit
    def __call__(
        self,
        query: cute.Tensor,
        key: cute.Tensor,
        value: cute.Tensor,
        gradient: cute.Tensor,
        log2_sum: cute.Tensor,
        product_sum: cute.Tensor,
        query_sums: cute.Tensor,
        key_gradient: cute.Tensor,
        value_gradient: cute.Tensor,
        bounds: cute.Tensor,
        stream,
    ):
        query, key, value, gradient, key_gradient, value_gradient = [
            layout_utils.select(assume_tensor_aligned(x), [1, 3, 2, 0])
            for x in (query, key, value, gradient, key_gradient, value_gradient)
        ]
        sums = [
            layout_utils.select(assume_tensor_aligned(x), [2, 1, 0])
            for x in (log2_sum, product_sum, query_sums)
        ]
        self._set_layouts()
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        one_stage = cute.select(self.streamed, mode=[0, 1])
        copies = [
            x
            for op, array, layout in (
                (load, query, one_stage),
                (load, gradient, one_stage),
                (load, key, self.key),
                (load, value, self.value),
                (store, key_gradient, self.key),
                (store, value_gradient, self.value),
            )
            for x in cpasync.make_tiled_tma_atom(op, array, layout, (_TILE, HEAD_SIZE))
        ]
        pairs = cute.ceil_div(cute.size(key.shape[0]), 2 * _TILE)
        self.kernel(
            *copies,
            key,
            *sums,
            bounds,
            self.streamed,
            self.key,
            self.value,
            self.slopes,
            self.square,
            *self._products(),
            self._storage(),
        ).launch(
            grid=(2 * pairs, cute.size(key.shape[2]), cute.size(key.shape[3])),
            block=[THREADS, 1, 1],
            cluster=(2, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        query_atom: cute.CopyAtom,
        query: cute.Tensor,
        gradient_atom: cute.CopyAtom,
        gradient: cute.Tensor,
        key_atom: cute.CopyAtom,
        key: cute.Tensor,
        value_atom: cute.CopyAtom,
        value: cute.Tensor,
        key_gradient_atom: cute.CopyAtom,
        key_gradient: cute.Tensor,
        value_gradient_atom: cute.CopyAtom,
        value_gradient: cute.Tensor,
        key_in_memory: cute.Tensor,
        log2_sum: cute.Tensor,
        product_sum: cute.Tensor,
        query_sums: cute.Tensor,
        bounds: cute.Tensor,
        streamed_layout: cute.ComposedLayout,
        key_layout: cute.ComposedLayout,
        value_layout: cute.ComposedLayout,
        slopes_layout: cute.ComposedLayout,
        square_layout: cute.ComposedLayout,
        scores_mma: cute.TiledMma,
        keys_mma: cute.TiledMma,
        own_mma: cute.TiledMma,
        others_mma: cute.TiledMma,
        storage_type: cutlass.Constexpr,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (
                query_atom,
                gradient_atom,
                key_atom,
                value_atom,
                key_gradient_atom,
                value_gradient_atom,
            ):
                cpasync.prefetch_descriptor(atom)
        storage = cutlass.utils.SmemAllocator().allocate(storage_type)
        exchange = storage.exchange_barriers.data_ptr()
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(exchange, 1)
                cute.arch.mbarrier_init(exchange + 1, _WARPS)
        agent = cutlass.pipeline.Agent.Thread
        queries, gradients = [
            pipeline.PipelineTmaAsync.create(
                barrier_storage=barriers.data_ptr(),
                num_stages=STAGES,
                producer_group=cutlass.pipeline.CooperativeGroup(agent),
                consumer_group=cutlass.pipeline.CooperativeGroup(agent, _WARPS),
                tx_count=_TILE_BYTES + _NUMBERS_BYTES,
                # Without these, whoever is not the cluster's first block releases nothing.
                cta_layout_vmnk=cute.make_layout((1, 2, 1, 1)),
                mcast_mode_mn=(1, 0),
                defer_sync=True,
            )
            for barriers in (storage.query_barriers, storage.gradient_barriers)
        ]
        cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

        def shared(array, layout):
            return array.get_tensor(layout.outer, swizzle=layout.inner)

        numbers = cute.make_layout((_TILE, STAGES), stride=(1, _TILE))
        of_query = _Streamed(
            query_atom,
            query,
            shared(storage.query, streamed_layout),
            log2_sum,
            storage.log_sum.get_tensor(numbers),
            queries,
        )
        of_gradient = _Streamed(
            gradient_atom,
            gradient,
            shared(storage.gradient, streamed_layout),
            product_sum,
            storage.product_sum.get_tensor(numbers),
            gradients,
        )
        s_key, s_value = shared(storage.key, key_layout), shared(storage.value, value_layout)
        squares = (
            shared(storage.weights, square_layout),
            shared(storage.slopes, slopes_layout),
            shared(storage.others, square_layout),
        )
        n_block, key_head, row = cute.arch.block_idx()
        where = (n_block, key_head, row)
        visible = Visible(bounds, Int32(cute.size(key_in_memory.shape[0])), _TILE, _TILE)
        # Tiles of queries that see keys of the pair.
        first = n_block - n_block % 2
        past = visible.last_query(row, (first + 2) * _TILE - 1) // _TILE + 1

        if warp < 4:
            cute.arch.setmaxregister_decrease(_LOADING_REGISTERS)
            if warp == 0:
                kept = (_Kept(key_atom, key, s_key), _Kept(value_atom, value, s_value))
                self._load(of_query, of_gradient, kept, where, first, past)
        else:
            cute.arch.setmaxregister_increase(_COMPUTING_REGISTERS)
            self._compute(
                (scores_mma, keys_mma, own_mma, others_mma),
                of_query,
                of_gradient,
                (s_key, s_value),
                squares,
                exchange,
                key_in_memory,
                query_sums,
                (
                    _Kept(value_gradient_atom, value_gradient, s_value),
                    _Kept(key_gradient_atom, key_gradient, s_key),
                ),
                visible,
                where,
                first,
                past,
            )
        # Until here the other block may write to this one's memory, or arrive at its barriers.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def _load(self, of_query, of_gradient, kept, where, first, past):
        n_block, key_head, row = where
        load_key, load_value = [x.copy(n_block, key_head, row) for x in kept]
        queries, gradients = of_query.line, of_gradient.line
        state = pipeline.make_pipeline_state(cutlass.pipeline.PipelineUserType.Producer, STAGES)
        for group in cutlass.range_constexpr(self.groups):
            head = key_head * self.groups + group
            load_query, load_log_sum = of_query.copies(head, row)
            load_gradient, load_product_sum = of_gradient.copies(head, row)
            begin = first
            if const_expr(group == 0):
                queries.producer_acquire(state, extra_tx_count=_TILE_BYTES)
                load_key(tma_bar_ptr=queries.producer_get_barrier(state))
                load_query(first, producer_state=state)
                # The kernel before this one writes the numbers.
                cute.arch.griddepcontrol_wait()
                load_log_sum(first, producer_state=state)
                gradients.producer_acquire(state, extra_tx_count=_TILE_BYTES)
                load_value(tma_bar_ptr=gradients.producer_get_barrier(state))
                load_gradient(first, producer_state=state)
                load_product_sum(first, producer_state=state)
                state.advance()
                begin = first + 1
            for m_block in cutlass.range(begin, past, unroll=1):
                queries.producer_acquire(state)
                load_query(m_block, producer_state=state)
                load_log_sum(m_block, producer_state=state)
                gradients.producer_acquire(state)
                load_gradient(m_block, producer_state=state)
                load_product_sum(m_block, producer_state=state)
                state.advance()

    @cute.jit
    def _compute(
        self,
        products,
        of_query,
        of_gradient,
        keys_and_values,
        squares,
        exchange,
        key_in_memory,
        query_sums,
        results,
        visible,
        where,
        first,
        past,
    ):
        scores_mma, keys_mma, own_mma, others_mma = products
        s_query, s_gradient = of_query.tiles, of_gradient.tiles
        s_key, s_value = keys_and_values
        s_weights, s_slopes, s_others = squares
        queries, gradients = of_query.line, of_gradient.line
        n_block, key_head, row = where
        rank = n_block % 2
        other = 1 - rank
        thread = cute.arch.thread_idx()[0] - 128
        group = cute.arch.make_warp_uniform(thread // 128)
        is_sender = cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4
        thread_scores = scores_mma.get_slice(thread)
        of_scores, of_keys, of_own, of_others = [x.get_slice(group * 128) for x in products]

        # What is multiplied, and where the sums are.
        transposed, part = layout_utils.transpose_view, partition_fragment_ABC
        square, keys_shape = (_TILE, _TILE), (_TILE, HEAD_SIZE, _TILE)
        scores_shape, half_shape = (_TILE, _TILE, HEAD_SIZE), (_HALF, _TILE, _TILE)
        _, a_query, b_key = part(of_scores, scores_shape, s_query, s_key)
        _, a_gradient, b_value = part(of_scores, scores_shape, s_gradient, s_value)
        value_sum, a_weights, b_gradient = part(
            of_keys, keys_shape, transposed(s_weights), transposed(s_gradient)
        )
        key_sum, a_slopes, b_query = part(
            of_keys, keys_shape, transposed(s_slopes), transposed(s_query)
        )
        own_keys = cute.local_tile(transposed(s_key), (_HALF, _TILE), (rank, 0))
        query_sum, a_own, b_slopes = part(of_own, half_shape, own_keys, s_slopes)
        _, others_keys, b_others = part(of_others, half_shape, None, s_others)
        _read_others_keys(others_keys, others_mma, key_in_memory, where, thread)

        store = partial(
            copy_utils.get_smem_store_C,
            scores_mma,
            tidx=thread,
            position_independent=True,
            major_mode_size=_TILE // 2,
        )
        write_weights, write_slopes = store(s_weights)[0], store(s_slopes)[0]
        own_log_sum, own_product_sum = [
            layout_utils.mma_partition_C_vec(
                x.own_numbers, thread_scores, expand_shape=_TILE, is_colvec=True
            )
            for x in (of_query, of_gradient)
        ]
        # In the order of `convert`: by tile, warp group, half of the columns, and thread.
        tile_size = _TILE * HEAD_SIZE
        head_size = cute.size(query_sums.shape[0])
        own_offset = group * (tile_size // 2) + rank * (tile_size // 4) + thread % 128 * 4
        own_sums = query_sums[None, None, row].iterator + own_offset

        # Nothing is being read yet.
        cute.arch.barrier_arrive(barrier_id=_READ + 1 - group, number_of_threads=_COMPUTING)
        state = pipeline.make_pipeline_state(cutlass.pipeline.PipelineUserType.Consumer, STAGES)
        step = Int32(0)
        has_sums = Boolean(False)
        for of_group in cutlass.range(self.groups, unroll=1):
            head_sums = own_sums + (key_head * self.groups + of_group) * head_size
            for m_block in cutlass.range(first, past, unroll=1):
                stage = state.index
                queries.consumer_wait(state, queries.consumer_try_wait(state))
                scores = gemm_zero_init(scores_mma, square, a_query, b_key, A_idx=stage)
                is_edge = visible.has_edge_of_key(row, m_block, n_block)
                log_sum = copy_utils.load_s2r(own_log_sum[None, stage])
                gradients.consumer_wait(state, gradients.consumer_try_wait(state))
                slopes = gemm_zero_init(
                    scores_mma, square, a_gradient, b_value, A_idx=stage, wg_wait=1
                )

                ratio = cute.math.tanh(scores.load() * (1.0 / self.cap), fastmath=True)
                cap_slope = cute.make_fragment_like(scores)
                # Before the mask, whose -inf would give 0 · inf.
                cap_slope.store(1.0 - ratio * ratio)
                scores.store(ratio)
                if is_edge:
                    visible.mask(scores, row, m_block, n_block, thread_scores, False)
                rows = layout_utils.reshape_acc_to_mn(scores)
                for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
                    for c in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                        rows[r, c] = cute.math.exp2(
                            rows[r, c] * (self.cap * LOG2_E) - log_sum[r], fastmath=True
                        )
                product_sum = copy_utils.load_s2r(own_product_sum[None, stage])
                weights = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(scores), DTYPE)
                # There is one tile of weights: the other warp group has read the last one.
                cute.arch.barrier(barrier_id=_READ + group, number_of_threads=_COMPUTING)
                write_weights(weights, dst_idx=0)
                scores.store(scores.load() * cap_slope.load())

                warpgroup.wait_group(0)
                slope_rows = layout_utils.reshape_acc_to_mn(slopes)
                for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
                    for c in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                        slope_rows[r, c] = rows[r, c] * (slope_rows[r, c] - product_sum[r])
                rounded = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(slopes), DTYPE)
                write_slopes(rounded, dst_idx=stage)
                cute.arch.fence_view_async_shared()
                cute.arch.barrier(barrier_id=_WRITTEN, number_of_threads=_COMPUTING)
                if is_sender:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(exchange, _SLOPES_BYTES)
                        # The other block has read what it was sent before; which is also why
                        # the tile that goes now may be written again in two steps.
                        cute.arch.mbarrier_wait(exchange + 1, (step & 1) ^ 1)
                        cpasync_bulk_s2cluster(
                            s_slopes[None, None, stage].iterator,
                            s_others.iterator,
                            exchange,
                            _SLOPES_BYTES,
                            other,
                        )

                # While dS is on its way, what needs only this block's; the keys' product last, so
                # that the queries' gradient is added to memory while it runs.
                gemm_w_idx(
                    keys_mma, value_sum, a_weights, b_gradient, not has_sums, A_idx=0, B_idx=stage
                )
                gemm_w_idx(own_mma, query_sum, a_own, b_slopes, True, B_idx=stage)
                cute.arch.mbarrier_wait(exchange, step & 1)
                gemm_w_idx(others_mma, query_sum, others_keys, b_others, False, B_idx=0)
                gemm_w_idx(
                    keys_mma,
                    key_sum,
                    a_slopes,
                    b_query,
                    not has_sums,
                    A_idx=stage,
                    B_idx=stage,
                    wg_wait=1,
                )
                _add(query_sum, head_sums + m_block * tile_size)
                warpgroup.wait_group(0)
                gradients.consumer_release(state)
                queries.consumer_release(state)
                cute.arch.barrier_arrive(barrier_id=_READ + 1 - group, number_of_threads=_COMPUTING)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(exchange + 1, other)
                state.advance()
                step += 1
                has_sums = Boolean(True)
        _write(keys_mma, (value_sum, key_sum), results, where, thread)


@cute.jit
def _read_others_keys(fragment, mma, key_in_memory, where, thread):
    """This block's half of the columns of the other block's keys; 0 past the last one."""
    n_block, key_head, row = where
    rank = n_block % 2
    other_block = n_block + 1 - 2 * rank
    keys = key_in_memory[None, None, key_head, row]
    tile = cute.local_tile(keys, (_TILE, _HALF), (other_block, rank))
    own = mma.get_slice(thread)
    given = own.partition_A(layout_utils.transpose_view(tile))
    at = own.partition_A(cute.make_identity_tensor((_HALF, _TILE)))
    count = cute.size(keys.shape[0]) - other_block * _TILE
    flat = cute.make_tensor(fragment.iterator, cute.make_layout(cute.size(fragment)))
    for i in cutlass.range_constexpr(cute.size(fragment)):
        flat[i] = DTYPE(0.0)
        if at[i][1] < count:
            flat[i] = given[i]


@cute.jit
def _add(values, pointer):
    fours = cute.make_tensor(values.iterator, cute.make_layout((4, cute.size(values) // 4)))
    for i in cutlass.range_constexpr(cute.size(fours, mode=[1])):
        add_to_memory(pointer + i * (128 * 4), fours[None, i])


@cute.jit
def _write(mma, sums, results, where, thread):
    """Each through the shared memory of what it is the gradient of."""
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    for values, result in zip(sums, results, strict=True):
        stage = copy_utils.get_smem_store_C(mma, result.tile, thread, position_independent=True)[0]
        store = result.copy(*where, is_store=True)
        # Both warp groups' products have read it.
        cute.arch.barrier(barrier_id=_STAGED, number_of_threads=_COMPUTING)
        stage(values, dst_idx=None)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=_STAGED, number_of_threads=_COMPUTING)
        if warp == 4:
            store()
            cute.arch.cp_async_bulk_commit_group()
    if warp == 4:
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cache
def backward(groups: int, cap: float) -> PairedBackward:
    """For heads, `groups` of which share a key's."""
    return PairedBackward(groups, cap)


@cache
def convert() -> FlashAttentionBackwardPostprocess:
    """Sums of the queries' gradients, in the order of their transposed products, to bfloat16."""
    return FlashAttentionBackwardPostprocess(
        DTYPE, HEAD_SIZE, 90, _TILE, _COMPUTING, 1, dQ_swapAB=True
    )


@cute.jit
def run_backward(
    stream,
    query,
    key,
    value,
    gradient,
    log2_sum,
    product_sum,
    _query_zeros,
    bounds,
    query_sums,
    key_gradient,
    value_gradient,
    kernel: cutlass.Constexpr,
):
    kernel(
        query,
        key,
        value,
        gradient,
        log2_sum,
        product_sum,
        query_sums,
        key_gradient,
        value_gradient,
        bounds,
        stream,
    )
