"""What sampling costs on an accelerator, beside a 9B teacher's forward pass at a 256k vocabulary.

`python -m benchmarks.sampling_cost` wants a GPU of 40 GB. Everything is the dump's own code on
random weights of the real shapes; scores have the spread that gives an entropy of about 3.5 nats.
Times are medians of whole calls in microseconds a token. "head" is the matrix product with the
soft-cap, its scores written to memory, which a forward pass pays anyway; what a sampler adds is
its time less that. It is compared with this package's forward pass, and with the fastest one known
of a 9B teacher on one H200, 36.3 us a token with head and log-softmax (transformers,
FlashAttention-4, torch.compile).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2.model import hidden_states, init_params, logits
from gemma2.presets import PRESETS
from schemas.manifest import SamplerSpec
from teacher_dump import teacher

FASTEST_FORWARD_US = 36.3
VOCAB = 256_000
# Standard deviation of Gaussian scores over V ids with entropy ln V - sd^2 / 2 = 3.5 nats.
SPREAD = 4.2


def microseconds(run: Callable[..., Any], arguments: tuple[Any, ...], tokens: int) -> float:
    """Median time a token of five calls, after two that compile and warm up."""
    for _ in range(2):
        jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times) / tokens * 1e6


def head_only(params: Any, config: Any, hidden: jax.Array, log_total: bool) -> jax.Array:
    """The scores of each tile, written and not used; or their log-sum-exp."""

    def one_tile(states: jax.Array) -> jax.Array:
        scores = jax.lax.optimization_barrier(logits(params, config, states))
        return jax.nn.logsumexp(scores, axis=1) if log_total else scores[:, 0]

    return jax.lax.map(
        one_tile, hidden.reshape(-1, teacher.tile_tokens(hidden.shape[1]), hidden.shape[2])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--sequence_tokens", type=int, default=8192)
    parser.add_argument(
        "--layers", type=int, default=42, help="Fewer for a machine with less memory."
    )
    arguments = parser.parse_args()
    config = PRESETS["gemma2-9b"].model_copy(update={"num_layers": arguments.layers})
    shape = (arguments.sequences, arguments.sequence_tokens)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCAB)
    segments = jnp.ones(shape, jnp.int32)
    predicted = jnp.ones(shape, bool).at[:, -1].set(False)
    rows = jnp.arange(shape[0], dtype=jnp.int32)
    hidden = jax.random.normal(jax.random.key(2), (*shape, config.d_model), jnp.bfloat16)
    table = jax.random.normal(jax.random.key(3), (config.vocab_size, config.d_model), jnp.bfloat16)
    table = (table * (SPREAD / config.d_model**0.5)).astype(jnp.bfloat16)
    head = {"embedding": table[: -(-VOCAB // teacher.CHUNK) * teacher.CHUNK]}

    def timed(name: str, run: Callable[..., Any], *inputs: Any) -> float:
        found = microseconds(run, inputs, tokens.size)
        print(json.dumps({"what": name, "us_per_token": round(found, 3)}), flush=True)
        return found

    def only(params: Any, states: jax.Array, log_total: bool) -> jax.Array:
        return head_only(params, config, states, log_total)

    base = timed("head", jax.jit(partial(only, log_total=False)), head, hidden)
    timed("head and log-sum-exp", jax.jit(partial(only, log_total=True)), head, hidden)
    added = {}
    for name, points, slots in (
        ("systematic", 24, 18),
        ("systematic", 76, 18),
        ("systematic", 300, 84),
        ("multinomial", 27, 18),
        ("multinomial", 50, 18),
    ):
        spec = SamplerSpec(name=name, points=points, slots_per_token=slots, block_tokens=1024)

        def sample(params: Any, states: jax.Array, key: jax.Array, spec: SamplerSpec = spec) -> Any:
            return teacher.sample_rows(
                params, config, states, tokens, predicted, rows, key, spec, VOCAB
            )

        what = f"head and {name}, {points} points"
        added[what] = timed(what, jax.jit(sample), head, hidden, jax.random.key(4)) - base

    del head, table
    params = init_params(config, jax.random.key(0), jnp.bfloat16)

    def forward(params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return hidden_states(params, config, tokens, segments, dtype=jnp.bfloat16)

    layers = timed("layers", jax.jit(forward), params, tokens, segments)
    for what, cost in added.items():
        print(
            f"{what}: adds {cost:.2f} us a token, {cost / (layers + base):.1%} of this forward "
            f"pass ({layers + base:.1f} us), {cost / FASTEST_FORWARD_US:.1%} of the fastest"
        )
    print(jax.devices()[0].device_kind, jax.__version__)


if __name__ == "__main__":
    main()
