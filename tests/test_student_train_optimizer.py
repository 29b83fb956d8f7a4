"""The schedule's corners, and which parameters decay."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_store import MODEL

from gemma2.model import init_params
from schemas.model import ModelConfig
from schemas.runs import OptimizerConfig
from student_train.optimizer import decayed, learning_rate, make_optimizer

CONFIG = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)


def test_the_rate_warms_up_to_its_peak_and_falls_to_its_floor() -> None:
    rates = [float(learning_rate(CONFIG, 25, step)) for step in range(25)]
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[14], 1.1, rtol=1e-6)
    np.testing.assert_allclose(rates[24], 0.2, rtol=1e-6)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 10), (9, 10), (10, 10), (50, 10)])
def test_every_rate_of_a_short_run_is_positive_and_at_most_the_peak(
    warmup: int, steps: int
) -> None:
    config = CONFIG.model_copy(update={"warmup_steps": warmup})
    rates = [float(learning_rate(config, steps, step)) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)


def test_norms_do_not_decay_and_all_else_does() -> None:
    params = init_params(ModelConfig(**MODEL), jax.random.key(0))
    flags = jax.tree_util.tree_flatten_with_path(decayed(params))[0]
    names = {jax.tree_util.keystr(path): flag for path, flag in flags}
    assert sum(not flag for flag in names.values()) == 9
    assert all(flag == ("norm" not in name) for name, flag in names.items())


def test_with_zero_gradients_only_decayed_weights_move() -> None:
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    params = {"final_norm": {"weight": jnp.ones(3)}, "embedding": jnp.ones((2, 3))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["final_norm"]["weight"], 0)
    np.testing.assert_allclose(updates["embedding"], -0.05, rtol=1e-6)


def test_the_global_norm_is_clipped() -> None:
    config = OptimizerConfig(clip_norm=1.0, weight_decay=0.0, warmup_steps=0)
    optimizer = make_optimizer(config, 10)
    params = {"embedding": jnp.zeros(4)}
    states = []
    for scale in (1.0, 1000.0):
        gradients = {"embedding": scale * jnp.array([3.0, 4.0, 0.0, 0.0])}
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        states.append(state)
    for small, large in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(small, large, rtol=1e-6)
