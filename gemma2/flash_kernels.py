"""Attention for Hopper: FlashAttention-4's kernels, a soft-cap in place of the running maximum.

The kernels are CuTe programs of the package fa4-jax. What is changed here: a soft-cap c bounds
every score, so that e^score and sums of them fit float32 (and e^score bfloat16) without the row's
maximum: no maximum, no rescaling, and tanh and exp are one pass over the registers. In the
backward, gradients of queries are added to memory from registers, which frees the shared memory
that a second stage of everything else needs. What a query sees is given by two arrays of bounds,
for windows and packed documents alike: tiles that no query of theirs sees are never loaded, and
only those at an edge are masked. The replaced methods keep the order of work of the originals
(FlashAttention-4, Dao-AILab, BSD-3-Clause, as fa4-jax 0.1.0 has it), which the rest of a kernel
expects. Imported only where the kernels run: the packages are those of the `gpu` extra.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import warpgroup
from fa4_jax.cute import utils
from fa4_jax.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess
from fa4_jax.cute.flash_bwd_preprocess import FlashAttentionBackwardPreprocess
from fa4_jax.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from fa4_jax.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from fa4_jax.cute.quack import copy_utils, layout_utils

_LOG2_E = math.log2(math.e)
_DTYPE = cutlass.BFloat16
_THREADS = 384  # a warp group that loads and two that multiply


class Tiles(NamedTuple):
    """What a backward kernel was found fastest with; the names are fa4-jax's."""

    queries: int
    keys: int
    swap_scores: bool
    key_groups: int


# By head size. Larger tiles of keys spill registers or leave no room for two stages of everything.
BACKWARD_TILES = {256: Tiles(64, 64, False, 1), 128: Tiles(64, 128, True, 2)}
_STAGES = 2
_FORWARD_KEYS = {256: 64, 128: 128}
_FORWARD_QUERIES = 128


@dataclass(frozen=True)
class _Visible:
    """Which keys a query sees, for loops over tiles and for masks; in place of fa4-jax's BlockInfo.

    bounds int32 [B, 1 + 2T]: of a row its length T, each query's first key, and each key's last
    query, none of which falls as the position grows. A query's last key is its own.
    """

    bounds: cute.Tensor
    length: Int32
    queries: cutlass.Constexpr[int]
    keys: cutlass.Constexpr[int]
    window_size_left: cutlass.Constexpr[None] = None  # the bounds know

    def first_key(self, row: Int32, query: Int32) -> Int32:
        return self.bounds[(row, 1 + cutlass.min(query, self.length - 1))]

    def last_query(self, row: Int32, key: Int32) -> Int32:
        return self.bounds[(row, 1 + self.length + cutlass.min(key, self.length - 1))]

    def get_n_block_min_max(self, seqlen: Any, m_block: Int32) -> tuple[Int32, Int32]:
        """Tiles of keys that one of queries sees: the first, and past the last."""
        past = cutlass.min((m_block + 1) * self.queries, self.length)
        first = self.first_key(_row(seqlen), m_block * self.queries)
        return first // self.keys, cute.ceil_div(past, self.keys)

    def get_n_block_min_causal_local_mask(self, _seqlen: Any, _m: Int32, first: Int32) -> Int32:
        return first

    def get_n_block_min_before_local_mask(self, _seqlen: Any, _m: Int32, first: Int32) -> Int32:
        return first

    def get_m_block_min_max(self, seqlen: Any, n_block: Int32) -> tuple[Int32, Int32]:
        """Tiles of queries that see one of keys: the first, and past the last."""
        last = self.last_query(_row(seqlen), (n_block + 1) * self.keys - 1)
        return (n_block * self.keys) // self.queries, last // self.queries + 1

    def has_edge(self, row: Int32, m_block: Int32, n_block: Int32) -> cutlass.Boolean:
        """Whether some query of a tile does not see some key of another; for a loop over keys."""
        query, key = m_block * self.queries, n_block * self.keys
        is_future = key + (self.keys - 1) > query
        return is_future | (key < self.first_key(row, query + (self.queries - 1)))

    def has_edge_of_key(self, row: Int32, m_block: Int32, n_block: Int32) -> cutlass.Boolean:
        """The same for a loop over queries: what is read is the same in all of it."""
        query, key = m_block * self.queries, n_block * self.keys
        is_future = key + (self.keys - 1) > query
        return is_future | (query + (self.queries - 1) > self.last_query(row, key))

    @cute.jit
    def mask(self, scores, row, m_block, n_block, thread, is_swapped: cutlass.Constexpr):
        """Scores of keys that their query does not see become -inf.

        is_swapped: the rows of the product are keys.
        """
        shape = (self.queries, self.keys)
        at = cute.make_identity_tensor(shape[::-1] if is_swapped else shape)
        scores = layout_utils.reshape_acc_to_mn(scores, transpose=is_swapped)
        own = layout_utils.reshape_acc_to_mn(thread.partition_C(at), transpose=is_swapped)
        # Of thread 0, whose places are known when this is compiled.
        known = layout_utils.reshape_acc_to_mn(
            thread.get_slice(0).partition_C(at), transpose=is_swapped
        )
        query, key, shift = m_block * self.queries, n_block * self.keys, own[0, 0][1]
        if const_expr(not is_swapped):
            for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
                own_query = query + own[r, 0][0]
                first = self.first_key(row, own_query) - key - shift
                last = own_query - key - shift
                for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                    place = known[0, c][1]
                    is_hidden = (place < first) | (place > last)
                    scores[r, c] = -Float32.inf if is_hidden else scores[r, c]
        else:
            for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                own_key = key + own[0, c][0]
                first = own_key - query - shift
                last = self.last_query(row, own_key) - query - shift
                for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
                    place = known[r, 0][1]
                    is_hidden = (place < first) | (place > last)
                    scores[r, c] = -Float32.inf if is_hidden else scores[r, c]


