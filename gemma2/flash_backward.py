"""The backward of attention with heads of 128 on Hopper: FlashAttention-4's, with parts replaced.

Gradients of queries are added to memory from registers, which frees the shared memory that a second
stage of everything else needs. Otherwise as `gemma2.flash_kernels` says.
"""

from functools import cache
from typing import Any

import cutlass
from cutlass import Float32, cute
from cutlass.cute.nvgpu import warpgroup
from fa4_jax.cute import utils
from fa4_jax.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess
from fa4_jax.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from fa4_jax.cute.quack import copy_utils, layout_utils

from gemma2.flash_kernels import (
    BACKWARD_QUERIES,
    DTYPE,
    LOG2_E,
    STAGES,
    THREADS,
    Bounded,
    add_to_memory,
)

HEAD_SIZE = 128
# Of a tile; larger ones spill registers or leave no room for two stages of everything.
KEYS = 128
_KEY_GROUPS = 2


class CappedBackward(Bounded, FlashAttentionBackwardSm90):
    """As the parent, but for what the file says."""

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
                    rows[r, c] * (self.cap * LOG2_E) - row_log_sum, fastmath=True
                )
        product_sum = copy_utils.load_s2r(tLSEsdPsum[None, stage])
        weights = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_S), self.dtype)
        acc_S.store(acc_S.load() * slope.load())

        warpgroup.wait_group(0)
        gradient_rows = layout_utils.reshape_acc_to_mn(acc_dP, transpose=self.SdP_swapAB)
        for r in cutlass.range_constexpr(cute.size(gradient_rows, mode=[0])):
            row_product_sum = self._get_stat(product_sum, r, lane, shuffle=self.shuffle_dPsum)
            for c in cutlass.range(cute.size(gradient_rows, mode=[1]), unroll_full=True):
                gradient_rows[r, c] = rows[r, c] * (gradient_rows[r, c] - row_product_sum)
        gradients = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_dP), self.dtype)
        copy_dS_r2s(gradients, dst_idx=stage)
        # What the last block but one read here has been read, as every group waits for its
        # products before it comes to the next barrier.
        cute.arch.fence_view_async_shared()
        PdS_barrier.arrive_and_wait()

        # That of the queries comes first: it is added to memory while the others are computed.
        acc_dQ = mma_dsk_fn(A_idx=stage, wg_wait=-1)
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
            add_to_memory(target[None, i].iterator, source[None, i])


@cache
def backward(groups: int, cap: float) -> CappedBackward:
    """For heads, `groups` of which share a key's; into float32, which `convert` rounds."""
    return CappedBackward(
        DTYPE,
        HEAD_SIZE,
        HEAD_SIZE,
        groups,
        cap=cap,
        is_causal=True,
        is_local=False,
        deterministic=False,
        tile_m=BACKWARD_QUERIES,
        tile_n=KEYS,
        Q_stage=STAGES,
        dO_stage=STAGES,
        PdS_stage=STAGES,
        # Weights and dS are then operands from registers.
        SdP_swapAB=True,
        dKV_swapAB=False,
        dQ_swapAB=False,
        AtomLayoutMSdP=1,
        AtomLayoutNdKV=_KEY_GROUPS,
        AtomLayoutMdQ=1,
        num_threads=THREADS,
        V_in_regs=False,
        has_aux_tensors=False,
    )


@cache
def convert(of_keys: bool) -> FlashAttentionBackwardPostprocess:
    """float32 sums in the backward's order to bfloat16 in the arrays'."""
    tile, groups = (KEYS, _KEY_GROUPS) if of_keys else (BACKWARD_QUERIES, 1)
    return FlashAttentionBackwardPostprocess(
        DTYPE, HEAD_SIZE, 90, tile, THREADS - 128, groups, False
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
