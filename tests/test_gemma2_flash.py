"""What can be told of the kernels for Hopper without one: what they get, and who gets them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2 import attention, flash, model, presets
from gemma2.model import Execution
from schemas.errors import ConfigError

TINY = presets.PRESETS["tiny"]
HOPPER = SimpleNamespace(device_kind="NVIDIA H200", compute_capability="9.0")
BLACKWELL = SimpleNamespace(device_kind="NVIDIA B200", compute_capability="10.0")


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_the_bounds_are_those_of_the_mask(window: int | None) -> None:
    rows = [[1] * 23, [1, 1, 1, 2, 2, 3, 1, 1, 4, *[5] * 9, 0, 0, 0, 0, 0], [7] * 22 + [8]]
    segments = np.array(rows, np.int32)
    length = segments.shape[1]
    bounds = np.asarray(flash.visibility(jnp.asarray(segments), window))
    assert (bounds.shape, bounds.dtype) == ((3, 1 + 2 * length), np.int32)
    assert (bounds[:, 0] == length).all()
    first, last = bounds[:, 1 : 1 + length], bounds[:, 1 + length :]
    at = np.arange(length)
    # A document is a run of one id: the third one of the second row is not the first one.
    run = np.cumsum(np.diff(segments, axis=1, prepend=segments[:, :1]) != 0, axis=1)
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (run[:, :, None] == run[:, None, :])
    if window is not None:
        seen &= distance < window
    by_queries = (at >= first[:, :, None]) & (at <= at[:, None])
    by_keys = (at[:, None] >= at) & (at[:, None] <= last[:, None, :])
    np.testing.assert_array_equal(by_queries, seen)
    np.testing.assert_array_equal(by_keys, seen)
    # What lets whole tiles be skipped.
    assert (np.diff(first) >= 0).all()
    assert (np.diff(last) >= 0).all()


def resolve(
    name: str, config: str, device: object, dtype: str = "bfloat16", **changes: object
) -> str:
    changed = presets.PRESETS[config].model_copy(update=changes)
    return attention.resolve(name, changed, device, dtype=dtype, backward=True)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("config", ["gemma2-2.6b", "gemma2-9b", "gemma2-27b"])
def test_auto_takes_it_on_hopper_alone(config: str) -> None:
    assert resolve("auto", config, HOPPER) == "flash"
    assert resolve("auto", config, BLACKWELL) == "reference"
    assert resolve("auto", config, HOPPER, dtype="float32") == "reference"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("lacks", "device", "dtype", "changes"),
    [
        ("device sm_100", BLACKWELL, "bfloat16", {}),
        ("compute in float32", HOPPER, "float32", {}),
        ("scores that no cap of 60.0 bounds", HOPPER, "bfloat16", {"attention_cap": None}),
        ("scores that no cap of 60.0 bounds", HOPPER, "bfloat16", {"attention_cap": 70.0}),
        ("head size 64", HOPPER, "bfloat16", {"head_size": 64}),
        ("as many key heads as heads", HOPPER, "bfloat16", {"num_kv_heads": 8}),
    ],
)
def test_what_it_lacks_is_named(lacks: str, device: object, dtype: str, changes: dict) -> None:
    with pytest.raises(ConfigError, match=f"'flash' lacks {lacks}; choose attention 'reference'"):
        resolve("flash", "gemma2-2.6b", device, dtype, **changes)


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"'flash' is faster here but lacks .*retort\[gpu\]"):
        assert resolve("auto", "gemma2-2.6b", HOPPER) == "reference"
    with pytest.raises(
        ConfigError, match=r"lacks the package fa4_jax \(pip install 'retort\[gpu\]'"
    ):
        resolve("flash", "gemma2-2.6b", HOPPER)


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_layers_laid_out_compute_what_a_loop_does(remat: str) -> None:
    config = TINY.model_copy(update={"num_layers": 6})
    params = model.init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (2, 12)).astype(np.int32)
    segments = np.ones_like(tokens)

    def gradients(execution: Execution) -> object:
        def loss(params: model.Params) -> jax.Array:
            hidden = model.hidden_states(
                params,
                config,
                tokens,
                segments,
                dtype=jnp.float32,
                remat=remat,
                execution=execution,
            )
            return jnp.sum(jnp.sin(hidden))

        return jax.jit(jax.grad(loss))(params)

    looped, laid_out = gradients(Execution()), gradients(Execution(is_unrolled=True))
    for one, other in zip(jax.tree.leaves(looped), jax.tree.leaves(laid_out), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
