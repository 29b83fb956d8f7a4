"""The fused head: its kernel in an interpreter, and the loss around a stand-in for the kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_student_train_loss import CASES, Case, mixed, relative_error, rounded_oracle

from schemas.errors import ConfigError
from schemas.runs import MeshConfig
from student_train import head_hopper
from student_train import mesh as meshes
from student_train.head_hopper import Tiles
from student_train.loss import Head, Losses, resolve_kernel, sparse_target_loss
from student_train.step import make_loss

needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < head_hopper.OLDEST_JAX, reason="this JAX has another Pallas"
)


def plain_scores(hidden: jax.Array, table: jax.Array, valid: jax.Array, *, cap: float) -> Any:
    """What `head_hopper.scores` computes, in float32: (G, sums, logits)."""
    logits = jnp.einsum("cd,vd->cv", hidden, table, preferred_element_type=jnp.float32)
    ratio = jnp.tanh(logits / cap)
    known = jnp.arange(table.shape[0])[None] < valid
    exponential = jnp.where(known, jnp.exp(cap * ratio), 0.0)
    return (1 - ratio * ratio) * exponential, jnp.sum(exponential, axis=1), logits


def stand_in(
    hidden: jax.Array, table: jax.Array, valid: jax.Array, *, cap: float, gradient: bool = True
) -> Any:
    unnormalised, sums, _ = plain_scores(hidden, table, valid, cap=cap)
    return unnormalised.astype(hidden.dtype) if gradient else None, sums


pytestmark = pytest.mark.usefixtures("compile_quickly")

CUTS = {
    "the fastest": Tiles(),
    "a block alone": Tiles(cluster=1, store_columns=32),
    "flat": Tiles(rows=64, columns=256, stages=3),
    "two stages": Tiles(rows=64, columns=64, stages=2, walk=1),
}


@needs_pallas
@pytest.mark.parametrize("blocks", [2, 6])
@pytest.mark.parametrize("name", CUTS)
def test_the_interpreted_kernel_gives_the_scores(
    name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that no tile divides, logits far beyond the cap, more blocks than tiles."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    monkeypatch.setattr(head_hopper, "_processors", lambda: blocks)
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(200, 192)) * 3, jnp.bfloat16)
    table = jnp.asarray(random.normal(size=(328, 192)), jnp.bfloat16)
    valid = jnp.int32(300)
    run = functools.partial(
        head_hopper.scores, cap=30.0, tiles=CUTS[name], interpret=plgpu.InterpretGPUParams()
    )
    gradient, sums = jax.jit(run)(hidden, table, valid)
    expected, expected_sums, logits = plain_scores(hidden, table, valid, cap=30.0)
    assert float(jnp.max(jnp.abs(logits))) > 120
    np.testing.assert_allclose(sums, expected_sums, rtol=5e-6)
    # bf16 rounds to 2^-9 relative.
    assert relative_error(gradient, expected) < 2e-3
    assert not np.any(np.asarray(gradient, np.float32)[:, 300:])
    nothing, same = jax.jit(functools.partial(run, gradient=False))(hidden, table, valid)
    assert nothing is None
    np.testing.assert_allclose(same, sums, rtol=1e-6)


@needs_pallas
@pytest.mark.parametrize("name", CUTS)
def test_the_kernel_compiles_to_the_gpu_dialect(name: str) -> None:
    """As far as it goes without a GPU: layouts, shared memory and barriers at Gemma's sizes."""
    run = jax.jit(functools.partial(head_hopper.scores, cap=30.0, tiles=CUTS[name]))
    traced = run.trace(
        jax.ShapeDtypeStruct((1408, 2304), jnp.bfloat16),
        jax.ShapeDtypeStruct((256_128, 2304), jnp.bfloat16),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cap == 30.0])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_loss_and_gradients_around_the_kernel(
    name: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_hopper, "scores", stand_in)
    case = CASES[name]
    hidden, table, targets = case.arrays()
    targets = mixed(targets, alpha)

    def differentiated(loss: Any, head: Head) -> tuple[Losses, Any]:
        def scalar(hidden: jax.Array, table: jax.Array) -> Any:
            losses = loss(hidden, table, targets, head)
            return losses.loss, losses

        gradients, losses = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(hidden, table)
        return losses, gradients

    losses, gradients = differentiated(sparse_target_loss, case.head()._replace(kernel="hopper"))
    wanted, expected = differentiated(sparse_target_loss, case.head())
    for found, value in zip(losses, wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=2e-6, atol=2e-5)
    for found, value in zip(gradients, expected, strict=True):
        assert relative_error(found, value) < 2e-6


@pytest.mark.parametrize("model", [1, 4])
def test_devices_share_the_vocabulary(model: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first padded id lies within one device's part, and the last device knows none."""
    monkeypatch.setattr(head_hopper, "scores", stand_in)
    case = Case(batch=8, width=24, vocab=700, padded=1000, dtype=jnp.bfloat16)
    hidden, table, targets = case.arrays()
    head = case.head()._replace(kernel="hopper")
    mesh = meshes.make_mesh(MeshConfig(model=model), jax.devices())
    monkeypatch.setattr("student_train.step.resolve_kernel", lambda head, *_, **__: head)
    loss = make_loss(head, mesh)

    def scalar(run: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda x, w: run(x, w).loss, argnums=(0, 1)))

    value, (dx, dw) = scalar(lambda x, w: loss(x, w, targets))(hidden, table)
    wanted, (expected_dx, expected_dw) = scalar(lambda x, w: rounded_oracle(x, w, targets, head))(
        hidden, table
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert relative_error(dx, expected_dx) < 6e-3
    assert relative_error(dw, expected_dw) < 5e-3
    forward = jax.jit(loss)(hidden, table, targets)
    np.testing.assert_allclose(forward.loss, wanted, rtol=1e-5)


HEAD = Head(256_000, 30.0, 64, 1024, kernel="hopper")
FITS: dict[str, Any] = {
    "device_kind": "sm_90",
    "dtype": jnp.bfloat16,
    "table_shape": (256_128, 2304),
}
MISSES = {
    "device cpu": (HEAD, {"device_kind": "cpu"}),
    "compute in float32": (HEAD, {"dtype": jnp.float32}),
    "width 2300": (HEAD, {"table_shape": (256_128, 2300)}),
    "a table of 256001 rows": (HEAD, {"table_shape": (256_001, 2304)}),
    r"logits that no cap of 60\.0 bounds": (HEAD._replace(final_cap=None), {}),
}


@pytest.mark.parametrize("message", MISSES)
def test_what_the_kernel_lacks_is_named(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_hopper, "OLDEST_JAX", (0, 1))
    assert resolve_kernel(HEAD._replace(kernel="auto"), **FITS) == HEAD
    head, other = MISSES[message]
    with pytest.raises(ConfigError, match=rf"'hopper' lacks {message}; choose 'portable'\."):
        resolve_kernel(head, **(FITS | other))
    assert resolve_kernel(head._replace(kernel="auto"), **(FITS | other)).kernel == "portable"


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of auto, portable, hopper, but it is 'fast'"):
        resolve_kernel(HEAD._replace(kernel="fast"), **FITS)


def test_an_older_jax_lacks_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_hopper, "OLDEST_JAX", (99, 0))
    with pytest.raises(ConfigError, match=rf"lacks jax {jax.__version__}"):
        resolve_kernel(HEAD, **FITS)
