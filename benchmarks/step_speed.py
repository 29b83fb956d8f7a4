"""The training step: time, memory, compilation, and where the time goes.

`python -m benchmarks.step_speed --out DIR` makes the step as `retort train` does, on batches in
memory that are shaped as a store's, each configuration in a process of its own, on one device or
with `--fsdp N` on several; tokens/s are then of all of them, all else of one. Beside each stand
the rate of a large matrix product and of a copy in the same process. With `--profile` the step is
also cut into parts. `records.jsonl` under `--out` has all of it, `*.parts.txt` every kernel.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# A run's own share is JAX's default, three quarters; here whatever fits the device is to be timed.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import step_parts
from benchmarks.synthetic import Documents, make_documents, make_entries, zipf_ids
from gemma2 import attention, flops, presets
from schemas.manifest import TargetsManifest, TeacherInfo, VocabularyInfo
from schemas.model import ModelConfig
from schemas.runs import MeshConfig, SamplerConfig, TrainConfig
from student_train import mesh as meshes
from student_train.batch import Batch
from student_train.step import (
    abstract_batch,
    abstract_state,
    make_head,
    make_state,
    make_train_step,
)

MATRIX, MATRIX_ON_CPU = 8192, 1024
PRODUCTS, REPEATS = 20, 5
COPIED_BYTES = 2**31
WARM_UP = 2
BATCHES = 2
PROFILED_STEPS = 3
TOKENIZER_VOCAB = 256_000
"""Ids that Gemma's tokenizer knows; the presets' tables have more rows."""
KERNELS_SHOWN = 25
GIB = 2**30


def time_of(run: Callable[[], Any], times: int, repeats: int) -> list[float]:
    """Seconds of one call, in each of several repeats of so many calls in a row."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(times):
            last = run()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - start) / times)
    return found


