"""Tokens per second of a dump by a teacher of real size: its layers and head, with sampling, whole.

`python -m benchmarks.dump_speed --model gemma2-9b --batch 2 --dtypes bfloat16 float8` makes random
weights where they belong, and one process measures, in this order: the matrix rate of the device;
in turns, as a card gets slower when it is warm, the bare forward (layers, head, log-sum-exp of
every position) and the teacher's step as a dump calls it, with sampling; `retort dump`'s own job,
from a store's tokens to committed shards on a local disk, all but the loading of weights; the turns
again; the matrix rate again. Rows of 8,192 tokens are one document each, the longest attention that
there is. With `--devices 2` the layers are shared; `--no-dump` needs no Beam.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step_speed import Rates
from benchmarks.synthetic import zipf_ids
from gemma2 import flops, presets
from gemma2.float8 import quantize_layers
from gemma2.model import Execution, hidden_states, init_params, logits
from gemma2.placement import Placement
from logit_store import codec, writer
from logit_store.ledger import Ledger
from schemas.manifest import (
    Corpus,
    SamplerSpec,
    TargetsManifest,
    TeacherDtype,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    identity,
)
from schemas.model import ModelConfig
from schemas.runs import DumpConfig
from teacher_dump import compiled
from teacher_dump.compiled import step
from teacher_dump.teacher import Gemma2Teacher, share, tile_tokens

LENGTH, VOCAB = 8192, 256_000
SPEC = SamplerSpec(name="systematic", points=24, slots_per_token=18, block_tokens=1024)
# Standard deviation of scores that, Gaussian and without a cap, had an entropy of 3.5 nats.
SPREAD = 4.2
# Of what layers add to the stream, so that its last token is not what a random model expects next.
LOUDNESS = 20.0
ROUNDS = 3


def make_params(config: ModelConfig, placement: Placement, dtype: TeacherDtype) -> Any:
    """Random parameters, each made on its own devices."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(partial(init_params, config, param_dtype=jnp.bfloat16), key)

    def make(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        names = [step.key for step in path]
        where = placement.sharding(path, leaf.shape)
        if names[-1] == "weight":
            loud = any(name.startswith("post_") for name in names)
            return jnp.full(leaf.shape, LOUDNESS if loud else 0.0, leaf.dtype, device=where)
        scale = SPREAD / config.d_model**0.5 if names == ["embedding"] else 0.02
        return jax.jit(
            lambda: (scale * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype),
            out_shardings=where,
        )()

    params = jax.tree_util.tree_map_with_path(make, shapes)
    if dtype == "float8":
        params["pairs"] = quantize_layers(params["pairs"])
    return params


def in_turns(runs: list[Callable[[], Any]], times: int) -> list[float]:
    """Median seconds of each of several calls, which take turns of so many."""
    took: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, mine in zip(runs, took, strict=True):
            for _ in range(times):
                start = time.perf_counter()
                jax.block_until_ready(run())
                mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in took]


