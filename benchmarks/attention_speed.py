"""Attention alone on a Hopper GPU: our kernels, what is the floor, and the best peer.

`python -m benchmarks.attention_speed` times forward, and forward with backward, of two rows of
8,192 tokens at the shapes of the 2.6B, 9B and 27B presets, beside the rate of a large matrix
product in the same process, and compares with the float32 reference at sizes that no tile divides.
TFLOP/s count the products of what is not masked. With FlashAttention-4 and PyTorch installed, which
are wanted for nothing else, their kernels follow, with the soft-cap and without.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

# What is not used is left to PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.synthetic import make_documents
from gemma2 import attention

ROWS, TOKENS, CAP = 2, 8192, 50.0
CALLS, REPEATS = 5, 5


class Shape(NamedTuple):
    name: str
    heads: int
    key_heads: int
    size: int


SHAPES = (Shape("2.6B", 8, 4, 256), Shape("9B", 16, 8, 256), Shape("27B", 32, 16, 128))
# (tokens, window, deviation of scores); in tiles of 64 the tokens are 16, 17 and a part of one.
DEVIATIONS = (
    (1003, None, 8.0),
    (1003, 77, 8.0),
    (1003, None, 60.0),
    (1040, 300, 8.0),
    (41, None, 8.0),
)
# (window, mean tokens of a document or None: one fills the row)
MASKS = ((None, None), (4096, None), (None, 2000), (4096, 2000))


def milliseconds(run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Of one call: the median of several runs of several calls."""
    wait(run())
    wait(run())
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            last = run()
        wait(last)
        found.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(found)


def seen_pairs(lengths: np.ndarray, window: int | None) -> float:
    """Pairs of a query and a key that it sees, of documents of such lengths."""
    short = lengths.astype(float) if window is None else np.minimum(lengths, window).astype(float)
    return float(np.sum(short * (short + 1) / 2 + (lengths - short) * short))


def arrays(shape: Shape, rows: int, tokens: int, scale: float = 1.0) -> list[jax.Array]:
    """bfloat16 query, key, value and gradient; scores have the standard deviation `scale`."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    made = [
        jax.random.normal(key, (rows, tokens, n, shape.size), jnp.float32)
        for key, n in zip(keys, heads, strict=True)
    ]
    made[0] *= scale * shape.size**-0.5
    return [x.astype(jnp.bfloat16) for x in made]


def both(
    run: Callable[..., jax.Array], segments: jax.Array, window: int | None, *given: Any
) -> Any:
    """(output, gradients of query, key and value)."""
    out, pull = jax.vjp(lambda *x: run(*x, segments, cap=CAP, window=window), *given[:3])
    return (out, *pull(given[3].astype(out.dtype)))


def time_ours(name: str, shape: Shape, window: int | None, documents: int | None) -> dict[str, Any]:
    run = attention.KERNELS[name].run
    made = make_documents(np.random.default_rng(0), ROWS, TOKENS, documents)
    segments = jnp.asarray(made.segment_ids)
    given = arrays(shape, ROWS, TOKENS)
    work = 4 * shape.heads * shape.size * seen_pairs(made.lengths, window)
    forward = jax.jit(lambda *x: run(*x, segments, cap=CAP, window=window))
    backward = jax.jit(partial(both, run, segments, window))
    first = milliseconds(lambda: forward(*given[:3]), jax.block_until_ready)
    all_of_it = milliseconds(lambda: backward(*given), jax.block_until_ready)
    memory = backward.lower(*given).compile().memory_analysis()
    return {
        "forward_ms": round(first, 3),
        "forward_tflops": round(work / first / 1e9),
        "both_ms": round(all_of_it, 3),
        "both_tflops": round(3.5 * work / all_of_it / 1e9),
        "temp_mib": round(memory.temp_size_in_bytes / 2**20),
    }


def deviation(
    name: str,
    shape: Shape,
    window: int | None,
    documents: int | None,
    scale: float,
    tokens: int = 1003,
) -> list[float]:
    """Relative norms of the difference from the float32 reference: output, then gradients."""
    made = make_documents(np.random.default_rng(1), ROWS, tokens, documents)
    padded = made.segment_ids * (np.arange(tokens) < tokens - tokens // 10)
    given = arrays(shape, ROWS, tokens, scale)
    segments = jnp.asarray(padded)
    found = jax.jit(partial(both, attention.KERNELS[name].run, segments, window))(*given)
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in given]
        wanted = jax.jit(partial(both, attention.reference, segments, window))(*wide)
    pairs = zip(found, wanted, strict=True)
    return [
        float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)) for x, y in pairs
    ]


def time_peer(shape: Shape, window: int | None, cap: float) -> dict[str, Any]:
    """FlashAttention-4 from PyTorch."""
    import torch
    from flash_attn.cute import flash_attn_func

    def make(heads: int) -> Any:
        wide = torch.randn(ROWS, TOKENS, heads, shape.size, device="cuda")
        return wide.bfloat16().requires_grad_()

    query, gradient = make(shape.heads), make(shape.heads).detach()
    key, value = make(shape.key_heads), make(shape.key_heads)
    bounds = (None, None) if window is None else (window - 1, 0)

    def forward() -> Any:
        found = flash_attn_func(
            query,
            key,
            value,
            softmax_scale=shape.size**-0.5,
            causal=True,
            window_size=bounds,
            softcap=cap,
        )
        return found[0] if isinstance(found, tuple) else found

    def with_backward() -> Any:
        return torch.autograd.grad(forward(), (query, key, value), gradient)

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    work = 4 * shape.heads * shape.size * seen_pairs(np.full(ROWS, TOKENS), window)
    with torch.no_grad():
        first = milliseconds(forward, wait)
    all_of_it = milliseconds(with_backward, wait)
    return {
        "forward_ms": round(first, 3),
        "forward_tflops": round(work / first / 1e9),
        "both_ms": round(all_of_it, 3),
        "both_tflops": round(3.5 * work / all_of_it / 1e9),
    }


def matrix_rate() -> float:
    left = jax.random.normal(jax.random.key(3), (8192, 8192), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return 2 * 8192**3 / milliseconds(lambda: product(left, left), jax.block_until_ready) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", default="flash", choices=list(attention.KERNELS))
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    say(device=jax.devices()[0].device_kind, jax=jax.__version__, matrix_tflops=matrix_rate())
    for shape in SHAPES:
        for window, documents in MASKS[: 4 if shape is SHAPES[0] else 2]:
            where = {"shape": shape.name, "window": window, "documents": documents}
            say(**where, ours=time_ours(options.kernel, shape, window, documents))
            if not options.no_peer and documents is None:
                for cap in (CAP, 0.0):
                    say(**where, peer=time_peer(shape, window, cap), cap=cap)
    say(matrix_tflops=matrix_rate())
    for shape in SHAPES[:1] + SHAPES[2:]:
        for tokens, window, scale in DEVIATIONS:
            found = deviation(options.kernel, shape, window, 150, scale, tokens)
            where = {"shape": shape.name, "tokens": tokens, "window": window}
            say(**where, score_deviation=scale, differs_by=[float(f"{x:.2g}") for x in found])


if __name__ == "__main__":
    main()
