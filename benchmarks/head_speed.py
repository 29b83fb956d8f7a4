"""The vocabulary head with its sparse-target loss, forward and backward, beside its three products.

`python -m benchmarks.head_speed` wants a GPU of 80 GB; `--tokens 256 --vocab 1000 --width 64` tries
it on any machine. The *floor* is what three products of [tokens, width] with [vocab, width] take at
the rate of a square product of 8192, measured in the same run. Times are medians: `ms` of one of
four calls in a row, as no training step waits for its head; `waited_ms` of calls that each end
before the next begins, with what the host does for each. `extra` is what the compiled function
needs besides its arguments, gradients included. `table` is the type of the table that is given and
of its gradient that is returned: float32 as in the trainer, where a copy in bfloat16 is part of
what is timed and counted, or bfloat16 as in peers. Sums over chunks are float32 with either. The
errors are relative norms of the difference from a dense float32 computation on the rounded table.
Peers in PyTorch run if it is installed.

`--trials` first times the two fused kernels alone beside XLA's products of the same size, cut in
several ways. `{"cluster": 1}` and the like, fields of `hopper_product.Tiles`, are tried instead if
given.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma2 import attention
from schemas.errors import ConfigError
from student_train import head_hopper
from student_train.hopper_product import Tiles
from student_train.loss import Head, Targets, resolve_kernel, sparse_target_loss

CAP = 30.0
BLOCK_TOKENS = 64
ALPHA = 0.9
# Standard deviation of Gaussian scores over V ids with entropy ln V - sd^2 / 2 = 3.5 nats.
SPREAD = 4.2
GIB = 2**30
TABLES = ("float32", "bfloat16")
TRIALS = (
    Tiles(),
    Tiles(cluster=1),
    Tiles(stages=4),
    Tiles(rows=64, columns=128),
    Tiles(rows=64, columns=256, stages=4),
    Tiles(rows=64, columns=256, stages=4, cluster=1),
    Tiles(rows=64, columns=192, stages=5),
    Tiles(rows=64, columns=192, stages=5, cluster=1),
)


def milliseconds(run: Callable[[], Any], finish: Callable[[Any], Any], calls: int) -> float:
    """Median over `calls`, after two that compile and warm up."""
    for _ in range(2):
        finish(run())
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        finish(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def in_a_row(
    run: Callable[[], Any], finish: Callable[[Any], Any], calls: int, count: int = 4
) -> float:
    """Milliseconds of one of `count` runs that wait for nothing in between."""

    def several() -> Any:
        # Results are dropped at once, so that only a few exist.
        for _ in range(count - 1):
            run()
        return run()

    return milliseconds(several, finish, calls) / count


def product_rate(size: int, calls: int) -> float:
    """FLOP/s of a square product in bfloat16, from eight in a row: no launch is waited for."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    right = right * jnp.bfloat16(size**-0.5)

    @jax.jit
    def chain(left: jax.Array, right: jax.Array) -> jax.Array:
        for _ in range(8):
            left = left @ right
        return left

    found = milliseconds(lambda: chain(left, right), jax.block_until_ready, calls)
    return 8 * 2 * size**3 / (found / 1e3)


def make_targets(tokens: int, vocab: int, mean_entries: int) -> Targets:
    """One row; counts differ from token to token, and a block's slots are all but filled."""
    random = np.random.default_rng(0)
    slots = BLOCK_TOKENS * mean_entries
    ids, positions, weights = [], [], []
    for first in range(0, tokens, BLOCK_TOKENS):
        counts = random.multinomial(slots - 3, np.ones(BLOCK_TOKENS) / BLOCK_TOKENS)
        for token, count in enumerate(counts):
            ids.append(np.sort(random.choice(vocab, count, replace=False)))
            positions.append(np.full(count, first + token))
            weights.append(random.dirichlet(np.full(count, 0.3)) if count else np.zeros(0))
        ids.append(np.full(3, -1))
        positions.append(np.full(3, first + BLOCK_TOKENS - 1))
        weights.append(np.zeros(3))
    entry_id = np.concatenate(ids).astype(np.int32)
    position = np.concatenate(positions).astype(np.int32)
    labels = random.integers(0, vocab, tokens).astype(np.int32)
    # Every second token's label is one of its entries, as it usually is.
    used = (entry_id >= 0) & (position % 2 == 0)
    labels[position[used]] = entry_id[used]
    return jax.tree.map(
        lambda array: jnp.asarray(array)[None],
        Targets(
            labels=labels,
            label_weight=np.full(tokens, 1 - ALPHA, np.float32),
            entry_id=entry_id,
            entry_position=position,
            entry_weight=np.concatenate(weights).astype(np.float32),
            entry_scale=np.full(tokens, ALPHA, np.float32),
        ),
    )