@step("config", "execution")
def forward(
    params: Any, tokens: jax.Array, segments: jax.Array, *, config: Any, execution: Execution
) -> jax.Array:
    """float32 [tiles, tile]: the log-sum-exp of every position's scores."""
    hidden = hidden_states(
        params, config, tokens, segments, dtype=jnp.bfloat16, execution=execution
    )

    def one_tile(table: jax.Array, states: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(logits({"embedding": table}, config, states), axis=1)

    def all_tiles(table: jax.Array, states: jax.Array) -> jax.Array:
        return jax.lax.map(partial(one_tile, table), states)

    tiles = hidden.reshape(-1, tile_tokens(LENGTH), hidden.shape[-1])
    return execution.placement.spread(all_tiles, params["embedding"], tiles)


def make_store(url: str, shards: int, shard_rows: int, batch: int, info: TeacherInfo, dtype: Any):
    """A store of random tokens, and an empty set of targets; the ledger of these."""
    shapes = {
        "num_sequences": shards * shard_rows,
        "sequence_tokens": LENGTH,
        "shard_sequences": shard_rows,
    }
    corpus = Corpus(sources=(), splits=())
    tokens = TokensManifest(
        **shapes,
        tokenizer=TokenizerInfo(sha256="0" * 64, vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0),
        corpus=corpus.summary(),
        software={},
    )
    counts = (1e9 / (1 + np.arange(VOCAB))).astype(np.int64)
    order = np.arange(VOCAB, dtype=np.uint32)
    tables = writer.Tables(codec.make_vocabulary(counts, SPEC.slots_per_token), order)
    targets = TargetsManifest(
        **shapes,
        tokens_fingerprint=identity(tokens),
        teacher=info,
        sampler=SPEC,
        vocabulary=tables.info(),
        seed=0,
        dtype=dtype,
        batch_sequences=batch,
        software={},
    )
    writer.create_tokens(url, tokens, corpus)
    random = np.random.default_rng(0)
    for spec in writer.plan_shards(tokens):
        rows = zipf_ids(random, VOCAB, (shard_rows, LENGTH))
        writer.TokensWriter(url).write(spec, rows, np.ones(rows.shape, np.uint16))
    writer.create_targets(url, "default", targets, tables)
    return Ledger(url, "default", targets)


def dump_whole(teacher: Gemma2Teacher, dtype: Any, options: argparse.Namespace) -> str:
    """Have the dump's own job write a store by this teacher; what it said of itself."""
    from rich.console import Console

    from pipelines import dump
    from pipelines.shards import write_and_sum_up

    folder = Path(tempfile.mkdtemp(dir=options.out))
    try:
        url = str(folder / "store")
        batch, devices = options.batch, options.devices
        config = DumpConfig(
            store=url,
            teacher=folder,
            dtype=dtype,
            batch_sequences=batch,
            model_devices=devices,
        )
        ledger = make_store(url, options.shards, options.shard_rows, batch, teacher.info, dtype)
        key = (str(folder), teacher.info.backend, dtype, teacher.info.vocab_size, devices)
        dump._teachers[key] = teacher
        work = write_and_sum_up(
            ledger,
            dump.WriteTargets(config),
            Console(quiet=True),
            None,
            verb="dump",
            stage="dump",
        )
        del dump._teachers[key]
        tokens = work.statistics.tokens
        return (
            f"{tokens / work.seconds:,.0f} tokens/s: {tokens:,} tokens in {work.computed} shards, "
            f"{work.statistics.entries / tokens:.2f} entries and {work.bytes / tokens:.1f} bytes a "
            f"token"
        )
    finally:
        shutil.rmtree(folder)


def measure(config: ModelConfig, dtype: TeacherDtype, options: argparse.Namespace) -> None:
    rows = options.batch
    placement = share(config, options.devices)
    info = TeacherInfo(name="random", config_sha256="", weights_sha256="", vocab_size=VOCAB)
    rates = Rates(jax.local_devices()[0])
    rates.measure_products()
    teacher = Gemma2Teacher(info, config, make_params(config, placement, dtype), placement)
    random = np.random.default_rng(0)
    tokens = zipf_ids(random, VOCAB, (rows, LENGTH))
    segments = np.ones_like(tokens)
    work = flops.forward_flops_per_token(config, LENGTH).total

    arrays = jnp.asarray(tokens), jnp.asarray(segments)

    def bare() -> Any:
        return forward(teacher._params, *arrays, config=config, execution=teacher._execution)

    def sampled() -> Any:
        return teacher.begin(tokens, segments, np.arange(rows), SPEC, 0)()

    def say_both() -> float:
        """Seconds of the bare forward."""
        found = in_turns([bare, sampled], options.times)
        for what, seconds in zip(("layers and head", "with sampling"), found, strict=True):
            rate = tokens.size / seconds
            flops_per_second = work * rate / options.devices
            print(
                f"  {what}: {seconds * 1e3:.1f} ms, {rate:,.0f} tokens/s, "
                f"{flops_per_second / 1e12:.0f} TFLOP/s a device",
                flush=True,
            )
        print(f"  sampling adds {found[1] / found[0] - 1:.1%}", flush=True)
        return found[0]

    bare()
    entropy = sampled().teacher_entropy.mean()
    before = say_both()
    if options.dump:
        said = dump_whole(teacher, dtype, options)
        rate = float(said.split(" ")[0].replace(",", ""))
        print(f"  dump: {said}", flush=True)
        after = say_both()
        share_of = statistics.mean((before, after)) * rate / tokens.size
        print(f"  dump: {share_of:.1%} of layers and head before and after it", flush=True)
    rates.measure_products()
    share_of = work * tokens.size / before / options.devices / rates.matrix
    peak = max(
        (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        for device in jax.local_devices()[: options.devices]
    )
    print(
        f"  {rates}, of which layers and head had {share_of:.1%}; peak {peak / 2**30:.1f} GiB, "
        f"entropy {entropy:.2f} nats, attention {teacher._execution.attention}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="gemma2-9b", help="preset, or a file of a ModelConfig")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="and float8")
    parser.add_argument("--devices", type=int, default=1, help="that share the layers")
    parser.add_argument("--batch", type=int, default=2, help="rows of a batch")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--shard-rows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--no-dump", dest="dump", action="store_false")
    parser.add_argument(
        "--autotune", action="store_true", help="Let XLA time kernels, as a dump does not."
    )
    options = parser.parse_args()
    print(f"{jax.devices()}, jax {jax.__version__}", flush=True)
    if options.autotune:
        compiled.ON_GPU.clear()
    for dtype in options.dtypes:
        print(f"{options.model}, {dtype}, batches of {options.batch} x {LENGTH}", flush=True)
        measure(presets.resolve(options.model), dtype, options)


if __name__ == "__main__":
    main()