class Rates:
    """What this device does in this process: a product of large bfloat16 matrices, and a copy."""

    def __init__(self, device: Any):
        is_gpu = device.platform == "gpu"
        self.size = MATRIX if is_gpu else MATRIX_ON_CPU
        self._products = PRODUCTS if is_gpu else 1
        self._copied_bytes = COPIED_BYTES if is_gpu else 2**24
        self.flops_per_second: list[float] = []
        self.copied_bytes_per_second = 0.0

    def measure_products(self) -> None:
        """Once before the steps and once after, as a card is slower when it is warm."""
        shape = (self.size, self.size)
        left, right = (
            jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in (0, 1)
        )
        product = jax.jit(jnp.matmul)
        seconds = time_of(lambda: product(left, right), self._products, REPEATS)
        self.flops_per_second += [2 * self.size**3 / each for each in seconds]

    def measure_copy(self) -> None:
        """Bytes read and bytes written both count."""
        array = jnp.zeros(self._copied_bytes // 4, jnp.float32)
        copy = jax.jit(jnp.copy)
        seconds = time_of(lambda: copy(array), 5, REPEATS)
        self.copied_bytes_per_second = 2 * array.nbytes / statistics.median(seconds)

    @property
    def matrix(self) -> float:
        return statistics.median(self.flops_per_second)

    def __str__(self) -> str:
        low, high = (f(self.flops_per_second) / 1e12 for f in (min, max))
        return (
            f"{self.size}^3 bfloat16 product {self.matrix / 1e12:.1f} TFLOP/s ({low:.1f} to "
            f"{high:.1f}, {len(self.flops_per_second)} x {self._products}), copy "
            f"{self.copied_bytes_per_second / 1e12:.2f} TB/s"
        )


class Setting:
    """One configuration: the step, and what it is given."""

    def __init__(self, options: argparse.Namespace, entries: int, remat: str):
        self.options, self.entries, self.remat = options, entries, remat
        self.model: ModelConfig = presets.resolve(options.model)
        self.vocab = min(TOKENIZER_VOCAB, self.model.vocab_size)
        self.config = TrainConfig(
            store="",
            out=Path(),
            model=options.model,
            batch_sequences=options.rows * options.fsdp,
            mesh=MeshConfig(fsdp=options.fsdp),
            remat=remat,
            attention=options.attention,
            loss_chunk_tokens=options.chunk_tokens,
            dtype=options.dtype,
        )
        self.mesh = meshes.make_mesh(self.config.mesh, jax.devices()[: options.fsdp])
        self.kernel = attention.resolve(
            options.attention,
            self.model,
            self.mesh.devices.flat[0],
            dtype=options.dtype,
            backward=True,
        )
        sampler = SamplerConfig(entries_per_token=entries)
        self.targets = TargetsManifest(
            tokens_fingerprint="",
            num_sequences=self.config.batch_sequences,
            sequence_tokens=options.tokens,
            shard_sequences=options.rows,
            teacher=TeacherInfo(
                name="", config_sha256="", weights_sha256="", vocab_size=self.vocab
            ),
            sampler=sampler.spec(2 * entries, options.tokens, self.vocab),
            vocabulary=VocabularyInfo(
                num_buckets=1, order_sha256="", buckets_sha256="", sampling_sha256=""
            ),
            seed=0,
            dtype="bfloat16",
            batch_sequences=1,
            software={},
        )
        self.head = make_head(self.model, self.vocab, self.targets, self.config.loss_chunk_tokens)
        self.abstract = abstract_state(self.model, self.config, self.mesh)
        self.abstract_batch = abstract_batch(
            self.config.batch_sequences, options.tokens, self.targets, self.mesh
        )

    @property
    def name(self) -> str:
        return f"{self.entries}-entries-{self.remat}"

    def compile(self) -> tuple[Any, float, float]:
        """(the compiled step, seconds to trace and lower it, seconds to compile it)."""
        step: Any = make_train_step(self.model, self.config, self.head, self.mesh)
        start = time.perf_counter()
        lowered = step.lower(self.abstract, self.abstract_batch)
        traced = time.perf_counter()
        compiled = lowered.compile()
        return compiled, traced - start, time.perf_counter() - traced

    def new_state(self) -> Any:
        """As a run's: made where it belongs."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        make = partial(make_state, self.model, self.config)
        return jax.jit(make, out_shardings=where)(jax.random.key(0))

    def make_batch(self, seed: int) -> tuple[Batch, Documents, float]:
        """(the batch on the device, its documents, mean entries of a predicted position)."""
        random = np.random.default_rng(seed)
        rows, length = self.config.batch_sequences, self.options.tokens
        one_document = self.options.documents <= 1
        documents = make_documents(
            random, rows, length, None if one_document else self.options.documents
        )
        found = make_entries(
            random,
            documents.segment_ids,
            mean_entries=self.entries,
            block_tokens=self.targets.sampler.block_tokens,
            slots_per_token=self.targets.sampler.slots_per_token,
            vocab=self.vocab,
        )
        entropy = random.exponential(1.5, (rows, length)).astype(np.float32)
        batch = Batch(
            tokens=zipf_ids(random, self.vocab, (rows, length)),
            segment_ids=documents.segment_ids,
            entry_id=found.entry_id,
            entry_weight=found.entry_weight,
            head_count=found.head_count,
            tail_count=found.tail_count,
            teacher_entropy=entropy,
            label_logprob=-entropy,
        )
        for name, made, wanted in zip(Batch._fields, batch, self.abstract_batch, strict=True):
            assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype), name
        placed = jax.device_put(batch, meshes.rows_sharding(self.mesh))
        return placed, documents, found.mean


def training_flops(model: ModelConfig, documents: Documents) -> dict[str, float]:
    """Model FLOPs of a step on these documents: causal and windowed pairs within each."""
    sums = dict.fromkeys(("linear", "head", "attention"), 0.0)
    for tokens, count in zip(*np.unique(documents.lengths, return_counts=True), strict=True):
        found = flops.forward_flops_per_token(model, int(tokens))
        work = flops.TRAINING_TO_FORWARD * int(tokens) * int(count)
        sums["linear"] += work * found.linear
        sums["head"] += work * found.head
        sums["attention"] += work * (found.local_attention + found.global_attention)
    return sums


def run(setting: Setting, rates: Rates, out: Path) -> dict[str, Any]:
    """Compile, time, profile; prints as it goes. Returns the record."""
    options = setting.options
    device = setting.mesh.devices.flat[0]
    compiled, traced_seconds, compiled_seconds = setting.compile()
    counted = compiled.memory_analysis()
    made_bytes = counted.output_size_in_bytes - counted.alias_size_in_bytes
    total_bytes = counted.argument_size_in_bytes + counted.temp_size_in_bytes + made_bytes
    limit_bytes = (device.memory_stats() or {}).get("bytes_limit")
    record: dict[str, Any] = {
        "model": options.model,
        "rows": options.rows,
        "fsdp": options.fsdp,
        "tokens": options.tokens,
        "entries": setting.entries,
        "remat": setting.remat,
        "attention": setting.kernel,
        "documents": options.documents,
        "chunk_tokens": options.chunk_tokens,
        "device": device.device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "temp_bytes": counted.temp_size_in_bytes,
        "argument_bytes": counted.argument_size_in_bytes,
        "total_bytes": total_bytes,
        "limit_bytes": limit_bytes,
        "trace_seconds": traced_seconds,
        "compile_seconds": compiled_seconds,
    }
    say(
        f"{options.model} {options.fsdp} x {options.rows} x {options.tokens}, {setting.entries} "
        f"entries, remat "
        f"{setting.remat}, attention {setting.kernel}: traced in {traced_seconds:.1f} s, compiled "
        f"in {compiled_seconds:.1f} s; temporary {counted.temp_size_in_bytes / GIB:.1f} + "
        f"arguments {counted.argument_size_in_bytes / GIB:.1f} GiB"
    )
    if limit_bytes and total_bytes > limit_bytes:
        say(f"  does not fit: {total_bytes / GIB:.1f} of {limit_bytes / GIB:.1f} GiB")
        return record
    rates.measure_copy()
    rates.measure_products()
    try:
        record |= time_steps(setting, compiled, rates, out)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say(f"  does not fit: {str(error).splitlines()[0]}")
    return record


def time_steps(setting: Setting, compiled: Any, rates: Rates, out: Path) -> dict[str, Any]:
    """The part of a record that needs the device."""
    options, device = setting.options, setting.mesh.devices.flat[0]
    made = [setting.make_batch(seed) for seed in range(BATCHES)]
    batches = [batch for batch, _, _ in made]
    state = setting.new_state()
    seconds, losses = [], []
    for step in range(WARM_UP + options.steps):
        start = time.perf_counter()
        state, metrics = compiled(state, batches[step % BATCHES])
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics.loss))
    grad_norm = float(metrics.grad_norm)
    peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")
    breakdown = None
    if options.stage == "profile":
        state, breakdown = profile(setting, compiled, state, batches, out)
    del state
    rates.measure_products()
    step_seconds = statistics.median(seconds[WARM_UP:])
    work = [training_flops(setting.model, documents) for _, documents, _ in made]
    by_part = {name: statistics.mean(each[name] for each in work) for name in work[0]}
    per_second = {name: value / step_seconds / options.fsdp for name, value in by_part.items()}
    total = sum(per_second.values())
    tokens_per_second = setting.config.batch_sequences * options.tokens / step_seconds
    finite = all(map(math.isfinite, (*losses, grad_norm)))
    say(f"  {rates}")
    say(
        f"  {1e3 * step_seconds:.1f} ms a step ({1e3 * min(seconds[WARM_UP:]):.1f} to "
        f"{1e3 * max(seconds[WARM_UP:]):.1f}), {tokens_per_second:,.0f} tokens/s, "
        f"{total / 1e12:.1f} model TFLOP/s (layers {per_second['linear'] / 1e12:.1f}, attention "
        f"{per_second['attention'] / 1e12:.1f}, head {per_second['head'] / 1e12:.1f}), "
        f"{total / rates.matrix:.1%} of the matrix rate"
    )
    say(
        f"  peak {(peak_bytes or 0) / GIB:.1f} GiB; {made[0][2]:.2f} entries a token in "
        f"{setting.targets.sampler.slots_per_token} slots, {len(made[0][1].lengths)} documents; "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, gradient norm {grad_norm:.3f}"
        f"{'' if finite else ': NOT FINITE'}"
    )
    if breakdown is not None:
        for line in step_parts.table(breakdown):
            say(f"    {line}")
        for line in step_parts.longest(breakdown, PROFILED_STEPS, KERNELS_SHOWN):
            say(line)
    return {
        "matrix_flops_per_second": rates.flops_per_second,
        "copied_bytes_per_second": rates.copied_bytes_per_second,
        "seconds": seconds,
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "model_flops": by_part,
        "model_flops_per_second": total,
        "share_of_matrix_rate": total / rates.matrix,
        "peak_bytes": peak_bytes,
        "mean_entries": made[0][2],
        "losses": losses,
        "grad_norm": grad_norm,
        "finite": finite,
        "parts_seconds": None if breakdown is None else breakdown.parts,
        "idle_seconds": None if breakdown is None else breakdown.idle_seconds,
        "profiled_step_seconds": None if breakdown is None else breakdown.seconds,
    }


def profile(
    setting: Setting, compiled: Any, state: Any, batches: list[Batch], out: Path
) -> tuple[Any, step_parts.Breakdown | None]:
    """Steps in a row, as in a run; what was found in the profile is written under `out`."""
    text = compiled.as_text()
    (out / f"{setting.name}.hlo.txt").write_text(text)
    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=settings):
            for step in range(PROFILED_STEPS):
                state, metrics = compiled(state, batches[step % BATCHES])
            jax.block_until_ready((state, metrics))
        trace = step_parts.read_trace(Path(folder))
        found = step_parts.break_down(trace, step_parts.Program(text), PROFILED_STEPS)
        sample = "\n".join(step_parts.sample_of(trace))
    (out / f"{setting.name}.planes.txt").write_text(sample + "\n")
    if found is None:
        say(f"  the profile has no kernel: {setting.name}.planes.txt says what it has")
        return state, None
    say(f"  profile of {PROFILED_STEPS} steps: {found.source}")
    lines = [*step_parts.table(found), "", *step_parts.longest(found, PROFILED_STEPS, None)]
    (out / f"{setting.name}.parts.txt").write_text("\n".join(lines) + "\n")
    return state, found


def compile_again(setting: Setting, cache: Path) -> dict[str, Any]:
    """In a process of its own, what a compilation takes whose result JAX has cached."""
    before = {path.name for path in cache.iterdir()}
    _, traced_seconds, compiled_seconds = setting.compile()
    new = [path.name for path in cache.iterdir() if path.name not in before]
    missed = any("train_step" in name for name in new)
    say(
        f"  from JAX's cache: traced in {traced_seconds:.1f} s, loaded in {compiled_seconds:.1f} s"
        f"{'; it was NOT in the cache' if missed else ''}"
    )
    return {
        "cached_trace_seconds": traced_seconds,
        "cached_compile_seconds": compiled_seconds,
        "cache_missed": missed,
    }


def use_cache(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def say(line: str) -> None:
    print(line, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="gemma2-2.6b", help="preset, or a file of a ModelConfig")
    parser.add_argument("--rows", type=int, default=2, help="of each device")
    parser.add_argument("--fsdp", type=int, default=1, help="devices, among which all is cut")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--entries", type=int, nargs="+", default=[12, 32])
    parser.add_argument("--remat", nargs="+", default=["dots"])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chunk-tokens", type=int, default=1024, help="loss_chunk_tokens")
    parser.add_argument(
        "--documents", type=int, default=1, help="mean tokens of a document; 1: one fills a row"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--cached",
        choices=("none", "first", "all"),
        default="first",
        help="which configurations are compiled again from JAX's cache",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/step_speed"))
    parser.add_argument("--stage", choices=("run", "profile", "cached"), help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_own_process(arguments: list[str], flags: str = "") -> int:
    command = [sys.executable, "-m", "benchmarks.step_speed", *arguments]
    environment = dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip())
    return subprocess.run(command, env=environment).returncode


def main() -> None:
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage is None:
        # The device belongs to one process at a time, and a peak of memory to a process.
        failed = 0
        for number, (entries, remat) in enumerate(
            itertools.product(options.entries, options.remat)
        ):
            with tempfile.TemporaryDirectory() as cache:
                one = ["--entries", str(entries), "--remat", remat, "--cache", cache]
                failed |= in_own_process([*sys.argv[1:], *one, "--stage", "run"])
                if options.profile:
                    # The kernels of a CUDA graph do not say which part of the program they are.
                    graphs_off = "--xla_gpu_enable_command_buffer="
                    failed |= in_own_process(
                        [*sys.argv[1:], *one, "--stage", "profile"], graphs_off
                    )
                if options.cached == "all" or (options.cached == "first" and number == 0):
                    failed |= in_own_process([*sys.argv[1:], *one, "--stage", "cached"])
        sys.exit(failed)
    use_cache(options.cache)
    setting = Setting(options, options.entries[0], options.remat[0])
    device = jax.devices()[0]
    if options.stage != "cached":
        say(f"{device.device_kind}, jax {jax.__version__}")
        record = run(setting, Rates(device), options.out)
    else:
        record = {"setting": setting.name} | compile_again(setting, options.cache)
    with (options.out / "records.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    if not record.get("finite", True):
        sys.exit(1)


if __name__ == "__main__":
    main()
