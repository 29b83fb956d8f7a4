"""AdamW with a global-norm clip, warm-up and a cosine; norms are not decayed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from schemas.runs import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int, step: Any) -> jax.Array:
    """float32 rate of the 0-based `step` of `steps`.

    Step 0 is not wasted at 0: the warm-up ends at the peak on its last step; the cosine reaches
    `final_fraction` of the peak on the last step.
    """
    step = jnp.asarray(step, jnp.float32)
    peak, floor = config.learning_rate, config.learning_rate * config.final_fraction
    span = max(1, steps - 1 - config.warmup_steps)
    done = jnp.clip((step - config.warmup_steps) / span, 0.0, 1.0)
    cosine = floor + (peak - floor) * 0.5 * (1 + jnp.cos(math.pi * done))
    warm = peak * (step + 1) / max(1, config.warmup_steps)
    return jnp.where(step < config.warmup_steps, warm, cosine)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps."""
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda step: learning_rate(config, steps, step),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )

    def update(*args: Any) -> Any:
        # optax raises a float to an int32 count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(*args)

    return optax.GradientTransformation(chain.init, update)


def decayed(params: Any) -> Any:
    """For each parameter, whether it decays: all but the weights of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(str(key.key).endswith("norm") for key in path), params
    )
