"""Splash attention, interpreted on CPU, against the reference; what it declares, and where."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2 import attention, presets, splash
from schemas.errors import ConfigError

CAP = 50.0
INTERPRETED: Any = partial(splash.attention, interpret=True)
pytestmark = pytest.mark.usefixtures("compile_quickly")


def arrays(length: int, size: int, dtype: Any) -> tuple[Any, ...]:
    """Query, key, value and segment ids of two rows, 4 heads over 2; scores far above the cap."""
    keys = jax.random.split(jax.random.key(length), 3)
    # Scores have a deviation of 80: at cap 50 most of them saturate.
    query = jax.random.normal(keys[0], (2, length, 4, size)) * (80 * size**-0.5)
    key, value = (jax.random.normal(k, (2, length, 2, size)) for k in keys[1:])
    one = np.repeat(
        [1, 2, 3, 0], [length // 3, 7, length // 2, length - length // 3 - length // 2 - 7]
    )
    other = np.repeat([1, 2], [length - 5, 5])
    segments = jnp.asarray(np.stack([one, other]).astype(np.int32))
    return *(x.astype(dtype) for x in (query, key, value)), segments


def results(run: Any, operands: tuple[Any, ...], **options: Any) -> list[np.ndarray]:
    """The output and the gradients of query, key and value, for a random cotangent."""

    @jax.jit
    def all_of(query: Any, key: Any, value: Any, segments: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, segments, **options), query, key, value)
        cotangent = jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype)
        return out, *pull(cotangent)

    return [np.asarray(x, np.float32) for x in all_of(*operands)]


def error(found: list[np.ndarray], wanted: list[np.ndarray]) -> list[float]:
    """Of each array: the largest difference over the largest value."""
    return [
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True)
    ]


# Of 300 and 600 tokens no block is a divisor, and rows have more than two windows.
@pytest.mark.parametrize(
    ("length", "size", "window", "block"),
    [(300, 128, 97, 128), (600, 256, 130, 256), (384, 128, None, 256)],
)
def test_it_computes_what_the_reference_computes(length, size, window, block):
    operands = arrays(length, size, jnp.float32)
    with jax.default_matmul_precision("highest"):
        wanted = results(attention.reference, operands, cap=CAP, window=window)
        found = results(INTERPRETED, operands, cap=CAP, window=window, largest_block=block)
        assert max(error(found, wanted)) < 1e-4


def test_each_feature_counts():
    """Without any one of them the comparison above would fail, by the output and each gradient."""
    operands = arrays(300, 128, jnp.float32)
    merged = (*operands[:3], jnp.ones_like(operands[3]))
    right: dict[str, Any] = {"cap": CAP, "window": 97}
    wanted = results(attention.reference, operands, **right)
    for others, options in (
        (operands, right | {"cap": None}),
        (operands, right | {"window": 98}),
        (operands, right | {"window": 96}),
        (merged, right),
    ):
        assert min(error(results(attention.reference, others, **options), wanted)) > 0.02


def test_bfloat16_is_exact_to_its_rounding():
    exact = arrays(300, 128, jnp.float32)
    # The truth is of the same rounded operands.
    rounded = (*(x.astype(jnp.bfloat16) for x in exact[:3]), exact[3])
    truth = (*(x.astype(jnp.float32) for x in rounded[:3]), exact[3])
    with jax.default_matmul_precision("highest"):
        wanted = results(attention.reference, truth, cap=CAP, window=97)
    found = results(INTERPRETED, rounded, cap=CAP, window=97, largest_block=128)
    # A few roundings, of the output, its gradient and the scores': less than any lost feature.
    assert max(error(found, wanted)) < 4 * 2**-8


@pytest.mark.parametrize(
    ("kind", "preset", "wanted"),
    [
        ("TPU v5 lite", "gemma2-2.6b", "splash"),
        ("TPU v5", "gemma2-27b", "splash"),
        ("TPU v4", "gemma2-9b", "splash_v4"),
        ("TPU v5 lite", "tiny", "reference"),
        ("cpu", "gemma2-2.6b", "reference"),
    ],
)
def test_auto_chooses_for_the_device_that_is_compiled_for(kind, preset, wanted):
    device = SimpleNamespace(device_kind=kind)
    model = presets.PRESETS[preset]
    assert attention.resolve("auto", model, device, dtype="bfloat16", backward=True) == wanted


def test_a_kernel_of_another_device_is_refused():
    model, cpu = presets.PRESETS["gemma2-2.6b"], jax.devices()[0]
    with pytest.raises(ConfigError, match=r"'splash' lacks device cpu; choose .*'reference'"):
        attention.resolve("splash", model, cpu, dtype="bfloat16", backward=True)
    with pytest.raises(ConfigError, match="'splash' lacks head size 32, device cpu"):
        attention.resolve("splash", presets.PRESETS["tiny"], cpu, dtype="bfloat16", backward=True)
    with pytest.raises(ConfigError, match=r"one of auto, flash, .*, reference, .*'dash'"):
        attention.resolve("dash", model, cpu, dtype="bfloat16", backward=True)