def _row(seqlen: Any) -> Int32:
    """The row of the batch that a kernel is at: in a field that serves nothing else here."""
    return seqlen.m_block_offset


class _Bounded:
    """Gives a kernel of fa4-jax the bounds in place of its own rules.

    They come in the argument for used lengths, of which only a row's first number is one.
    """

    _lengths: str
    """The keyword under which the kernel has them."""
    tile_m: int
    tile_n: int

    def _with_bounds(self, method: Callable[..., Any], args: Any, options: Any) -> Any:
        bound = inspect.signature(method).bind(self, *args, **options)
        seqlens = bound.arguments["SeqlenInfoCls"]
        self._visible = _Visible(
            seqlens.keywords[self._lengths],
            seqlens.keywords["seqlen_k_static"],
            self.tile_m,
            self.tile_n,
        )

        def of_row(row: Int32) -> Any:
            return replace(seqlens(row), m_block_offset=row)

        bound.arguments.update(block_info=self._visible, SeqlenInfoCls=of_row)
        self._given = bound.arguments
        return method(*bound.args, **bound.kwargs)


class CappedForward(_Bounded, FlashAttentionForwardSm90):
    """Scores become e^(c·tanh(score / c)) as they are; rows are divided by their sum at the end."""

    _lengths = "mSeqUsedK"

    def __init__(self, *args: Any, cap: float, **options: Any):
        super().__init__(*args, **options)
        self.cap = cap

    def load(self, *args: Any, **options: Any) -> Any:
        return self._with_bounds(FlashAttentionForwardSm90.load, args, options)

    def mma(self, *args: Any, **options: Any) -> Any:
        return self._with_bounds(FlashAttentionForwardSm90.mma, args, options)

    @cute.jit
    def _weights(
        self,
        acc_S,
        softmax,
        where: cutlass.Constexpr,
        n_block,
        is_edge,
        is_first: cutlass.Constexpr,
    ):
        acc_S.store(cute.math.tanh(acc_S.load() * (1.0 / self.cap), fastmath=True))
        # After tanh, which would make -inf finite.
        if is_edge:
            self._visible.mask(
                acc_S, where["batch_idx"], where["m_block"], n_block, where["thr_mma"], False
            )
        rows = layout_utils.reshape_acc_to_mn(acc_S)
        for r in cutlass.range_constexpr(cute.size(softmax.row_sum)):
            weights = cute.math.exp2(rows[r, None].load() * (self.cap * _LOG2_E), fastmath=True)
            rows[r, None].store(weights)
            if const_expr(is_first):
                softmax.row_max[r] = Float32(0.0)
                softmax.row_sum[r] = utils.fadd_reduce(weights, init_val=None)
            else:
                softmax.row_sum[r] = utils.fadd_reduce(weights, init_val=softmax.row_sum[r])

    @cute.jit
    def first_half_block_overlap(
        self,
        n_block,
        mma_qk_fn,
        kv_consumer_state,
        pipeline_k,
        tOrP,
        smem_copy_params,
        softmax,
        seqlen,
        scores_scale=None,
        acc_O=None,
        mask_fn=None,
        score_mod_fn=None,
        is_first_block=False,
    ):
        where = mask_fn.keywords
        is_edge = self._visible.has_edge(where["batch_idx"], where["m_block"], n_block)
        pipeline_k.consumer_wait(kv_consumer_state, pipeline_k.consumer_try_wait(kv_consumer_state))
        acc_S = mma_qk_fn(B_idx=kv_consumer_state.index, wg_wait=0)
        pipeline_k.consumer_release(kv_consumer_state)
        self._weights(acc_S, softmax, where, n_block, is_edge, True)
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_S), tOrP)
        return kv_consumer_state

    @cute.jit
    def last_half_block_overlap(
        self,
        kv_consumer_state,
        pipeline_v,
        mma_pv_fn,
        zero_init,
        scores_scale=None,
        softmax=None,
        acc_O=None,
    ):
        pipeline_v.consumer_wait(kv_consumer_state, pipeline_v.consumer_try_wait(kv_consumer_state))
        mma_pv_fn(B_idx=kv_consumer_state.index, zero_init=zero_init, wg_wait=0)
        pipeline_v.consumer_release(kv_consumer_state)
        kv_consumer_state.advance()
        return kv_consumer_state

    @cute.jit
    def mma_one_n_block_intrawg_overlap(
        self,
        smem_pipe_read,
        n_block,
        mma_qk_fn,
        mma_pv_fn,
        pipeline_k,
        pipeline_v,
        acc_O,
        tOrP,
        smem_copy_params,
        softmax,
        seqlen,
        scores_scale=None,
        score_mod_fn=None,
        mask_fn=None,
        check_inf=True,
    ):
        where = mask_fn.keywords
        smem_pipe_read_v = smem_pipe_read.clone()
        smem_pipe_read.advance()
        pipeline_k.consumer_wait(smem_pipe_read, pipeline_k.consumer_try_wait(smem_pipe_read))
        self.warp_scheduler_barrier_sync()
        acc_S = mma_qk_fn(B_idx=smem_pipe_read.index, wg_wait=-1)
        is_edge = self._visible.has_edge(where["batch_idx"], where["m_block"], n_block)
        pipeline_v.consumer_wait(smem_pipe_read_v, pipeline_v.consumer_try_wait(smem_pipe_read_v))
        mma_pv_fn(B_idx=smem_pipe_read_v.index, wg_wait=-1)
        self.warp_scheduler_barrier_arrive()
        warpgroup.wait_group(1)
        pipeline_k.consumer_release(smem_pipe_read)
        self._weights(acc_S, softmax, where, n_block, is_edge, False)
        warpgroup.wait_group(0)
        pipeline_v.consumer_release(smem_pipe_read_v)
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_S), tOrP)
        return smem_pipe_read


