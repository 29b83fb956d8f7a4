"""Train a small teacher with a full-size vocabulary, for measurements on real distributions.

`python -m benchmarks.small_teacher --text train.jsonl.xz --heldout heldout.jsonl --tokenizer
tokenizer.model --out DIR --minutes 7` wants a GPU: the vocabulary head of 256k ids is most of the
work. It leaves a Hugging Face folder in DIR/model and, in DIR/states, what the other benchmarks
read: the held-out tokens' final hidden states and the embedding table, both as int8 with a scale
per row (that *is* the teacher there: softmax of their product), so that its exact distributions
can be had on any machine.
"""

import argparse
import json
import lzma
import math
import multiprocessing
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma2 import checkpoint, model
from logit_store.layout import predicted_mask
from schemas.model import ModelConfig
from student_train.loss import Head, Targets, sparse_target_loss
from teacher_dump.packing import pack
from teacher_dump.tokenizer import Tokenizer

ROW_TOKENS = 2048
BATCH_ROWS = 16
PEAK_RATE = 1.5e-3
WARMUP_STEPS = 100
CHUNK_TOKENS = 4096


def config(vocab_size: int, d_model: int, num_layers: int) -> ModelConfig:
    """Gemma 2 in small; the vocabulary is rounded up to a multiple of 128."""
    return ModelConfig(
        vocab_size=-(-vocab_size // 128) * 128,
        d_model=d_model,
        num_layers=num_layers,
        mlp_width=4 * d_model,
        num_heads=4,
        num_kv_heads=2,
        head_size=128,
        query_scalar=128,
        window_tokens=1024,
        max_tokens=ROW_TOKENS,
    )


def read_texts(path: str, megabytes: float) -> list[str]:
    """The first texts of a JSONL file (.xz or plain), up to about so many megabytes."""
    texts, total = [], 0
    with (lzma.open if path.endswith(".xz") else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            total += len(texts[-1])
            if total >= megabytes * 1e6:
                break
    return texts


def encode(path: str, texts: list[str]) -> list[np.ndarray]:
    tokenizer = Tokenizer.load(path)
    return [tokenizer.encode_document(text) for text in texts]


def rows_of(path: str, texts: list[str], processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed tokens int32 [R, ROW_TOKENS] and segment ids."""
    pieces = [texts[i::256] for i in range(256)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        documents = [d for part in pool.imap(partial(encode, path), pieces) for d in part]
    return pack(documents, ROW_TOKENS, pad_id=Tokenizer.load(path).info.pad_id)


def label_targets(tokens: jax.Array, segments: jax.Array) -> Targets:
    rows, _ = tokens.shape
    same = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != 0)
    none = jnp.zeros((rows, 0), jnp.int32)
    weight = jnp.pad(same, ((0, 0), (0, 1))).astype(jnp.float32)
    labels = jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    return Targets(labels, weight, none, none, none.astype(jnp.float32), weight)


def mean_loss(params: Any, shape: ModelConfig, head: Head, tokens: Any, segments: Any) -> Any:
    """Nats per predicted token of a batch."""
    hidden = model.hidden_states(params, shape, tokens, segments, dtype=jnp.bfloat16, remat="full")
    targets = label_targets(tokens, segments)
    losses = sparse_target_loss(hidden, model.embedding(params), targets, head)
    return losses.loss / jnp.maximum(jnp.sum(targets.label_weight), 1.0)


def train(
    shape: ModelConfig,
    valid: int,
    tokens: np.ndarray,
    segments: np.ndarray,
    seconds: float,
    seed: int,
):
    """Parameters after about `seconds` of AdamW; the schedule is a function of elapsed time."""
    head = Head(valid, shape.final_cap, block_tokens=1, chunk_tokens=CHUNK_TOKENS)
    optimizer = optax.inject_hyperparams(
        lambda rate: optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
        )
    )(rate=0.0)
    params = model.init_params(shape, jax.random.key(seed))
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: Any, row_segments: Any, rate: Any):
        loss, gradients = jax.value_and_grad(mean_loss)(params, shape, head, rows, row_segments)
        state.hyperparams["rate"] = rate
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    order = np.random.default_rng(seed).permutation(len(tokens))
    start = time.monotonic()
    begun, losses, number = start, [], 0
    while True:
        if number == 3:
            begun = time.monotonic()  # compilation is not training
        done = (time.monotonic() - begun) / seconds if number >= 3 else 0.0
        if done >= 1.0 or (number + 1) * BATCH_ROWS > len(order) * 4:
            break
        rows = order[np.arange(number * BATCH_ROWS, (number + 1) * BATCH_ROWS) % len(order)]
        rate = PEAK_RATE * min(1.0, (number + 1) / WARMUP_STEPS)
        rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        params, state, loss = step(
            params, state, tokens[rows], segments[rows].astype(np.int32), np.float32(rate)
        )
        losses.append(loss)
        number += 1
        if number % 10 == 0:
            loss.block_until_ready()  # bounds what is in flight, so that time is told truly
        if number % 100 == 0:
            rate_tokens = number * BATCH_ROWS * ROW_TOKENS / (time.monotonic() - start)
            print(f"step {number} loss {float(loss):.4f} tokens/s {rate_tokens:,.0f}", flush=True)
    print(
        f"{number} steps, {number * BATCH_ROWS * ROW_TOKENS:,} tokens, "
        f"{number * BATCH_ROWS / len(order):.2f} epochs, "
        f"{time.monotonic() - start:.0f} s",
        flush=True,
    )
    return params


def int8_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 of the shape of `values` [R, D] and float32 scales [R] with values ≈ int8 · scale."""
    values = np.asarray(values, np.float32)
    scale = np.maximum(np.abs(values).max(axis=1), 1e-12) / 127
    return np.round(values / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--heldout_tokens", type=int, default=12 * 8192)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()

    begun = time.monotonic()
    vocab_size = Tokenizer.load(arguments.tokenizer).info.vocab_size
    shape = config(vocab_size, arguments.d_model, arguments.num_layers)
    texts = read_texts(arguments.text, arguments.megabytes)
    tokens, segments = rows_of(arguments.tokenizer, texts, arguments.processes)
    text_bytes = sum(len(text.encode()) for text in texts)
    print(
        f"{len(texts):,} documents, {text_bytes:,} bytes, {tokens.size:,} tokens "
        f"({text_bytes / tokens.size:.2f} bytes each), {model.num_parameters(shape):,} parameters, "
        f"{time.monotonic() - begun:.0f} s to tokenize",
        flush=True,
    )
    params = train(shape, vocab_size, tokens, segments, arguments.minutes * 60, arguments.seed)

    kept = arguments.heldout_tokens // ROW_TOKENS
    held, held_segments = rows_of(
        arguments.tokenizer, read_texts(arguments.heldout, 1000), arguments.processes
    )
    held, held_segments = held[:kept], held_segments[:kept]
    forward = jax.jit(
        lambda rows, s: model.hidden_states(params, shape, rows, s, dtype=jnp.bfloat16)
    )
    hidden = np.concatenate(
        [
            np.asarray(forward(held[i : i + 4], held_segments[i : i + 4].astype(np.int32)))
            for i in range(0, kept, 4)
        ]
    ).reshape(-1, shape.d_model)
    states = arguments.out / "states"
    states.mkdir(parents=True, exist_ok=True)
    table, table_scale = int8_rows(model.embedding(params)[:vocab_size])
    hidden8, hidden_scale = int8_rows(hidden)
    exact = quality(hidden, model.embedding(params)[:vocab_size], shape, held, held_segments)
    rounded = quality(
        hidden8 * hidden_scale[:, None], table * table_scale[:, None], shape, held, held_segments
    )
    counts = np.bincount(tokens[segments > 0], minlength=vocab_size).astype(np.int32)
    for name, values in {
        "table": table, "table_scale": table_scale, "hidden": hidden8,
        "hidden_scale": hidden_scale, "tokens": held, "segment_ids": held_segments,
        "counts": counts,
    }.items():  # fmt: skip
        np.save(states / f"{name}.npy", values)
    report = {
        "final_cap": shape.final_cap,
        "training_tokens": int((segments > 0).sum()),
        "nats_entropy": exact,
        "nats_entropy_as_int8": rounded,
    }
    (states / "about.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report), flush=True)
    checkpoint.save(arguments.out / "model", shape, params)


def quality(
    hidden: Any, table: Any, shape: ModelConfig, tokens: np.ndarray, segments: np.ndarray
) -> tuple[float, float]:
    """(nats per predicted token, mean entropy) of the softmax of hidden · table."""

    @jax.jit
    def block(states: Any, table: Any, labels: Any):
        scores = jnp.einsum("td,vd->tv", states, table, preferred_element_type=jnp.float32)
        log_p = jax.nn.log_softmax(shape.final_cap * jnp.tanh(scores / shape.final_cap))
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=1)
        return jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0], entropy

    table = jnp.asarray(table, jnp.bfloat16)
    labels = np.roll(tokens, -1, axis=1).reshape(-1)
    mask = predicted_mask(segments).reshape(-1)
    found = [
        block(jnp.asarray(hidden[i : i + 1024], jnp.bfloat16), table, labels[i : i + 1024])
        for i in range(0, len(labels), 1024)
    ]
    nats = np.concatenate([np.asarray(f[0]) for f in found])
    entropy = np.concatenate([np.asarray(f[1]) for f in found])
    return float(-nats[mask].mean()), float(entropy[mask].mean())


if __name__ == "__main__":
    main()
