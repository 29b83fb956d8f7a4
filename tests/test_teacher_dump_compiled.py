"""Steps compiled for a platform: the options are known to this XLA, and only a GPU gets them."""

import jax
import jax.numpy as jnp
import pytest

from teacher_dump import compiled
from teacher_dump.compiled import Step


def powers(x: jax.Array, *, power: int) -> jax.Array:
    return x**power


def test_a_gpus_options_are_known_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's compiler takes them for granted, but refuses what it does not know."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run = Step(powers, ("power",))
    assert run(jnp.float32(3.0), power=2) == 9.0
    monkeypatch.setattr(compiled, "ON_GPU", {"xla_gpu_autotune_levels": 0})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_autotune_levels"):
        Step(powers, ("power",))(jnp.float32(3.0), power=2)


def test_other_platforms_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU's compiler would refuse them."""
    monkeypatch.setattr(compiled, "ON_GPU", {"xla_gpu_autotune_levels": 0})
    run = Step(powers, ("power",))
    assert run(jnp.float32(3.0), power=3) == 27.0
    assert run.jitted("tpu").lower(jnp.float32(3.0), power=2).compile()(jnp.float32(3.0)) == 9.0
    assert run.jitted("cpu") is run.jitted("cpu")
