"""Tokens per second of a dump's teacher on one GPU and shared by several.

`python -m benchmarks.shared_teacher --model gemma2-27b --devices 1 2` makes random bfloat16 weights
where they belong and times `Gemma2Teacher.candidates` (forward, head, sampling, and what was found
brought to the host) on rows of 8,192 tokens, all ways in one process, one after the other.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2 import flops, presets
from gemma2.model import init_params
from gemma2.placement import Placement
from schemas.manifest import SamplerSpec, TeacherInfo
from schemas.model import ModelConfig
from teacher_dump.teacher import Gemma2Teacher, share

LENGTH, VOCAB = 8192, 256_000
SPEC = SamplerSpec(name="systematic", points=24, slots_per_token=18, block_tokens=1024)


def make_params(config: ModelConfig, placement: Placement) -> Any:
    """Random bfloat16 parameters, each made on its own devices."""
    shapes = jax.eval_shape(partial(init_params, config, param_dtype=jnp.bfloat16), key())

    def make(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        where = placement.sharding(path, leaf.shape)
        scale = 0.02 if leaf.ndim > 1 else 0.0
        return jax.jit(
            lambda: (scale * jax.random.normal(key(), leaf.shape, jnp.float32)).astype(leaf.dtype),
            out_shardings=where,
        )()

    return jax.tree_util.tree_map_with_path(make, shapes)


def key() -> jax.Array:
    return jax.random.key(0)


def measure(config: ModelConfig, devices: int, rows: int, times: int) -> None:
    placement = share(config, devices)
    info = TeacherInfo(name="random", config_sha256="", weights_sha256="", vocab_size=VOCAB)
    teacher = Gemma2Teacher(info, config, make_params(config, placement), placement)
    tokens = np.random.default_rng(0).integers(4, VOCAB, (rows, LENGTH)).astype(np.int32)
    segments = np.ones_like(tokens)
    took = []
    for turn in range(times + 1):
        start = time.perf_counter()
        found = teacher.candidates(tokens, segments, np.arange(rows), SPEC, seed=turn)
        took.append(time.perf_counter() - start)
    seconds = statistics.median(took[1:])
    work = flops.forward_flops_per_token(config, LENGTH).total * tokens.size
    peak = max(
        (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        for device in jax.local_devices()[:devices]
    )
    print(
        f"{devices} devices, {rows} x {LENGTH}: {tokens.size / seconds:,.0f} tokens/s, "
        f"{work / seconds / devices / 1e12:.0f} TFLOP/s a device, peak {peak / 2**30:.1f} GiB, "
        f"compiled in {took[0]:.0f} s, entropy {found.teacher_entropy.mean():.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="gemma2-27b")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    print(f"{jax.devices()}, jax {jax.__version__}, {options.model}", flush=True)
    for devices in sorted(options.devices, reverse=True):
        measure(presets.resolve(options.model), devices, options.rows, options.times)


if __name__ == "__main__":
    main()
