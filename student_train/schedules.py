"""Numbers that depend on the step alone: the learning rate and alpha, as `Schedule` says."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from schemas.runs import OptimizerConfig, Schedule, TrainConfig


def factor(schedule: Schedule, steps: int, step: Any) -> jax.Array:
    """float32 factor of the 0-based `step` of `steps`.

    Step 0 is not wasted at the warm-up's start: the warm-up ends at 1 on its last step. The decay
    leaves 1 after the step before it and is at `final_fraction` on the last step.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup, decay = schedule.warmup_steps, schedule.decay_steps
    first = warmup if decay is None else steps - 1 - decay
    done = jnp.clip((step - first) / max(1, steps - 1 - first), 0.0, 1.0)
    shape = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + jnp.cos(math.pi * done)),
        "sqrt": 1 - jnp.sqrt(done),
    }[schedule.decay]
    decayed = schedule.final_fraction + (1 - schedule.final_fraction) * shape
    start = schedule.initial_fraction
    warm = start + (1 - start) * (step + 1) / max(1, warmup)
    return jnp.where(step < warmup, warm, decayed if decay != 0 else jnp.float32(1))


def learning_rate(config: OptimizerConfig, steps: int, step: Any) -> jax.Array:
    """float32 rate of the 0-based `step` of `steps`."""
    return config.learning_rate * factor(config.schedule, steps, step)


def alpha(config: TrainConfig, step: Any) -> jax.Array:
    """float32 weight of the stored targets at the 0-based `step`; 0 without any."""
    if config.targets is None:
        return jnp.zeros(())
    return config.alpha * factor(config.alpha_schedule, config.steps, step)