@cute.jit
def _add_to_memory(pointer, values):
    """Four neighbouring float32 in global memory += values, as one instruction."""
    llvm.inline_asm(
        None,
        [
            pointer.toint().ir_value(),
            *[Float32(values[i]).ir_value() for i in range(4)],
        ],
        "red.global.add.v4.f32 [$0], {$1, $2, $3, $4};",
        "l,f,f,f,f",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


class CappedBackward(_Bounded, FlashAttentionBackwardSm90):
    """With t = tanh(score / c): P = e^(c·t - lse), dS = P (dP - rowsum(P dP)) (1 - t²)."""

    _lengths = "mSeqUsedQ"

    def __init__(self, *args: Any, cap: float, **options: Any):
        super().__init__(*args, **options)
        self.cap = cap

    def _setup_attributes(self) -> None:
        super()._setup_attributes()
        # Nothing is staged in shared memory: of this layout one element is allocated.
        self.sdQaccum_layout = cute.make_layout(self._query_gradient_shape(), stride=(0, 0))

    def _query_gradient_shape(self) -> tuple[int, int]:
        return self.tile_m * self.tile_hdim // self.num_wg_dQ, self.num_wg_dQ

    @cute.jit
    def dQaccum_store(
        self,
        mdQaccum,
        sdQaccum,
        block_info,
        TileSchedulerCls,
        SeqlenInfoCls,
        blocksparse_tensors=None,
        mdQ_semaphore=None,
    ):
        pass

    def load(self, *args: Any, **options: Any) -> Any:
        return self._with_bounds(FlashAttentionBackwardSm90.load, args, options)

    def mma(self, *args: Any, **options: Any) -> Any:
        return self._with_bounds(FlashAttentionBackwardSm90.mma, args, options)

    @cute.jit
    def mma_one_m_block(
        self,
        m_block,
        consumer_state_Q,
        consumer_state_dO,
        warp_group_idx,
        mma_qk_fn,
        mma_dov_fn,
        mma_pdo_fn,
        mma_dsq_fn,
        mma_dsk_fn,
        copy_P_r2s,
        copy_dS_r2s,
        pipeline_Q,
        pipeline_dO,
        tLSEsLSE,
        tLSEsdPsum,
        tdQsdQaccum,
        softmax_scale_log2,
        PdS_barrier,
        is_dQ_wg=True,
        mask_fn=None,
        score_mod_fn=None,
        score_mod_bwd_fn=None,
        dKV_accumulate=True,
    ):
        where = mask_fn.keywords
        stage = consumer_state_Q.index
        pipeline_Q.consumer_wait(consumer_state_Q, pipeline_Q.consumer_try_wait(consumer_state_Q))
        acc_S = mma_qk_fn(A_idx=stage, wg_wait=-1)
        is_edge = self._visible.has_edge_of_key(where["batch_idx"], m_block, where["n_block"])
        log_sum = copy_utils.load_s2r(tLSEsLSE[None, stage])
        pipeline_dO.consumer_wait(consumer_state_Q, pipeline_dO.consumer_try_wait(consumer_state_Q))
        acc_dP = mma_dov_fn(A_idx=stage, wg_wait=1)

        ratio = cute.math.tanh(acc_S.load() * (1.0 / self.cap), fastmath=True)
        slope = cute.make_fragment_like(acc_S)
        # Before the mask, whose -inf would give 0 · inf.
        slope.store(1.0 - ratio * ratio)
        acc_S.store(ratio)
        if is_edge:
            self._visible.mask(
                acc_S,
                where["batch_idx"],
                m_block,
                where["n_block"],
                where["thr_mma"],
                self.SdP_swapAB,
            )
        rows = layout_utils.reshape_acc_to_mn(acc_S, transpose=self.SdP_swapAB)
        lane = cute.arch.lane_idx()
        for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
            row_log_sum = self._get_stat(log_sum, r, lane, shuffle=self.shuffle_LSE)
            for c in cutlass.range(cute.size(rows, mode=[1]), unroll_full=True):
                rows[r, c] = cute.math.exp2(
                    rows[r, c] * (self.cap * _LOG2_E) - row_log_sum, fastmath=True
                )
        product_sum = copy_utils.load_s2r(tLSEsdPsum[None, stage])
        weights = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_S), self.dtype)
        if const_expr(not self.mma_dkv_is_rs):
            copy_P_r2s(weights, dst_idx=stage)
        acc_S.store(acc_S.load() * slope.load())

        warpgroup.wait_group(0)
        gradient_rows = layout_utils.reshape_acc_to_mn(acc_dP, transpose=self.SdP_swapAB)
        for r in cutlass.range_constexpr(cute.size(gradient_rows, mode=[0])):
            row_product_sum = self._get_stat(product_sum, r, lane, shuffle=self.shuffle_dPsum)
            for c in cutlass.range(cute.size(gradient_rows, mode=[1]), unroll_full=True):
                gradient_rows[r, c] = rows[r, c] * (gradient_rows[r, c] - row_product_sum)
        gradients = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_dP), self.dtype)
        copy_dS_r2s(gradients, dst_idx=stage)
        # One barrier for both: what the last block but one read here has been read, as every group
        # waits for its products before it comes to the next barrier.
        cute.arch.fence_view_async_shared()
        PdS_barrier.arrive_and_wait()

        # That of the queries comes first: it is added to memory while the others are computed.
        acc_dQ = mma_dsk_fn(A_idx=stage, wg_wait=-1)
        if const_expr(not self.mma_dkv_is_rs):
            mma_pdo_fn(A_idx=stage, B_idx=stage, zero_init=not dKV_accumulate, wg_wait=-1)
            mma_dsq_fn(A_idx=stage, B_idx=stage, zero_init=not dKV_accumulate, wg_wait=2)
        else:
            mma_pdo_fn(tCrA=weights, B_idx=stage, zero_init=not dKV_accumulate, wg_wait=-1)
            mma_dsq_fn(tCrA=gradients, B_idx=stage, zero_init=not dKV_accumulate, wg_wait=2)
        self._add_query_gradient(acc_dQ, m_block, where)
        warpgroup.wait_group(1)
        pipeline_dO.consumer_release(consumer_state_Q)
        warpgroup.wait_group(0)
        pipeline_Q.consumer_release(consumer_state_Q)
        consumer_state_Q.advance()
        consumer_state_dO.advance()
        return consumer_state_Q, consumer_state_dO

    @cute.jit
    def _add_query_gradient(self, acc_dQ, m_block, where: cutlass.Constexpr):
        """Where the parent's staging would put them, which the conversion afterwards expects."""
        tile = cute.domain_offset(
            (m_block * (self.tile_m * self.tile_hdim),),
            self._given["mdQaccum"][None, where["head_idx"], where["batch_idx"]],
        )
        whole = cute.make_tensor(
            tile.iterator.align(16), cute.make_layout(self._query_gradient_shape())
        )
        copy = self._given["r2s_tiled_copy_dQaccum"].get_slice(self._given["tidx"])
        target = copy.partition_D(whole)
        source = cute.make_tensor(acc_dQ.iterator, cute.make_layout(target.shape))
        target = cute.group_modes(target, 1, cute.rank(target))
        source = cute.group_modes(source, 1, cute.rank(source))
        for i in cutlass.range_constexpr(cute.size(source, mode=[1])):
            _add_to_memory(target[None, i].iterator, source[None, i])


