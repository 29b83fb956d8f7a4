"""The whole product on one GPU: real text, a teacher, a store, and the 2.6B student for 200 steps.

`python -m benchmarks.student_2b --corpus PATH... --out DIR` takes source and text files under the
paths, trains a tokenizer and a small teacher on them, writes tokens and targets, and trains the
2.6B preset on these; then it reads the exported student with transformers on the same GPU and
compares logits, and tells what a checkpoint cost from the times of the steps. It wants 60 GB of GPU
memory, 100 GB of disk, and transformers with PyTorch. Each stage is reused when it is run again.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

# What is not used is left to PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from scipy.special import log_softmax

from gemma2 import checkpoint, model
from logit_store.statistics import summary
from pipelines import dump, tokenize, training
from schemas.model import ModelConfig
from schemas.runs import (
    CorpusConfig,
    DumpConfig,
    OptimizerConfig,
    RateSchedule,
    SamplerConfig,
    TokenizeConfig,
    TrainConfig,
)
from student_train.data import StoreSource
from student_train.loop import TrainEvent, train
from teacher_dump import tokenizer as tokenizers

SUFFIXES = {".py", ".md", ".rst", ".txt"}
STAGES = ("store", "student", "compare")
TOKENIZER = "tokenizer.model"
LENGTH, VOCAB = 4096, 32_768
TEACHER = ModelConfig(
    vocab_size=VOCAB,
    d_model=768,
    num_layers=8,
    mlp_width=3072,
    num_heads=12,
    num_kv_heads=4,
    head_size=64,
    query_scalar=64,
    window_tokens=1024,
    max_tokens=LENGTH,
)


def write_corpus(paths: list[str], folder: Path, limit_bytes: int) -> None:
    """`train.jsonl` and `heldout.jsonl`, two of a hundred documents, in an order of hashes."""
    if (folder / "train.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = [p for root in paths for p in Path(root).rglob("*") if p.suffix in SUFFIXES]
    files.sort(key=lambda p: hashlib.sha256(str(p).encode()).digest())
    total, seen = 0, set()
    parts = {name: (folder / f"{name}.tmp").open("w") for name in ("train", "heldout")}
    for path in files:
        if total > limit_bytes:
            break
        text = path.read_text(encoding="utf-8", errors="ignore") if path.is_file() else ""
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        total += len(text.encode())
        name = "heldout" if digest[0] % 50 == 0 else "train"
        parts[name].write(json.dumps({"text": text}) + "\n")
    for name, file in parts.items():
        file.close()
        (folder / f"{name}.tmp").rename(folder / f"{name}.jsonl")


def make_store(out: Path, paths: list[str], limit_bytes: int, console: Console) -> None:
    """Tokens and targets of real text."""
    corpus = out / "corpus"
    write_corpus(paths, corpus, limit_bytes)
    tokenizer = out / TOKENIZER
    if not tokenizer.exists():
        texts = (json.loads(line)["text"] for line in (corpus / "train.jsonl").open())
        tokenizers.train(texts, tokenizer, vocab_size=VOCAB)
    for name in ("train", "heldout"):
        config = TokenizeConfig(
            store=str(out / f"{name}.zarr"),
            corpus=CorpusConfig(paths=(str(corpus / f"{name}.jsonl"),)),
            tokenizer=tokenizer,
            sequence_tokens=LENGTH,
            shard_sequences=256,
        )
        console.print(f"{name}: {tokenize.tokenize(config, console)}")
    shape = out / "teacher.json"
    shape.write_text(TEACHER.model_dump_json())
    teacher = training.train(
        TrainConfig(
            store=str(out / "train.zarr"),
            out=out / "teacher",
            model=str(shape),
            tokenizer=tokenizer,
            targets=None,
            steps=150,
            batch_sequences=8,
            remat="attention",
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule=RateSchedule(warmup_steps=15)),
            checkpoint_every=150,
        ),
        console,
        label="teacher",
    )
    config = DumpConfig(
        store=str(out / "train.zarr"),
        teacher=teacher.export,
        sampler=SamplerConfig(entries_per_token=12),
        batch_sequences=8,
    )
    console.print(dump.dump(config, console))


def train_student(
    out: Path, tokenizer: Path, options: argparse.Namespace, console: Console
) -> None:
    """Train the 2.6B preset; print its records, times of steps and what a checkpoint cost."""
    config = TrainConfig(
        store=str(out / "train.zarr"),
        out=out / "student",
        model="gemma2-2.6b",
        tokenizer=tokenizer,
        steps=options.steps,
        batch_sequences=options.batch,
        remat=options.remat,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule=RateSchedule(warmup_steps=options.steps // 10)
        ),
        checkpoint_every=options.checkpoint_every,
        keep_checkpoints=1,
        log_every=10,
    )
    times: list[float] = []

    def on_event(event: TrainEvent) -> None:
        times.append(time.perf_counter())
        if event.record is not None:
            console.print(json.dumps(event.record), soft_wrap=True)

    result = train(config, tokenizer=tokenizer, on_event=on_event)
    stats = jax.local_devices()[0].memory_stats() or {}
    console.print(f"peak memory {stats.get('peak_bytes_in_use', 0) / 2**30:.1f} GiB")
    if len(times) > 2 * options.checkpoint_every:
        steps = np.diff(times[:-1])
        usual = statistics.median(steps)
        tokens = options.batch * LENGTH / usual
        late = [s for s in steps[5:] if s > 1.05 * usual]
        console.print(
            f"a step takes {usual:.4f} s, {tokens:,.0f} tokens/s; {len(late)} steps were later by "
            f"{sum(late) - len(late) * usual:.2f} s in all, the longest took {max(steps[5:]):.2f} s"
        )
    console.print(f"exported to {result.export}")


def compare_with_transformers(out: Path, rows: int, console: Console) -> None:
    """Logits of the exported student in both, on the same GPU, in float32 from the same file."""
    folder = out / "student" / "export"
    tokens = StoreSource(str(out / "train.zarr"), None).read(np.arange(rows)).tokens[:, :512]
    config, params = checkpoint.load(folder, dtype=np.float32)
    params = jax.device_put(params)
    ones = np.ones_like(tokens)
    with jax.default_matmul_precision("highest"):
        hidden = model.hidden_states(
            params, config, jnp.asarray(tokens), jnp.asarray(ones), dtype=jnp.float32
        )
        ours = np.asarray(model.logits(params, config, hidden))[..., :VOCAB]
    del params, hidden
    jax.clear_caches()

    import torch
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = False
    theirs_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).to("cuda")
    with torch.no_grad():
        found = theirs_model(torch.as_tensor(tokens, dtype=torch.long, device="cuda")).logits
    theirs = found[..., :VOCAB].float().cpu().numpy()
    log_ours, log_theirs = (log_softmax(x, axis=-1) for x in (ours, theirs))
    divergence = (np.exp(log_theirs) * (log_theirs - log_ours)).sum(-1)
    console.print(
        f"transformers {transformers.__version__}: {theirs.shape} logits, spread "
        f"{theirs.std():.3f}, largest difference {np.abs(ours - theirs).max():.2e}, largest KL "
        f"{divergence.max():.2e}, same argmax {np.mean(ours.argmax(-1) == theirs.argmax(-1)):.4%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--corpus-bytes", type=int, default=40_000_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--stage", choices=STAGES, help="This one alone, in this process.")
    options = parser.parse_args()
    if options.stage is None:
        # Each in a process of its own, as JAX and PyTorch do not give memory back.
        for stage in STAGES:
            command = [sys.executable, "-m", "benchmarks.student_2b", *sys.argv[1:]]
            subprocess.run([*command, "--stage", stage], check=True)
        return
    console = Console(width=200)
    console.print(f"{options.stage}: {jax.devices()}, jax {jax.__version__}")
    if options.stage == "store":
        make_store(options.out, options.corpus, options.corpus_bytes, console)
        found = summary(str(options.out / "train.zarr"), "default")
        console.print(
            f"{found.tokens:,} tokens, {found.entries_per_token:.2f} entries and "
            f"{sum(found.array_bytes.values()) / found.tokens:.2f} bytes a token"
        )
    elif options.stage == "student":
        train_student(options.out, options.out / TOKENIZER, options, console)
    else:
        compare_with_transformers(options.out, 2, console)


if __name__ == "__main__":
    main()