def padded_entries(targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """(int32 ids, float32 weights) [tokens, most entries + 1]: a p̂, and last the label's weight.

    The loss is then Σ p · (logsumexp(s) - s) over all of them, which is how peers compute it.
    """
    entry_id, position, weight = (
        np.asarray(array[0])
        for array in (targets.entry_id, targets.entry_position, targets.entry_weight)
    )
    tokens = targets.labels.shape[1]
    used = entry_id >= 0
    entry_id, position, weight = entry_id[used], position[used], weight[used]
    counts = np.bincount(position, minlength=tokens)
    rank = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.zeros((tokens, counts.max() + 1), np.int32)
    weights = np.zeros(ids.shape, np.float32)
    ids[position, rank] = entry_id
    weights[position, rank] = weight * np.asarray(targets.entry_scale[0])[position]
    ids[:, -1] = np.asarray(targets.labels[0])
    weights[:, -1] = np.asarray(targets.label_weight[0])
    return ids, weights


@partial(jax.jit, static_argnums=4)
def reference(
    hidden: jax.Array, table: jax.Array, ids: jax.Array, weights: jax.Array, valid: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, its gradients to `hidden` and `table`), all in float32; 128 rows of logits at once."""
    rows = min(128, hidden.shape[0])

    def loss(hidden: jax.Array, table: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        logits = jnp.einsum("cd,vd->cv", hidden, table, precision=lax.Precision.HIGHEST)
        scores = (CAP * jnp.tanh(logits / CAP))[:, :valid]
        surprise = jax.nn.logsumexp(scores, axis=1)[:, None] - jnp.take_along_axis(
            scores, ids, axis=1
        )
        return jnp.sum(weights * surprise)

    def step(table_gradient: jax.Array, part: Any) -> tuple[jax.Array, Any]:
        value, (dx, dw) = jax.value_and_grad(loss, argnums=(0, 1))(part[0], table, *part[1:])
        return table_gradient + dw, (value, dx)

    parts = jax.tree.map(
        lambda array: array.reshape(-1, rows, *array.shape[1:]),
        (hidden.astype(jnp.float32), ids, weights),
    )
    dw, (values, dx) = lax.scan(step, jnp.zeros(table.shape, jnp.float32), parts)
    return jnp.sum(values), dx.reshape(hidden.shape), dw


@jax.jit
def difference(actual: jax.Array, expected: jax.Array) -> jax.Array:
    """Norm of the difference over the norm of what is expected."""
    gap = actual.astype(jnp.float32).reshape(expected.shape) - expected
    return jnp.linalg.norm(gap) / jnp.linalg.norm(expected)


def errors(found: Any, expected: Any) -> dict[str, float]:
    return {
        name: float(f"{float(difference(actual, wanted)):.2g}")
        for name, actual, wanted in zip(("loss", "dx", "dw"), found, expected, strict=True)
    }


def retort(
    hidden: jax.Array, table: jax.Array, targets: Targets, head: Head, calls: int, hlo: str | None
) -> tuple[dict[str, Any], Any]:
    """(measured, (loss, dx, dw)) of this package's loss."""

    @jax.jit
    def both(hidden: jax.Array, table: jax.Array, targets: Targets) -> Any:
        def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
            return sparse_target_loss(hidden, table, targets, head).loss

        value, (dx, dw) = jax.value_and_grad(loss, argnums=(0, 1))(hidden, table)
        return value, dx, dw

    # Here and not in the call, where it would be a program of its own.
    hidden = hidden[None]
    compiled = both.lower(hidden, table, targets).compile()
    if hlo:
        with open(f"{hlo}.{head.kernel}.{head.chunk_tokens}.{table.dtype}.txt", "w") as file:
            file.write(compiled.as_text())
    memory = compiled.memory_analysis()

    def run() -> Any:
        return compiled(hidden, table, targets)

    measured = {
        "ms": round(in_a_row(run, jax.block_until_ready, calls), 2),
        "waited_ms": round(milliseconds(run, jax.block_until_ready, calls), 2),
        "extra_gib": round((memory.temp_size_in_bytes + memory.output_size_in_bytes) / GIB, 2),
        "temp_gib": round(memory.temp_size_in_bytes / GIB, 2),
    }
    return measured, run()


def trials(
    hidden: jax.Array, table: jax.Array, valid: int, tries: Iterable[Tiles], calls: int
) -> Iterator[dict[str, Any]]:
    """Both kernels for the rows of `hidden`, each beside XLA's product of the same size."""
    table = table.astype(jnp.bfloat16)
    operations = 2 * hidden.shape[0] * hidden.shape[1] * table.shape[0]

    @jax.jit
    def plain_scores(hidden: jax.Array, table: jax.Array) -> Any:
        logits = jnp.einsum("cd,vd->cv", hidden, table, preferred_element_type=jnp.float32)
        ratio = jnp.tanh(logits / CAP)
        known = jnp.arange(len(table)) < valid
        exponential = jnp.where(known[None], jnp.exp(CAP * ratio), 0.0)
        return (1 - ratio * ratio) * exponential, jnp.sum(exponential, axis=1)

    def scores(hidden: jax.Array, table: jax.Array, tiles: Tiles) -> Any:
        return head_hopper.scores(hidden, table, jnp.int32(valid), cap=CAP, tiles=tiles)

    def plain_gradient(unnormalised: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.einsum("cv,vd->cd", unnormalised, table, preferred_element_type=jnp.float32)

    def gradient(unnormalised: jax.Array, table: jax.Array, tiles: Tiles) -> jax.Array:
        return head_hopper.hidden_gradient(unnormalised, table, tiles=tiles)

    unnormalised = plain_scores(hidden, table)[0].astype(jnp.bfloat16)
    for kernel, plain, run, left in (
        ("scores", plain_scores, scores, hidden),
        ("hidden gradient", jax.jit(plain_gradient), gradient, unnormalised),
    ):

        def timed(run: Callable[..., Any], left: jax.Array = left) -> dict[str, Any]:
            found = in_a_row(lambda: run(left, table), jax.block_until_ready, calls)
            return {"ms": round(found, 3), "tflops": round(operations / found / 1e9, 1)}

        product = jax.jit(plain_gradient if left is unnormalised else lambda x, w: x @ w.T)
        yield {"what": kernel, "tiles": "XLA's product alone"} | timed(product)
        wanted = plain(left, table)
        for tiles in tries:
            compiled = jax.jit(partial(run, tiles=tiles))
            try:
                gaps = jax.tree.map(difference, compiled(left, table), wanted)
                measured = timed(compiled) | {
                    "errors": [float(f"{float(gap):.2g}") for gap in jax.tree.leaves(gaps)]
                }
            except (ValueError, RuntimeError) as error:
                measured = {"ms": f"{type(error).__name__}: {str(error)[:300]}"}
            yield {"what": kernel, "tiles": dataclasses.asdict(tiles)} | measured


def peers(
    hidden: jax.Array, table: jax.Array, targets: Targets, calls: int
) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(name, measured, (loss, dx, dw) or None where the peer's loss is another) of each peer."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    jax.block_until_ready((hidden, table))
    x = torch.from_dlpack(hidden).clone().requires_grad_()
    w = torch.from_dlpack(table.astype(jnp.bfloat16)).clone().requires_grad_()
    ids, weights = (torch.tensor(array, device="cuda") for array in padded_entries(targets))
    ids = ids.long()
    labels = torch.tensor(np.asarray(targets.labels[0]), device="cuda").long()

    def dense(x: Any, ids: Any, weights: Any) -> Any:
        scores = CAP * torch.tanh((x @ w.t()).float() / CAP)
        surprise = torch.logsumexp(scores, -1)[:, None] - scores.gather(1, ids)
        return (weights * surprise).sum()

    compiled = torch.compile(dense)

    def chunked(rows: int) -> Any:
        total = 0
        for first in range(0, len(x), rows):
            part = slice(first, first + rows)
            loss = compiled(x[part], ids[part], weights[part])
            loss.backward()
            total = total + loss.detach()
        return total

    def whole(loss: Callable[[], Any]) -> Any:
        value = loss()
        value.backward()
        return value.detach()

    runs: dict[str, tuple[Callable[[], Any], bool]] = {
        "torch.compile, whole": (partial(chunked, len(x)), True),
        "torch.compile, chunks of 1024": (partial(chunked, 1024), True),
        "torch.compile, chunks of 2048": (partial(chunked, 2048), True),
    }
    try:
        from cut_cross_entropy import linear_cross_entropy

        runs["Apple CCE, labels alone"] = (
            partial(
                whole, lambda: linear_cross_entropy(x, w, labels, softcap=CAP, reduction="sum")
            ),
            False,
        )
    except ImportError:
        pass
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(softcap=CAP, reduction="sum")
        runs["Liger, labels alone"] = (partial(whole, lambda: liger(w, x, labels)), False)
    except ImportError:
        pass

    for name, (run, is_same_loss) in runs.items():

        def once(run: Callable[[], Any] = run) -> Any:
            x.grad = w.grad = None
            return run()

        def finish(_: Any) -> None:
            torch.cuda.synchronize()

        try:
            milliseconds(once, finish, 1)
            x.grad = w.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found, waited = (time_of(once, finish, calls) for time_of in (in_a_row, milliseconds))
        except torch.cuda.OutOfMemoryError:
            yield name, {"ms": "out of memory"}, None
            continue
        extra = (torch.cuda.max_memory_allocated() - before) / GIB
        loss = once()
        finish(None)
        result = None
        if is_same_loss:
            result = (
                jnp.float32(loss.item()),
                jnp.from_dlpack(x.grad.detach()),
                jnp.from_dlpack(w.grad.detach()),
            )
        measured = {"ms": found, "waited_ms": waited, "extra_gib": extra}
        yield name, {key: round(value, 2) for key, value in measured.items()}, result


def tiles(text: str) -> Tiles:
    try:
        return Tiles(**json.loads(text))
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(Tiles))
        raise argparse.ArgumentTypeError(
            f"tiles are a JSON object of {known}, but got {text!r}"
        ) from error


def main() -> None:
    # PyTorch needs its part of the memory too; read when JAX first touches the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=256_000)
    parser.add_argument("--padded", type=int, default=256_128, help="The table's rows.")
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--entries", type=int, nargs="*", default=[12, 32])
    parser.add_argument("--chunks", type=int, nargs="*", default=[1024, 1280, 2048, 4096])
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=TABLES)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--square", type=int, default=8192)
    parser.add_argument("--kernels", nargs="*", default=["portable", "hopper"])
    parser.add_argument("--trials", type=tiles, nargs="*", help="Fields of Tiles, as JSON.")
    parser.add_argument("--trial-tokens", type=int, default=2048)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--hlo", help="Write each compiled program to files of this name.")
    arguments = parser.parse_args()
    tokens, width = arguments.tokens, arguments.width
    padded = max(arguments.padded, arguments.vocab)
    if arguments.vocab != parser.get_default("vocab"):
        padded = -(-arguments.vocab // 128) * 128

    if tokens % BLOCK_TOKENS:
        parser.error(f"--tokens must be a multiple of {BLOCK_TOKENS}, but it is {tokens}")
    device_kind = attention.device_kind(jax.devices()[0])

    rate = product_rate(arguments.square, arguments.calls)
    floor = 3 * 2 * tokens * width * padded / rate * 1e3
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "tflops": round(rate / 1e12, 1),
                "floor_ms": round(floor, 2),
            }
        ),
        flush=True,
    )
    hidden = jax.random.normal(jax.random.key(2), (tokens, width), jnp.bfloat16)
    table = jax.random.normal(jax.random.key(3), (padded, width), jnp.bfloat16)
    # Float32 as the trainer's master weights are, of values that bfloat16 has.
    table = (table * (SPREAD / width**0.5)).astype(jnp.bfloat16).astype(jnp.float32)

    if arguments.trials is not None:
        rows = hidden[: arguments.trial_tokens]
        tries = arguments.trials or TRIALS
        for measured in trials(rows, table, arguments.vocab, tries, arguments.calls):
            print(json.dumps(measured), flush=True)

    def report(
        name: str, dtype: str, entries: int, measured: dict[str, Any], result: Any, wanted: Any
    ) -> None:
        if result is not None:
            measured = measured | errors(result, wanted)
        line = {"what": name, "table": dtype, "entries": entries} | measured
        if isinstance(line["ms"], float):
            line["of_floor"] = round(line["ms"] / floor, 3)
        print(json.dumps(line), flush=True)

    for entries in arguments.entries:
        targets = make_targets(tokens, arguments.vocab, entries)
        expected = reference(
            hidden, table, *map(jnp.asarray, padded_entries(targets)), arguments.vocab
        )
        for dtype, chunk, kernel in itertools.product(
            arguments.tables, arguments.chunks, arguments.kernels
        ):
            name = f"{kernel}, chunks of {chunk}"
            head = Head(arguments.vocab, CAP, BLOCK_TOKENS, chunk, kernel=kernel)
            try:
                head = resolve_kernel(
                    head, device_kind, dtype=hidden.dtype, table_shape=table.shape
                )
            except ConfigError as error:
                report(name, dtype, entries, {"ms": str(error)}, None, expected)
                continue
            measured, result = retort(
                hidden, table.astype(dtype), targets, head, arguments.calls, arguments.hlo
            )
            report(name, dtype, entries, measured, result, expected)
            del result
    if arguments.no_peers:
        return
    # Peers know no padded rows: they get the table without them.
    loss, dx, dw = expected
    valid = slice(arguments.vocab)
    for name, measured, result in peers(hidden, table[valid], targets, arguments.calls):
        report(name, "bfloat16", entries, measured, result, (loss, dx, dw[valid]))


if __name__ == "__main__":
    main()
