"""Products in float8: how far off, whose scale is whose, and a whole model's layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2.float8 import Float8, product, quantize, quantize_layers
from gemma2.model import hidden_states, init_params
from schemas.model import ModelConfig

pytestmark = pytest.mark.usefixtures("compile_quickly")
ROWS, INPUTS, OUTPUTS = 37, 130, 75
# Half a unit in the last place of 3 bits, of each factor, and of both together.
WORST = 2.0**-4 * 2 + 2.0**-8
MODEL = ModelConfig(
    vocab_size=64,
    d_model=48,
    num_layers=4,
    mlp_width=96,
    num_heads=4,
    num_kv_heads=2,
    head_size=12,
    query_scalar=12,
    window_tokens=8,
    max_tokens=32,
)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, INPUTS)).astype(np.float32)


@pytest.fixture
def kernel() -> np.ndarray:
    """Columns of very different magnitudes."""
    random = np.random.default_rng(1)
    size = np.exp(3 * random.standard_normal(OUTPUTS))
    return (random.standard_normal((INPUTS, OUTPUTS)) * size).astype(np.float32)


def multiply(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(product)(jnp.asarray(x), quantize(jnp.asarray(kernel))))


def test_a_product_is_off_by_what_three_bits_are(x: np.ndarray, kernel: np.ndarray) -> None:
    error = multiply(x, kernel) - x @ kernel
    assert (np.abs(error) <= WORST * (np.abs(x) @ np.abs(kernel)) * 1.01).all()
    relative = np.linalg.norm(error, axis=0) / np.linalg.norm(x @ kernel, axis=0)
    # Less would not be float8; more would be a scale that wastes its range, in some column.
    assert (relative > 0.015).all()
    assert (relative < 0.06).all()


def test_loud_rows_and_columns_do_not_change_others(x: np.ndarray, kernel: np.ndarray) -> None:
    before = multiply(x, kernel)
    x[3] *= 1e6
    kernel[:, 5] *= 1e6
    after = multiply(x, kernel)
    rows, columns = np.delete(np.arange(ROWS), 3), np.delete(np.arange(OUTPUTS), 5)
    np.testing.assert_array_equal(after[np.ix_(rows, columns)], before[np.ix_(rows, columns)])
    np.testing.assert_allclose(after[3, 7], 1e6 * before[3, 7], rtol=0.1)


def test_nothing_stays_nothing(x: np.ndarray, kernel: np.ndarray) -> None:
    x[4], kernel[:, 6] = 0, 0
    found = multiply(x, kernel)
    assert np.isfinite(found).all()
    assert not found[4].any()
    assert not found[:, 6].any()


def test_every_layers_matrices_are_turned_and_let_go() -> None:
    params = init_params(MODEL, jax.random.key(0), jnp.bfloat16)
    shapes = {path: leaf.shape for path, leaf in _leaves(params["pairs"]).items()}
    pairs = params["pairs"]
    found = _leaves(quantize_layers(pairs))
    assert not pairs
    assert found.keys() == shapes.keys()
    matrices = {path for path in shapes if path.endswith("kernel")}
    assert len(matrices) == 2 * 7
    for path, leaf in found.items():
        if path in matrices:
            count, inputs, outputs = shapes[path]
            assert isinstance(leaf, Float8)
            assert (leaf.values.shape, leaf.scale.shape) == (
                (count, outputs, inputs),
                (count, outputs),
            )
            assert leaf.values.dtype == jnp.float8_e4m3fn
        else:
            assert leaf.shape == shapes[path]


def test_a_model_in_float8_is_the_model_roughly() -> None:
    params = init_params(MODEL, jax.random.key(0), jnp.bfloat16)
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 64)
    segments = jnp.ones_like(tokens)

    def run() -> np.ndarray:
        found = hidden_states(params, MODEL, tokens, segments, dtype=jnp.bfloat16)
        return np.asarray(found, np.float32)

    expected = run()
    params["pairs"] = quantize_layers(params["pairs"])
    found = run()
    off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0.01 < off < 0.2


def _leaves(pairs: Any, path: str = "") -> dict[str, Any]:
    """By name; a Float8 is one."""
    if not isinstance(pairs, dict):
        return {path: pairs}
    return {
        name: leaf
        for key, value in pairs.items()
        for name, leaf in _leaves(value, f"{path}/{key}").items()
    }
