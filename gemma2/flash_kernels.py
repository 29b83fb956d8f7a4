"""Attention for Hopper: FlashAttention-4's kernels, a soft-cap in place of the running maximum.

The kernels are CuTe programs of the package fa4-jax. What is changed here: a soft-cap c bounds
every score, so that e^score and sums of them fit float32 (and e^score bfloat16) without the row's
maximum: no maximum, no rescaling, and tanh and exp are one pass over the registers. In the
backward, gradients of queries are added to memory from registers, which frees the shared memory
that a second stage of everything else needs. Imported only where the kernels run: the packages are
those of the `gpu` extra.
"""

import inspect
import math
from functools import cache
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, const_expr, cute
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
    stages: int
    score_stages: int
    swap_scores: bool
    key_groups: int


# By head size. Larger tiles of keys spill registers or leave no room for two stages.
BACKWARD_TILES = {256: Tiles(64, 64, 2, 1, False, 1), 128: Tiles(64, 128, 2, 2, True, 2)}
QUERY_TILE = 128


def _key_tile(head_size: int, window: int | None) -> int:
    """Keys of a forward tile."""
    if head_size <= 128:
        return 128
    return 80 if window is None else 64


class CappedForward(FlashAttentionForwardSm90):
    """Scores become e^(c·tanh(score / c)) as they are; rows are divided by their sum at the end."""

    def __init__(self, *args: Any, cap: float, **options: Any):
        super().__init__(*args, **options)
        self.cap = cap

    @cute.jit
    def _weights(
        self,
        acc_S,
        softmax,
        mask_fn,
        n_block,
        is_first: cutlass.Constexpr,
    ):
        acc_S.store(cute.math.tanh(acc_S.load() * (1.0 / self.cap), fastmath=True))
        # After tanh, which would make -inf finite.
        if const_expr(is_first):
            mask_fn(acc_S, n_block=n_block, mask_seqlen=True)
        else:
            mask_fn(acc_S, n_block=n_block)
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
        pipeline_k.consumer_wait(kv_consumer_state, pipeline_k.consumer_try_wait(kv_consumer_state))
        acc_S = mma_qk_fn(B_idx=kv_consumer_state.index, wg_wait=0)
        pipeline_k.consumer_release(kv_consumer_state)
        self._weights(acc_S, softmax, mask_fn, n_block, True)
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
        smem_pipe_read_v = smem_pipe_read.clone()
        smem_pipe_read.advance()
        pipeline_k.consumer_wait(smem_pipe_read, pipeline_k.consumer_try_wait(smem_pipe_read))
        self.warp_scheduler_barrier_sync()
        acc_S = mma_qk_fn(B_idx=smem_pipe_read.index, wg_wait=-1)
        pipeline_v.consumer_wait(smem_pipe_read_v, pipeline_v.consumer_try_wait(smem_pipe_read_v))
        mma_pv_fn(B_idx=smem_pipe_read_v.index, wg_wait=-1)
        self.warp_scheduler_barrier_arrive()
        warpgroup.wait_group(1)
        pipeline_k.consumer_release(smem_pipe_read)
        self._weights(acc_S, softmax, mask_fn, n_block, False)
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


class CappedBackward(FlashAttentionBackwardSm90):
    """With t = tanh(score / c): P = e^(c·t - lse), dS = P (dP - rowsum(P dP)) (1 - t²)."""

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

    def mma(self, *args: Any, **options: Any) -> Any:
        """As the parent's; what only it is given is kept for `mma_one_m_block`."""
        parent = FlashAttentionBackwardSm90.mma
        given = inspect.signature(parent).bind(self, *args, **options).arguments
        self._query_gradient = given["mdQaccum"]
        self._copy = given["r2s_tiled_copy_dQaccum"].get_slice(given["tidx"])
        return parent(self, *args, **options)

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
        stage = consumer_state_Q.index
        score_stage = stage if const_expr(self.PdS_stage > 1) else 0
        pipeline_Q.consumer_wait(consumer_state_Q, pipeline_Q.consumer_try_wait(consumer_state_Q))
        acc_S = mma_qk_fn(A_idx=stage, wg_wait=-1)
        log_sum = copy_utils.load_s2r(tLSEsLSE[None, stage])
        pipeline_dO.consumer_wait(consumer_state_Q, pipeline_dO.consumer_try_wait(consumer_state_Q))
        acc_dP = mma_dov_fn(A_idx=stage, wg_wait=1)

        ratio = cute.math.tanh(acc_S.load() * (1.0 / self.cap), fastmath=True)
        slope = cute.make_fragment_like(acc_S)
        # Before the mask, whose -inf would give 0 · inf.
        slope.store(1.0 - ratio * ratio)
        acc_S.store(ratio)
        mask_fn(acc_S, m_block=m_block)
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
            if const_expr(self.PdS_stage == 1):
                PdS_barrier.arrive_and_wait()  # until the last block's have been read
            copy_P_r2s(weights, dst_idx=score_stage)
        acc_S.store(acc_S.load() * slope.load())

        warpgroup.wait_group(0)
        gradient_rows = layout_utils.reshape_acc_to_mn(acc_dP, transpose=self.SdP_swapAB)
        for r in cutlass.range_constexpr(cute.size(gradient_rows, mode=[0])):
            row_product_sum = self._get_stat(product_sum, r, lane, shuffle=self.shuffle_dPsum)
            for c in cutlass.range(cute.size(gradient_rows, mode=[1]), unroll_full=True):
                gradient_rows[r, c] = rows[r, c] * (gradient_rows[r, c] - row_product_sum)
        gradients = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_dP), self.dtype)
        if const_expr(not self.mma_dkv_is_rs or self.PdS_stage == 1):
            cute.arch.fence_view_async_shared()
            PdS_barrier.arrive_and_wait()
        copy_dS_r2s(gradients, dst_idx=score_stage)
        if const_expr(not self.mma_dkv_is_rs):
            mma_pdo_fn(A_idx=score_stage, B_idx=stage, zero_init=not dKV_accumulate, wg_wait=-1)
        else:
            mma_pdo_fn(tCrA=weights, B_idx=stage, zero_init=not dKV_accumulate, wg_wait=-1)
        cute.arch.fence_view_async_shared()
        PdS_barrier.arrive_and_wait()

        acc_dQ = mma_dsk_fn(A_idx=score_stage, wg_wait=1)
        pipeline_dO.consumer_release(consumer_state_Q)
        if const_expr(not self.mma_dkv_is_rs):
            mma_dsq_fn(A_idx=score_stage, B_idx=stage, zero_init=not dKV_accumulate, wg_wait=1)
        else:
            mma_dsq_fn(tCrA=gradients, B_idx=stage, zero_init=not dKV_accumulate, wg_wait=1)
        self._add_query_gradient(acc_dQ, m_block, score_mod_fn.keywords)
        warpgroup.wait_group(0)
        pipeline_Q.consumer_release(consumer_state_Q)
        consumer_state_Q.advance()
        consumer_state_dO.advance()
        return consumer_state_Q, consumer_state_dO

    @cute.jit
    def _add_query_gradient(self, acc_dQ, m_block, where: cutlass.Constexpr):
        """Where the parent's staging would put them, which the conversion afterwards expects."""
        first = where["seqlen_info"].padded_offset_q + m_block * self.tile_m
        tile = cute.domain_offset(
            (first * self.tile_hdim,), self._query_gradient[None, where["head_idx"]]
        )
        whole = cute.make_tensor(
            tile.iterator.align(16), cute.make_layout(self._query_gradient_shape())
        )
        target = self._copy.partition_D(whole)
        source = cute.make_tensor(acc_dQ.iterator, cute.make_layout(target.shape))
        target = cute.group_modes(target, 1, cute.rank(target))
        source = cute.group_modes(source, 1, cute.rank(source))
        for i in cutlass.range_constexpr(cute.size(source, mode=[1])):
            _add_to_memory(target[None, i].iterator, source[None, i])


