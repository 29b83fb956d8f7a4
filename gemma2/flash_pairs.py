"""The backward of attention with heads of 256 on Hopper: two blocks share what they add to memory.

What bounds this backward is adding the queries' gradients to memory: a block has registers for 64
keys' gradients, so that each tile of keys adds a float32 array as large as the queries. Here two
blocks of a cluster have neighbouring tiles of keys and walk over the queries together. Each gives
the other its dS, and forms half of the columns of the queries' gradient for the keys of both: half
as much is added. The other's keys, of which only that half is wanted, are kept in registers. And a
block walks over all the heads that share its keys, so that the gradients of keys and values are
written once, in the dtype of the arrays, and nothing of theirs is added to memory.

The same packages as `gemma2.flash_kernels`, and the same mathematics.
"""

import math
from functools import cache, partial

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import LayoutEnum
from cutlass.utils import hopper_helpers
from fa4_jax.cute import copy_utils as cluster_copies
from fa4_jax.cute import pipeline, utils
from fa4_jax.cute.cute_dsl_utils import assume_tensor_aligned
from fa4_jax.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess
from fa4_jax.cute.quack import copy_utils, layout_utils, sm90_utils
from fa4_jax.cute.quack.sm90_utils import gemm_w_idx, gemm_zero_init

from gemma2.flash_kernels import _DTYPE, _LOG2_E, _THREADS, _add_to_memory, _Visible

HEAD_SIZE = 256
TILE = 64
_STAGES = 2
_COMPUTING = _THREADS - 128
_WARPS = _COMPUTING // 32
_HALF = HEAD_SIZE // 2
_LOADING_REGISTERS, _COMPUTING_REGISTERS = 24, 240
_TILE_BYTES = TILE * HEAD_SIZE * 2
_SLOPE_BYTES = TILE * TILE * 2
# Barriers of the hardware: both groups have written, all of it is read, the results are written.
_WRITTEN, _READ, _DONE = 1, 2, 4


def _copies(given, head, row):
    """Of the tiles of one head, and of the numbers that belong to them."""
    atom, tensor, shared, sums, s_sums, line = given
    tiles = cute.local_tile(tensor[None, None, head, row], (TILE, HEAD_SIZE), (None, 0))
    copy, _, _ = copy_utils.tma_get_copy_fn(atom, 0, cute.make_layout(1), tiles, shared)
    numbers = cute.local_tile(sums[None, head, row], (TILE,), (None,))
    copy_numbers = copy_utils.cpasync_bulk_get_copy_fn(numbers, s_sums)
    return (
        copy_utils.tma_producer_copy_fn(copy, line),
        copy_utils.tma_producer_copy_fn(copy_numbers, line),
    )


