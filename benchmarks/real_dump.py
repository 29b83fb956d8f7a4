"""A dump of real text by a real, small teacher, by the package's own commands, and looked at.

`python -m benchmarks.real_dump --corpus PATH... --out DIR` takes source and text files under the
paths, trains a tokenizer and a teacher of 90 million parameters on them, and runs the package's own
commands: tokenize in processes, dump, verify, verify --teacher. Then it dumps a part again in
float8 and in processes that claim the GPU, and with transformers if that is installed, and tells
what became of the targets. Wants a GPU; stages that were done are reused when it is run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Verbs run one after the other beside this process, which needs little.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.student_2b import write_corpus
from schemas.model import ModelConfig
from teacher_dump import tokenizer as tokenizers

LENGTH, VOCAB = 4096, 16_384
TEACHER = ModelConfig(
    vocab_size=VOCAB,
    d_model=768,
    num_layers=8,
    mlp_width=3072,
    num_heads=6,
    num_kv_heads=3,
    head_size=128,
    query_scalar=128,
    window_tokens=1024,
    max_tokens=LENGTH,
)
TOKENIZER_BYTES = 8_000_000


def retort(*arguments: str | Path) -> str:
    """Run a verb, print its last lines and what it took; its output."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    print(f"$ retort {' '.join(map(str, arguments))}  [{time.perf_counter() - start:.1f} s]")
    print("\n".join(f"    {line}" for line in said.splitlines()[-6:]), flush=True)
    if done.returncode:
        print(f"    exit status {done.returncode}", flush=True)
    return said


def prepare(out: Path, paths: list[str], limit_bytes: int, steps: int, workers: int) -> None:
    """Corpus, tokenizer, tokens and teacher."""
    write_corpus(paths, out / "corpus", limit_bytes)
    text, model = out / "corpus" / "train.jsonl", out / "tokenizer.model"
    if not model.exists():
        lines, size = [], 0
        for line in text.open():
            lines.append(json.loads(line)["text"])
            size += len(line)
            if size > TOKENIZER_BYTES:
                break
        tokenizers.train(iter(lines), model, vocab_size=VOCAB)
    engine = ["--runner", "processes", "--workers", workers]
    for name, size in (("store", 256), ("part", 64)):
        corpus = text if name == "store" else out / "corpus" / "heldout.jsonl"
        retort(
            *("tokenize", "--store", out / name, "--corpus.paths", corpus),
            *("--tokenizer", model, "--sequence_tokens", LENGTH, "--shard_sequences", size),
            *engine,
        )
    shape = out / "teacher.json"
    shape.write_text(TEACHER.model_dump_json())
    retort(
        *("train", "--store", out / "store", "--out", out / "teacher", "--model", shape),
        *("--tokenizer", model, "--targets", "none", "--steps", steps, "--batch_sequences", 16),
        *("--remat", "dots", "--optimizer.learning_rate", "1e-3", "--loss_chunk_tokens", 8192),
        *("--optimizer.schedule.warmup_steps", steps // 10, "--checkpoint_every", steps),
    )


def look(out: Path, batch: int) -> None:
    """Dump, and look at the dump."""
    teacher, store, part = out / "teacher" / "export", out / "store", out / "part"
    with_teacher = ["--teacher", teacher]
    retort("dump", "--store", store, *with_teacher, "--batch_sequences", batch)
    retort("verify", store)
    retort("verify", store, *with_teacher, "--rows", 32)
    retort("inspect", store)
    # On held-out text: the same, to the bit, by a process that claims its GPU; then other numbers.
    same = ["dump", "--store", part, *with_teacher, "--batch_sequences", 8, "--sampler.points", 24]
    retort(*same, "--name", "memory")
    retort(*same, "--name", "claimed", "--runner", "processes", "--workers", 1)
    print(f"    the same bytes: {digests(part, 'memory') == digests(part, 'claimed')}", flush=True)
    retort(*same, "--name", "float8", "--dtype", "float8")
    retort(*same, "--name", "torch", "--backend", "transformers")
    for name in ("memory", "float8", "torch"):
        retort("verify", part, *with_teacher, "--targets", name, "--rows", 16)


def digests(store: Path, name: str) -> dict[str, bytes]:
    """The bytes of a set's arrays, by file."""
    folder = store / "targets" / name
    files = [file for file in folder.rglob("c/**/*") if file.is_file()]
    if not files:
        raise SystemExit(f"{folder} must hold targets, but it holds none.")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--corpus-bytes", type=int, default=200_000_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200, help="of the teacher")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch of the dump")
    parser.add_argument("--again", action="store_true", help="Leave nothing of an earlier run.")
    options = parser.parse_args()
    if options.again:
        shutil.rmtree(options.out, ignore_errors=True)
    prepare(options.out, options.corpus, options.corpus_bytes, options.steps, options.workers)
    look(options.out, options.batch)


if __name__ == "__main__":
    main()