@cache
def forward(head_size: int, groups: int, cap: float) -> CappedForward:
    """For heads of a size, `groups` of which share a key's."""
    return CappedForward(
        _DTYPE,
        head_size,
        head_size,
        groups,
        cap=cap,
        is_causal=True,
        is_local=False,
        pack_gqa=False,
        tile_m=_FORWARD_QUERIES,
        tile_n=_FORWARD_KEYS[head_size],
        num_stages=_STAGES,
        num_threads=_THREADS,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=True,
        has_aux_tensors=False,
    )


@cache
def backward(head_size: int, groups: int, cap: float) -> CappedBackward:
    """As `forward`; into float32, which `convert` rounds."""
    tiles = BACKWARD_TILES[head_size]
    return CappedBackward(
        _DTYPE,
        head_size,
        head_size,
        groups,
        cap=cap,
        is_causal=True,
        is_local=False,
        deterministic=False,
        tile_m=tiles.queries,
        tile_n=tiles.keys,
        Q_stage=_STAGES,
        dO_stage=_STAGES,
        PdS_stage=_STAGES,
        SdP_swapAB=tiles.swap_scores,
        dKV_swapAB=False,
        dQ_swapAB=False,
        AtomLayoutMSdP=1,
        AtomLayoutNdKV=tiles.key_groups,
        AtomLayoutMdQ=1,
        num_threads=_THREADS,
        V_in_regs=False,
        has_aux_tensors=False,
    )


