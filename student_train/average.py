"""An exponential moving average of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp


def decay_at(decay: float, step: Any) -> jax.Array:
    """float32 share of the average that the 0-based `step` keeps.

    min(decay, (1 + step) / (10 + step)): so that random first parameters are soon forgotten.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def averaged(average: Any, params: Any, decay: float, step: Any) -> Any:
    """The average after `step`, whose parameters are `params`."""
    kept = decay_at(decay, step)
    return jax.tree.map(lambda old, new: old + (1 - kept) * (new - old), average, params)
