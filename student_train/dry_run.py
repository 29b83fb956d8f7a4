"""What a run would be: its size, its memory, its time, found by compiling and running its step.

The step is the run's own, on its own first batches; the state it changes is thrown away.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from pydantic import Field

from logit_store.ledger import Ledger
from schemas.accelerators import accelerator_of
from schemas.base import Document
from schemas.runs import TrainConfig
from student_train.batch import Batch
from student_train.data import Source
from student_train.step import State
from student_train.throughput import NO_RATES, Work

STEPS = 3


class Memory(Document):
    """Bytes on one device, as the compiler counts them for the step."""

    state: int = Field(description="Parameters, optimizer state and what else a run carries.")
    batch: int
    working: int = Field(description="Gradients, activations and all else that a step makes.")
    available: int | None = Field(description="None if neither device nor table says.")

    @property
    def total(self) -> int:
        return self.state + self.batch + self.working

    @property
    def fits(self) -> bool:
        """False only if it is known not to."""
        return self.available is None or self.total <= self.available


class Coverage(Document):
    """How much of a store a run reads."""

    rows: int
    committed_token_shards: int
    committed_target_shards: int | None = Field(description="None without targets.")
    shards: int
    share_of_rows: float = Field(description="Of the rows drawn from, those read at least once.")
    epochs: float


class DryRun(Document):
    """The plan of a run: `retort train --dry-run`."""

    parameters: int
    embedding_parameters: int
    device: str
    devices: int
    steps: int
    tokens_per_step: int
    tokens: int
    flops_per_token: float
    head_flops_per_token: float
    memory: Memory
    coverage: Coverage
    compile_seconds: float
    step_seconds: float | None = Field(
        description="Median of a few real steps; None if memory does not suffice to run them."
    )
    seconds: float | None = Field(
        description="All steps; no evaluation, checkpoint or compilation."
    )
    rates: dict[str, float | None]
    losses: tuple[float, ...] = Field(description="Of these steps.")
    entropy_cut_nats: float | None = Field(
        description="Positions of lower teacher entropy learn from labels alone; None: no routing."
    )


def measure(
    config: TrainConfig,
    source: Source,
    work: Work,
    train_step: Any,
    abstract: State,
    new_state: Callable[[], State],
    batch_of: Callable[[int], Batch],
) -> DryRun:
    """Compile the jitted `train_step`, run a few steps from a new state and report.

    `abstract` is the state's shapes, dtypes and shardings: what does not fit is never made.
    """
    params = abstract.params
    device = jax.tree.leaves(params)[0].sharding.mesh.devices.flat[0]
    first = batch_of(0)
    start = time.perf_counter()
    compiled = train_step.lower(abstract, first).compile()
    compile_seconds = time.perf_counter() - start
    memory = _memory(compiled, abstract, first, device)
    seconds, losses = _run(compiled, new_state(), batch_of) if memory.fits else ([], [])
    step_seconds = float(np.median(seconds)) if seconds else None
    # Batches are read ahead in a run, so what reading one costs alone says nothing of waiting.
    rates = work.rates(1, step_seconds, 0.0) if step_seconds else dict(NO_RATES)
    del rates["input_wait_share"]
    return DryRun(
        parameters=_size(params),
        embedding_parameters=_size(params["embedding"]),
        device=device.device_kind,
        devices=work.devices,
        steps=config.steps,
        tokens_per_step=work.tokens,
        tokens=config.steps * work.tokens,
        flops_per_token=work.flops_per_token,
        head_flops_per_token=work.head_flops_per_token,
        memory=memory,
        coverage=_coverage(config, source),
        compile_seconds=compile_seconds,
        step_seconds=step_seconds,
        seconds=None if step_seconds is None else config.steps * step_seconds,
        rates=rates,
        losses=tuple(losses),
        entropy_cut_nats=config.routing.below_nats,
    )


def _run(
    compiled: Any, state: State, batch_of: Callable[[int], Batch]
) -> tuple[list[float], list[float]]:
    """(seconds, losses) of the first steps; the batch is there before the time starts."""
    seconds, losses = [], []
    for step in range(STEPS):
        batch = jax.block_until_ready(batch_of(step))
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics.loss))
    return seconds, losses


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes_per_device(tree: Any) -> int:
    """Of arrays or their descriptions: equal parts lie on every device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(compiled: Any, abstract: State, batch: Batch, device: Any) -> Memory:
    counted = compiled.memory_analysis()
    # The new state takes the old one's place; what does not is an output of its own.
    outputs = counted.output_size_in_bytes - counted.alias_size_in_bytes
    limit = (device.memory_stats() or {}).get("bytes_limit")
    accelerator = accelerator_of(device.device_kind)
    return Memory(
        state=_bytes_per_device(abstract),
        batch=_bytes_per_device(batch),
        working=counted.temp_size_in_bytes + outputs,
        available=limit or (None if accelerator is None else accelerator.memory_bytes),
    )


def _coverage(config: TrainConfig, source: Source) -> Coverage:
    manifest = source.tokens_manifest
    tokens = Ledger(config.store, None, manifest).committed()
    target_shards = None
    if source.targets_manifest is not None:
        targets = Ledger(config.store, config.targets, source.targets_manifest).committed()
        target_shards = int(targets.sum())
    epochs = config.steps * config.batch_sequences / source.num_rows
    return Coverage(
        rows=manifest.num_sequences,
        shards=manifest.num_shards,
        committed_token_shards=int(tokens.sum()),
        committed_target_shards=target_shards,
        share_of_rows=min(1.0, epochs),
        epochs=epochs,
    )