@cache
def forward(head_size: int, groups: int, cap: float, window: int | None) -> CappedForward:
    """Heads of a size, `groups` of which share a key's; documents packed in rows."""
    return CappedForward(
        _DTYPE,
        head_size,
        head_size,
        groups,
        cap=cap,
        is_causal=window is None,
        is_local=window is not None,
        pack_gqa=False,
        tile_m=QUERY_TILE,
        tile_n=_key_tile(head_size, window),
        num_stages=2,
        num_threads=_THREADS,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=True,
        has_aux_tensors=False,
    )


@cache
def backward(head_size: int, groups: int, cap: float, window: int | None) -> CappedBackward:
    """As `forward`; into float32, which `convert` rounds."""
    tiles = BACKWARD_TILES[head_size]
    return CappedBackward(
        _DTYPE,
        head_size,
        head_size,
        groups,
        cap=cap,
        is_causal=window is None,
        is_local=window is not None,
        deterministic=False,
        tile_m=tiles.queries,
        tile_n=tiles.keys,
        Q_stage=tiles.stages,
        dO_stage=tiles.stages,
        PdS_stage=tiles.score_stages,
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


@cache
def convert(head_size: int, of_keys: bool) -> FlashAttentionBackwardPostprocess:
    """float32 sums in the backward's order to bfloat16 in the arrays'."""
    tiles = BACKWARD_TILES[head_size]
    return FlashAttentionBackwardPostprocess(
        _DTYPE,
        head_size,
        90,
        tiles.keys if of_keys else tiles.queries,
        _THREADS - 128,
        tiles.key_groups if of_keys else 1,
        False,
    )


def window_bounds(window: int | None) -> tuple[Any, Any]:
    """Keys to the left and right of a query, without its own."""
    if window is None:
        return None, None
    return cutlass.Int32(window - 1), cutlass.Int32(0)


@cute.jit
def run_forward(
    stream,
    query,
    key,
    value,
    starts,
    out,
    log_sum,
    kernel: cutlass.Constexpr,
    window: cutlass.Constexpr,
):
    left, right = window_bounds(window)
    kernel(
        query,
        key,
        value,
        out,
        log_sum,
        Float32(1.0),
        mCuSeqlensQ=starts,
        mCuSeqlensK=starts,
        mSeqUsedQ=None,
        mSeqUsedK=None,
        window_size_left=left,
        window_size_right=right,
        stream=stream,
    )


@cute.jit
def run_prepare(
    stream, out, gradient, log_sum, starts, product_sum, log2_sum, zeros, kernel: cutlass.Constexpr
):
    kernel(
        out,
        gradient,
        product_sum,
        log_sum,
        log2_sum,
        zeros,
        starts,
        None,
        None,
        None,
        None,
        Float32(1.0),
        stream=stream,
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
    starts,
    query_sums,
    key_sums,
    value_sums,
    kernel: cutlass.Constexpr,
    window: cutlass.Constexpr,
):
    left, right = window_bounds(window)
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
        starts,
        starts,
        None,
        None,
        window_size_left=left,
        window_size_right=right,
        stream=stream,
    )


@cute.jit
def run_convert(stream, sums, starts, out, kernel: cutlass.Constexpr):
    kernel(sums, out, Float32(1.0), starts, None, None, stream=stream)
