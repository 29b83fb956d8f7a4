"""AdamW with a global-norm clip, at a rate that depends on the step alone; norms do not decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from schemas.runs import OptimizerConfig
from student_train.schedules import learning_rate

_EPSILON = 1e-8


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run of `steps` steps; `update` takes the 0-based `step` by name.

    The rate is that of the run's step, not of a count of updates: a step that was skipped does not
    shift the schedule.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=_EPSILON),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        _scale_by_rate(config, steps),
    )

    def update(updates: Any, state: Any, params: Any, *, step: Any) -> Any:
        # optax raises a float to an int32 count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params, step=step)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _scale_by_rate(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> Any:
        rate = learning_rate(config, steps, step)
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def last_update_norm(
    config: OptimizerConfig, steps: int, state: Any, params: Any, step: Any
) -> jax.Array:
    """float32 [], norm of what the update of a step added, from what it left.

    With the moments' direction d, rate r and decay w it added u = -r (d + w p) to parameters p, now
    p + u: so u = -r (d + w (p + u)) / (1 - r w). Nothing has to be kept of the update itself.
    """
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    rate = learning_rate(config, steps, step)
    count = adam.count.astype(jnp.float32)
    first, second = (1 - beta**count for beta in (config.beta1, config.beta2))

    def square(mean: Any, variance: Any, param: Any, decays: bool) -> jax.Array:
        decay = config.weight_decay if decays else 0.0
        direction = mean / first / (jnp.sqrt(variance / second) + _EPSILON)
        return jnp.sum(jnp.square(rate * (direction + decay * param) / (1 - rate * decay)))

    squares = jax.tree.map(square, adam.mu, adam.nu, params, decayed(params))
    return jnp.sqrt(sum(jax.tree.leaves(squares)))


def decayed(params: Any) -> Any:
    """For each parameter, whether it decays: all but the weights of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(str(key.key).endswith("norm") for key in path), params
    )
