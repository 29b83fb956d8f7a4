"""What float8 does to a teacher: its distributions beside those of bfloat16 and float32.

`python -m benchmarks.float8_error --store S --teacher DIR --rows 16` reads rows of a store and sums
over the whole vocabulary, at every predicted position: the KL from the first to the second of each
pair, how often both have the same likeliest id, and each one's loss on the store's next tokens.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2 import checkpoint
from gemma2.attention import resolve
from gemma2.float8 import quantize_layers
from gemma2.model import Execution, Params, hidden_states, logits
from logit_store.layout import predicted_mask
from logit_store.reader import TokensReader
from schemas.model import ModelConfig
from teacher_dump.teacher import tile_tokens

PAIRS = (("float32", "bfloat16"), ("float32", "float8"), ("bfloat16", "float8"))
DTYPES = ("float32", "bfloat16", "float8")


def load(folder: Path, dtype: str) -> tuple[ModelConfig, Params]:
    config, params = checkpoint.load(folder, "float32" if dtype == "float32" else "bfloat16")
    if dtype == "float8":
        params["pairs"] = quantize_layers(params["pairs"])
    return config, params


@partial(jax.jit, static_argnames=("config", "vocab"))
def compare(
    models: dict[str, Params],
    tokens: jax.Array,
    segments: jax.Array,
    predicted: jax.Array,
    *,
    config: ModelConfig,
    vocab: int,
) -> dict[str, jax.Array]:
    """Sums over the predicted positions of a batch of rows."""
    size = tile_tokens(tokens.shape[1])
    hidden = {}
    for dtype, params in models.items():
        compute = jnp.dtype("float32" if dtype == "float32" else "bfloat16")
        kernel = resolve("auto", config, jax.local_devices()[0], dtype=compute, backward=False)
        found = hidden_states(
            params, config, tokens, segments, dtype=compute, execution=Execution(kernel)
        )
        hidden[dtype] = found.reshape(-1, size, found.shape[-1])
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))).reshape(-1, size)

    def one_tile(item: Any) -> dict[str, jax.Array]:
        states, is_predicted, label = item
        log_p = {
            dtype: jax.nn.log_softmax(logits(models[dtype], config, states[dtype])[:, :vocab])
            for dtype in DTYPES
        }
        found = {}
        for one, other in PAIRS:
            p, q = log_p[one], log_p[other]
            found[f"kl {one} {other}"] = jnp.sum(jnp.exp(p) * (p - q), axis=1)
            found[f"same {one} {other}"] = jnp.argmax(p, axis=1) == jnp.argmax(q, axis=1)
        for dtype, scores in log_p.items():
            found[f"loss {dtype}"] = -jnp.take_along_axis(scores, label[:, None], axis=1)[:, 0]
        found["entropy"] = -jnp.sum(jnp.exp(log_p["float32"]) * log_p["float32"], axis=1)
        return {
            name: jnp.sum(jnp.where(is_predicted, x.astype(jnp.float32), 0.0))
            for name, x in found.items()
        }

    sums = jax.lax.map(one_tile, (hidden, predicted.reshape(-1, size), labels))
    return jax.tree.map(jnp.sum, sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    models, config = {}, checkpoint.load_config(options.teacher)
    for dtype in DTYPES:
        _, models[dtype] = load(options.teacher, dtype)
    reader = TokensReader(options.store)
    chosen = np.random.default_rng(0).permutation(reader.manifest.num_sequences)[: options.rows]
    total: dict[str, float] = {}
    count = 0
    # Float32 products of a GPU are of TF32 numbers unless it is told otherwise.
    with jax.default_matmul_precision("highest"):
        for rows in np.array_split(np.sort(chosen), -(-len(chosen) // options.batch)):
            found = reader.rows(rows)
            segments = found.segment_ids.astype(np.int32)
            predicted = predicted_mask(segments)
            sums = compare(
                models,
                jnp.asarray(found.tokens),
                jnp.asarray(segments),
                jnp.asarray(predicted),
                config=config,
                vocab=reader.manifest.tokenizer.vocab_size,
            )
            count += int(predicted.sum())
            for name, value in sums.items():
                total[name] = total.get(name, 0.0) + float(value)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {count:,} positions")
    print(f"entropy {total['entropy'] / count:.4f} nats")
    for dtype in DTYPES:
        print(f"loss of {dtype}: {total[f'loss {dtype}'] / count:.5f} nats")
    for one, other in PAIRS:
        print(
            f"{one} to {other}: KL {total[f'kl {one} {other}'] / count:.2e} nats, same likeliest "
            f"id {total[f'same {one} {other}'] / count:.3%}"
        )


if __name__ == "__main__":
    main()