@cache
def prepare(head_size: int) -> FlashAttentionBackwardPreprocess:
    """Row sums of gradient · output, and zeros for the queries' gradients."""
    return FlashAttentionBackwardPreprocess(
        _DTYPE, head_size, head_size, BACKWARD_TILES[head_size].queries
    )


def convert(head_size: int, of_keys: bool) -> FlashAttentionBackwardPostprocess:
    """float32 sums in the backward's order to bfloat16 in the arrays'."""
    tiles = BACKWARD_TILES[head_size]
    if of_keys:
        return _convert(head_size, tiles.keys, tiles.key_groups)
    return _convert(head_size, tiles.queries, 1)


@cache
def _convert(head_size: int, tile: int, groups: int) -> FlashAttentionBackwardPostprocess:
    return FlashAttentionBackwardPostprocess(
        _DTYPE, head_size, 90, tile, _THREADS - 128, groups, False
    )


@cute.jit
def run_forward(stream, query, key, value, bounds, out, log_sum, kernel: cutlass.Constexpr):
    kernel(query, key, value, out, log_sum, Float32(1.0), mSeqUsedK=bounds, stream=stream)


@cute.jit
def run_prepare(
    stream, out, gradient, log_sum, product_sum, log2_sum, zeros, kernel: cutlass.Constexpr
):
    unused = [None] * 5
    kernel(
        out, gradient, product_sum, log_sum, log2_sum, zeros, *unused, Float32(1.0), stream=stream
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
    _key_zeros,
    _value_zeros,
    bounds,
    query_sums,
    key_sums,
    value_sums,
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
        key_sums,
        value_sums,
        Float32(1.0),
        mSeqUsedQ=bounds,
        stream=stream,
    )


@cute.jit
def run_convert(stream, sums, out, kernel: cutlass.Constexpr):
    kernel(sums, out, Float32(1.0), None, None, None, stream=stream)
