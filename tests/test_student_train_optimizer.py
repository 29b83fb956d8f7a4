"""Which parameters decay, what is clipped, and whose step the rate is of."""

import jax
import jax.numpy as jnp
import numpy as np
from student_store import MODEL

from gemma2.model import init_params
from schemas.model import ModelConfig
from schemas.runs import OptimizerConfig, RateSchedule
from student_train.optimizer import decayed, make_optimizer

AT_ONCE = RateSchedule(warmup_steps=0)


def test_norms_do_not_decay_and_all_else_does() -> None:
    params = init_params(ModelConfig(**MODEL), jax.random.key(0))
    flags = jax.tree_util.tree_flatten_with_path(decayed(params))[0]
    names = {jax.tree_util.keystr(path): flag for path, flag in flags}
    assert sum(not flag for flag in names.values()) == 9
    assert all(flag == ("norm" not in name) for name, flag in names.items())


def test_with_zero_gradients_only_decayed_weights_move() -> None:
    config = OptimizerConfig(learning_rate=0.5, schedule=AT_ONCE, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    params = {"final_norm": {"weight": jnp.ones(3)}, "embedding": jnp.ones((2, 3))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, step=0)
    np.testing.assert_array_equal(updates["final_norm"]["weight"], 0)
    np.testing.assert_allclose(updates["embedding"], -0.05, rtol=1e-6)


def test_the_global_norm_is_clipped() -> None:
    config = OptimizerConfig(clip_norm=1.0, weight_decay=0.0, schedule=AT_ONCE)
    optimizer = make_optimizer(config, 10)
    params = {"embedding": jnp.zeros(4)}
    states = []
    for scale in (1.0, 1000.0):
        gradients = {"embedding": scale * jnp.array([3.0, 4.0, 0.0, 0.0])}
        _, state = optimizer.update(gradients, optimizer.init(params), params, step=0)
        states.append(state)
    for small, large in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(small, large, rtol=1e-6)


def test_the_rate_is_that_of_the_step_and_not_of_the_updates() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=RateSchedule(warmup_steps=4))
    optimizer = make_optimizer(config, 10)
    params = {"final_norm": {"weight": jnp.zeros(3)}}
    gradients = jax.tree.map(jnp.ones_like, params)
    moved = [
        optimizer.update(gradients, optimizer.init(params), params, step=step)[0] for step in (0, 3)
    ]
    # Adam's first update is the gradient's sign.
    for update, rate in zip(moved, (0.25, 1.0), strict=True):
        np.testing.assert_allclose(update["final_norm"]["weight"], -rate, rtol=1e-5)
