"""Attention for Hopper: FlashAttention-4's kernels, a soft-cap in place of the running maximum.

The kernels are CuTe programs of the package fa4-jax. What is changed here: a soft-cap c bounds
every score, so that e^score and sums of them fit float32 (and e^score bfloat16) without the row's
maximum: no maximum, no rescaling, and tanh and exp are one pass over the registers. What a query
sees is given by two arrays of bounds, for windows and packed documents alike: tiles that no query
of theirs sees are never loaded, and only those at an edge are masked. The replaced methods keep the
order of work of the originals (FlashAttention-4, Dao-AILab, BSD-3-Clause, as fa4-jax 0.1.0 has it),
which the rest of a kernel expects. Here are the forward and what all share; the backward, with t =
tanh(score / c), P = e^(c·t - lse) and dS = P (dP - rowsum(P dP)) (1 - t²), is in
`gemma2.flash_pairs` for heads of 256 and `gemma2.flash_backward` for heads of 128. Imported only
where the kernels run: the packages are those of the `gpu` extra.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import warpgroup
from fa4_jax.cute import utils
from fa4_jax.cute.flash_bwd_preprocess import FlashAttentionBackwardPreprocess
from fa4_jax.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from fa4_jax.cute.quack import layout_utils

LOG2_E = math.log2(math.e)
DTYPE = cutlass.BFloat16
THREADS = 384  # a warp group that loads and two that multiply
STAGES = 2
BACKWARD_QUERIES = 64  # of a tile, in every backward
_FORWARD_KEYS = {256: 64, 128: 128}
_FORWARD_QUERIES = 128


@dataclass(frozen=True)
class Visible:
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


class Bounded:
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
        self._visible = Visible(
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


class CappedForward(Bounded, FlashAttentionForwardSm90):
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
            weights = cute.math.exp2(rows[r, None].load() * (self.cap * LOG2_E), fastmath=True)
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
def add_to_memory(pointer, values):
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


@cache
def forward(head_size: int, groups: int, cap: float) -> CappedForward:
    """For heads of a size, `groups` of which share a key's."""
    return CappedForward(
        DTYPE,
        head_size,
        head_size,
        groups,
        cap=cap,
        is_causal=True,
        is_local=False,
        pack_gqa=False,
        tile_m=_FORWARD_QUERIES,
        tile_n=_FORWARD_KEYS[head_size],
        num_stages=STAGES,
        num_threads=THREADS,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=True,
        has_aux_tensors=False,
    )


@cache
def prepare(head_size: int) -> FlashAttentionBackwardPreprocess:
    """Row sums of gradient · output, and zeros for the queries' gradients."""
    return FlashAttentionBackwardPreprocess(DTYPE, head_size, head_size, BACKWARD_QUERIES)


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
def run_convert(stream, sums, out, kernel: cutlass.Constexpr):
    kernel(sums, out, Float32(1.0), None, None, None, stream=stream)