class PairedBackward:
    """Gradients of queries as float32 sums, and of keys and values in their dtype."""

    def __init__(self, groups: int, cap: float, defer: bool = True):
        self.groups, self.cap, self.defer = groups, cap, defer

    def _layouts(self):
        make = partial(sm90_utils.make_smem_layout, _DTYPE, LayoutEnum.ROW_MAJOR)
        self.wide = make((TILE, HEAD_SIZE), _STAGES, major_mode_size=_HALF)
        self.keys = make((TILE, HEAD_SIZE), None, major_mode_size=_HALF)
        self.values = make((TILE, HEAD_SIZE), None)
        self.square = make((TILE, TILE), _STAGES, major_mode_size=TILE // 2)
        self.one_square = make((TILE, TILE), 1, major_mode_size=TILE // 2)

    def _products(self):
        k, mn = warpgroup.OperandMajorMode.K, warpgroup.OperandMajorMode.MN
        make = partial(hopper_helpers.make_trivial_tiled_mma, _DTYPE, _DTYPE)
        scores = make(k, k, Float32, atom_layout_mnk=(1, 2, 1), tiler_mn=(64, TILE // 2))
        of_keys = make(mn, mn, Float32, atom_layout_mnk=(1, 2, 1), tiler_mn=(64, _HALF))
        own = make(mn, k, Float32, atom_layout_mnk=(2, 1, 1), tiler_mn=(64, TILE))
        other = make(
            k,
            k,
            Float32,
            atom_layout_mnk=(2, 1, 1),
            tiler_mn=(64, TILE),
            a_source=warpgroup.OperandSource.RMEM,
        )
        return scores, of_keys, own, other

    def _storage(self):
        def array(layout):
            return cute.struct.Align[cute.struct.MemRange[_DTYPE, cute.cosize(layout)], 1024]

        wide, keys, square, one = (
            array(x) for x in (self.wide, self.keys, self.square, self.one_square)
        )
        numbers = cute.struct.Align[cute.struct.MemRange[Float32, TILE * _STAGES], 128]

        @cute.struct
        class Storage:
            query_barriers: cute.struct.MemRange[cutlass.Int64, _STAGES * 2]
            gradient_barriers: cute.struct.MemRange[cutlass.Int64, _STAGES * 2]
            exchange_barriers: cute.struct.MemRange[cutlass.Int64, 2]
            log_sum: numbers
            product_sum: numbers
            query: wide
            value: keys
            key: keys
            gradient: wide
            weights: one
            slopes: square
            others: one

        return Storage

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
        wide = [
            layout_utils.select(assume_tensor_aligned(x), [1, 3, 2, 0])
            for x in (query, key, value, gradient, key_gradient, value_gradient)
        ]
        sums = [
            layout_utils.select(assume_tensor_aligned(x), [2, 1, 0])
            for x in (log2_sum, product_sum, query_sums)
        ]
        self._layouts()
        query, key, value, gradient, key_gradient, value_gradient = wide
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        tile = (TILE, HEAD_SIZE)
        staged = cute.select(self.wide, mode=[0, 1])
        loads = [
            cpasync.make_tiled_tma_atom(load, x, layout, tile)
            for x, layout in (
                (query, staged),
                (key, self.keys),
                (value, self.values),
                (gradient, staged),
            )
        ]
        stores = [
            cpasync.make_tiled_tma_atom(store, x, layout, tile)
            for x, layout in ((key_gradient, self.keys), (value_gradient, self.values))
        ]
        pairs = cute.ceil_div(cute.size(key.shape[0]), 2 * TILE)
        self.kernel(
            *[x for pair in loads for x in pair],
            *[x for pair in stores for x in pair],
            key,
            *sums,
            bounds,
            self.wide,
            self.keys,
            self.values,
            self.square,
            self.one_square,
            *self._products(),
            self._storage(),
        ).launch(
            grid=(2 * pairs, cute.size(key.shape[2]), cute.size(key.shape[3])),
            block=[_THREADS, 1, 1],
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
        key_atom: cute.CopyAtom,
        key: cute.Tensor,
        value_atom: cute.CopyAtom,
        value: cute.Tensor,
        gradient_atom: cute.CopyAtom,
        gradient: cute.Tensor,
        key_gradient_atom: cute.CopyAtom,
        key_gradient: cute.Tensor,
        value_gradient_atom: cute.CopyAtom,
        value_gradient: cute.Tensor,
        plain_key: cute.Tensor,
        log2_sum: cute.Tensor,
        product_sum: cute.Tensor,
        query_sums: cute.Tensor,
        bounds: cute.Tensor,
        wide: cute.ComposedLayout,
        keys: cute.ComposedLayout,
        values: cute.ComposedLayout,
        square: cute.ComposedLayout,
        one_square: cute.ComposedLayout,
        scores_mma: cute.TiledMma,
        keys_mma: cute.TiledMma,
        own_mma: cute.TiledMma,
        other_mma: cute.TiledMma,
        storage_type: cutlass.Constexpr,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (
                query_atom,
                key_atom,
                value_atom,
                gradient_atom,
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
        producer = cutlass.pipeline.CooperativeGroup(cutlass.pipeline.Agent.Thread)
        consumer = cutlass.pipeline.CooperativeGroup(cutlass.pipeline.Agent.Thread, _WARPS)
        queries, gradients = [
            pipeline.PipelineTmaAsync.create(
                barrier_storage=barriers.data_ptr(),
                num_stages=_STAGES,
                producer_group=producer,
                consumer_group=consumer,
                tx_count=_TILE_BYTES + TILE * 4,
                # A group of threads releases what its own block has loaded.
                cta_layout_vmnk=cute.make_layout((1, 2, 1, 1)),
                mcast_mode_mn=(1, 0),
                defer_sync=True,
            )
            for barriers in (storage.query_barriers, storage.gradient_barriers)
        ]
        cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

        s_query = storage.query.get_tensor(wide.outer, swizzle=wide.inner)
        s_gradient = storage.gradient.get_tensor(wide.outer, swizzle=wide.inner)
        s_key = storage.key.get_tensor(keys.outer, swizzle=keys.inner)
        s_value = storage.value.get_tensor(values.outer, swizzle=values.inner)
        s_weights = storage.weights.get_tensor(one_square.outer, swizzle=one_square.inner)
        s_slopes = storage.slopes.get_tensor(square.outer, swizzle=square.inner)
        s_others = storage.others.get_tensor(one_square.outer, swizzle=one_square.inner)
        numbers = cute.make_layout((TILE, _STAGES), stride=(1, TILE))
        s_log_sum = storage.log_sum.get_tensor(numbers)
        s_product_sum = storage.product_sum.get_tensor(numbers)

        n_block, key_head, row = cute.arch.block_idx()
        rank = n_block % 2
        length = cute.size(plain_key.shape[0])
        visible = _Visible(bounds, Int32(length), TILE, TILE)
        first = n_block - rank
        past = visible.last_query(row, (first + 2) * TILE - 1) // TILE + 1

        if warp < 4:
            cute.arch.setmaxregister_decrease(_LOADING_REGISTERS)
            if warp == 0:
                self._load(
                    (query_atom, query, s_query, log2_sum, s_log_sum, queries),
                    (gradient_atom, gradient, s_gradient, product_sum, s_product_sum, gradients),
                    (key_atom, key, s_key),
                    (value_atom, value, s_value),
                    (n_block, key_head, row),
                    (first, past),
                )
        else:
            cute.arch.setmaxregister_increase(_COMPUTING_REGISTERS)
            thread = cute.arch.thread_idx()[0] - 128
            self._multiply(
                scores_mma,
                keys_mma,
                own_mma,
                other_mma,
                s_query,
                s_gradient,
                s_key,
                s_value,
                s_weights,
                s_slopes,
                s_others,
                s_log_sum,
                s_product_sum,
                queries,
                gradients,
                exchange,
                plain_key,
                query_sums,
                key_gradient_atom,
                key_gradient,
                value_gradient_atom,
                value_gradient,
                visible,
                thread,
                n_block,
                key_head,
                row,
                rank,
                first,
                past,
            )
        # The other block may still write here, or arrive at a barrier.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def _load(self, of_query, of_gradient, of_key, of_value, where, span):
        n_block, key_head, row = where
        first, past = span
        state = pipeline.make_pipeline_state(cutlass.pipeline.PipelineUserType.Producer, _STAGES)

        def loader(given, block):
            atom, tensor, shared = given
            tile = cute.local_tile(
                tensor[None, None, key_head, row], (TILE, HEAD_SIZE), (block, 0)
            )
            return copy_utils.tma_get_copy_fn(
                atom, 0, cute.make_layout(1), tile, shared, single_stage=True
            )[0]

        load_key, load_value = loader(of_key, n_block), loader(of_value, n_block)
        lines = [given[-1] for given in (of_query, of_gradient)]
        for group in cutlass.range_constexpr(self.groups):
            head = key_head * self.groups + group
            copies = [_copies(given, head, row) for given in (of_query, of_gradient)]
            begin = first
            if const_expr(group == 0):
                lines[0].producer_acquire(state, extra_tx_count=_TILE_BYTES)
                load_key(tma_bar_ptr=lines[0].producer_get_barrier(state))
                copies[0][0](first, producer_state=state)
                # The sums come from the kernel before.
                cute.arch.griddepcontrol_wait()
                copies[0][1](first, producer_state=state)
                lines[1].producer_acquire(state, extra_tx_count=_TILE_BYTES)
                load_value(tma_bar_ptr=lines[1].producer_get_barrier(state))
                copies[1][0](first, producer_state=state)
                copies[1][1](first, producer_state=state)
                state.advance()
                begin = first + 1
            for m_block in cutlass.range(begin, past, unroll=1):
                lines[0].producer_acquire(state)
                copies[0][0](m_block, producer_state=state)
                copies[0][1](m_block, producer_state=state)
                lines[1].producer_acquire(state)
                copies[1][0](m_block, producer_state=state)
                copies[1][1](m_block, producer_state=state)
                state.advance()

    @cute.jit
    def _multiply(
        self,
        scores_mma: cute.TiledMma,
        keys_mma: cute.TiledMma,
        own_mma: cute.TiledMma,
        other_mma: cute.TiledMma,
        s_query: cute.Tensor,
        s_gradient: cute.Tensor,
        s_key: cute.Tensor,
        s_value: cute.Tensor,
        s_weights: cute.Tensor,
        s_slopes: cute.Tensor,
        s_others: cute.Tensor,
        s_log_sum: cute.Tensor,
        s_product_sum: cute.Tensor,
        queries,
        gradients,
        exchange: cute.Pointer,
        plain_key: cute.Tensor,
        query_sums: cute.Tensor,
        key_gradient_atom: cute.CopyAtom,
        key_gradient: cute.Tensor,
        value_gradient_atom: cute.CopyAtom,
        value_gradient: cute.Tensor,
        visible,
        thread: Int32,
        n_block: Int32,
        key_head: Int32,
        row: Int32,
        rank: Int32,
        first: Int32,
        past: Int32,
    ):
        group = cute.arch.make_warp_uniform(thread // 128)
        lead = group * 128
        thread_scores = scores_mma.get_slice(thread)
        group_scores = scores_mma.get_slice(lead)
        group_keys = keys_mma.get_slice(lead)
        group_own = own_mma.get_slice(lead)
        group_other = other_mma.get_slice(lead)
        square = (TILE, TILE)

        def transposed(x):
            return layout_utils.transpose_view(x)

        part = sm90_utils.partition_fragment_ABC
        _, a_query, b_key = part(group_scores, (TILE, TILE, HEAD_SIZE), s_query, s_key)
        scores_of = partial(gemm_zero_init, scores_mma, square, a_query, b_key)
        _, a_gradient, b_value = part(group_scores, (TILE, TILE, HEAD_SIZE), s_gradient, s_value)
        weights_gradient_of = partial(gemm_zero_init, scores_mma, square, a_gradient, b_value)
        shape = (TILE, HEAD_SIZE, TILE)
        sum_value, a_weights, b_gradient = part(
            group_keys, shape, transposed(s_weights), transposed(s_gradient)
        )
        add_value = partial(gemm_w_idx, keys_mma, sum_value, a_weights, b_gradient)
        sum_key, a_slopes, b_query = part(
            group_keys, shape, transposed(s_slopes), transposed(s_query)
        )
        add_key = partial(gemm_w_idx, keys_mma, sum_key, a_slopes, b_query)
        half = cute.local_tile(transposed(s_key), (_HALF, TILE), (rank, 0))
        shape = (_HALF, TILE, TILE)
        sum_query, a_own, b_slopes = part(group_own, shape, half, s_slopes)
        sum_query.fill(0.0)
        add_own = partial(gemm_w_idx, own_mma, sum_query, a_own, b_slopes)
        _, a_other, b_others = part(group_other, shape, None, s_others)
        add_other = partial(gemm_w_idx, other_mma, sum_query, a_other, b_others)
        self._read_others_keys(a_other, other_mma, plain_key[None, None, key_head, row],
                               n_block, rank, thread)

        store = partial(
            copy_utils.get_smem_store_C,
            scores_mma,
            tidx=thread,
            position_independent=True,
            major_mode_size=TILE // 2,
        )
        write_weights, _, _ = store(s_weights)
        write_slopes, _, _ = store(s_slopes)
        numbers = partial(
            layout_utils.mma_partition_C_vec,
            thr_mma=thread_scores,
            expand_shape=TILE,
            is_colvec=True,
        )
        own_log_sum, own_product_sum = numbers(s_log_sum), numbers(s_product_sum)

        both = {"number_of_threads": _COMPUTING}
        # Nothing is being read yet.
        cute.arch.barrier_arrive(barrier_id=_READ + 1 - group, **both)
        is_sender = cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4
        other = 1 - rank
        target = query_sums[None, None, row].iterator
        stride = cute.size(query_sums.shape[0])
        own_offset = group * (TILE * _HALF) + rank * (TILE * _HALF // 2) + (thread % 128) * 4
        last_offset = key_head * self.groups * stride + first * (TILE * HEAD_SIZE)
        state = pipeline.make_pipeline_state(cutlass.pipeline.PipelineUserType.Consumer, _STAGES)
        last = state.clone()
        step = Int32(0)
        is_added = Boolean(False)

        for of_group in cutlass.range(self.groups, unroll=1):
            head_offset = (key_head * self.groups + of_group) * stride
            for m_block in cutlass.range(first, past, unroll=1):
                stage = state.index
                queries.consumer_wait(state, queries.consumer_try_wait(state))
                scores = scores_of(A_idx=stage, wg_wait=-1)
                if const_expr(self.defer):
                    warpgroup.wait_group(1)
                    if step > 0:
                        self._release(queries, gradients, last, exchange, group, other)
                is_edge = visible.has_edge_of_key(row, m_block, n_block)
                log_sum = copy_utils.load_s2r(own_log_sum[None, stage])
                gradients.consumer_wait(state, gradients.consumer_try_wait(state))
                weights_gradient = weights_gradient_of(A_idx=stage, wg_wait=-1)
                if const_expr(self.defer):
                    # Zeros, the first time.
                    self._add(sum_query, target + (last_offset + own_offset))
                warpgroup.wait_group(1)

                ratio = cute.math.tanh(scores.load() * (1.0 / self.cap), fastmath=True)
                slope = cute.make_fragment_like(scores)
                slope.store(1.0 - ratio * ratio)
                scores.store(ratio)
                if is_edge:
                    visible.mask(scores, row, m_block, n_block, thread_scores, False)
                rows = layout_utils.reshape_acc_to_mn(scores)
                for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
                    for c in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                        rows[r, c] = cute.math.exp2(
                            rows[r, c] * (self.cap * _LOG2_E) - log_sum[r], fastmath=True
                        )
                products = copy_utils.load_s2r(own_product_sum[None, stage])
                weights = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(scores), _DTYPE)
                # The other group's product of the last tile has read what is overwritten.
                cute.arch.barrier(barrier_id=_READ + group, **both)
                write_weights(weights, dst_idx=0)
                scores.store(scores.load() * slope.load())

                warpgroup.wait_group(0)
                gradient_rows = layout_utils.reshape_acc_to_mn(weights_gradient)
                for r in cutlass.range_constexpr(cute.size(gradient_rows, mode=[0])):
                    for c in cutlass.range_constexpr(cute.size(gradient_rows, mode=[1])):
                        gradient_rows[r, c] = rows[r, c] * (gradient_rows[r, c] - products[r])
                slopes = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(weights_gradient), _DTYPE)
                write_slopes(slopes, dst_idx=stage)
                cute.arch.fence_view_async_shared()
                cute.arch.barrier(barrier_id=_WRITTEN, **both)

                if is_sender:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(exchange, _SLOPE_BYTES)
                        # The other block has read what it got before.
                        cute.arch.mbarrier_wait(exchange + 1, (step & 1) ^ 1)
                        cluster_copies.cpasync_bulk_s2cluster(
                            s_slopes[None, None, stage].iterator,
                            s_others.iterator,
                            exchange,
                            _SLOPE_BYTES,
                            other,
                        )
                add_value(A_idx=0, B_idx=stage, zero_init=not is_added, wg_wait=-1)
                add_key(A_idx=stage, B_idx=stage, zero_init=not is_added, wg_wait=-1)
                add_own(B_idx=stage, zero_init=True, wg_wait=-1)
                cute.arch.mbarrier_wait(exchange, step & 1)
                add_other(B_idx=0, zero_init=False, wg_wait=-1)
                last_offset = head_offset + m_block * (TILE * HEAD_SIZE)
                if const_expr(not self.defer):
                    warpgroup.wait_group(0)
                    self._release(queries, gradients, state, exchange, group, other)
                    self._add(sum_query, target + (last_offset + own_offset))
                last = state.clone()
                state.advance()
                step += 1
                is_added = Boolean(True)
        if const_expr(self.defer):
            warpgroup.wait_group(0)
            self._release(queries, gradients, last, exchange, group, other)
            self._add(sum_query, target + (last_offset + own_offset))
        self._write(
            keys_mma,
            ((sum_value, s_value, value_gradient_atom, value_gradient),
             (sum_key, s_key, key_gradient_atom, key_gradient)),
            (n_block, key_head, row),
            thread,
        )

    @cute.jit
    def _read_others_keys(self, fragment, mma, key, n_block, rank, thread):
        """The half of the columns that is this block's, of the other block's keys."""
        other_block = n_block + 1 - 2 * rank
        tile = cute.local_tile(key, (TILE, _HALF), (other_block, rank))
        own = mma.get_slice(thread)
        given = own.partition_A(layout_utils.transpose_view(tile))
        at = own.partition_A(cute.make_identity_tensor((_HALF, TILE)))
        count = cute.size(key.shape[0]) - other_block * TILE
        flat = cute.make_tensor(fragment.iterator, cute.make_layout(cute.size(fragment)))
        for i in cutlass.range_constexpr(cute.size(fragment)):
            flat[i] = _DTYPE(0.0)
            if at[i][1] < count:
                flat[i] = given[i]

    @cute.jit
    def _release(self, queries, gradients, state, exchange, group, other):
        """What the products of a step have read may be overwritten."""
        gradients.consumer_release(state)
        queries.consumer_release(state)
        cute.arch.barrier_arrive(barrier_id=_READ + 1 - group, number_of_threads=_COMPUTING)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(exchange + 1, other)

    @cute.jit
    def _add(self, values, pointer):
        flat = cute.make_tensor(values.iterator, cute.make_layout((4, cute.size(values) // 4)))
        for i in cutlass.range_constexpr(cute.size(flat, mode=[1])):
            _add_to_memory(pointer + i * (128 * 4), flat[None, i])

    @cute.jit
    def _write(self, mma, results, where, thread):
        """Through the shared memory of what each is the gradient of."""
        n_block, key_head, row = where
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        both = {"barrier_id": _DONE, "number_of_threads": _COMPUTING}
        for values, shared, atom, tensor in results:
            tile = cute.local_tile(
                tensor[None, None, key_head, row], (TILE, HEAD_SIZE), (n_block, 0)
            )
            store, _, _ = copy_utils.tma_get_copy_fn(
                atom, 0, cute.make_layout(1), shared, tile, single_stage=True
            )
            write, _, _ = copy_utils.get_smem_store_C(
                mma, shared, thread, position_independent=True
            )
            cute.arch.barrier(**both)
            write(values, dst_idx=None)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(**both)
            if warp == 4:
                store()
                cute.arch.cp_async_bulk_commit_group()
        if warp == 4:
            cute.arch.cp_async_bulk_wait_group(0, read=True)


@cache
def backward(groups: int, cap: float, defer: bool = True) -> PairedBackward:
    return PairedBackward(groups, cap, defer)


@cache
def convert() -> FlashAttentionBackwardPostprocess:
    """The sums of the queries' gradients, in the order of their transposed products, to bfloat16."""
    return FlashAttentionBackwardPostprocess(
        _DTYPE, HEAD_SIZE, 90, TILE, _COMPUTING, 1, dQ_swapAB=True
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
