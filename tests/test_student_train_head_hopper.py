"""The fused head: its kernels in an interpreter, and the loss around stand-ins for them."""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_student_train_loss import CASES, Case, mixed, relative_error, rounded_oracle

from schemas.errors import ConfigError
from schemas.runs import MeshConfig
from student_train import head_hopper, hopper_product
from student_train import mesh as meshes
from student_train.hopper_product import Tiles, Work
from student_train.loss import Head, Losses, Targets, resolve_kernel, sparse_target_loss
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


def stand_in_scores(
    hidden: jax.Array, table: jax.Array, valid: jax.Array, *, cap: float, gradient: bool = True
) -> Any:
    unnormalised, sums, _ = plain_scores(hidden, table, valid, cap=cap)
    return unnormalised.astype(hidden.dtype) if gradient else None, sums


def plain_gradient(unnormalised: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("cv,vd->cd", unnormalised, table, preferred_element_type=jnp.float32)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are used, for which others stand in."""
    used = []

    def record(name: str, stand_in: Any) -> None:
        def run(*arguments: Any, **keywords: Any) -> Any:
            used.append(name)
            return stand_in(*arguments, **keywords)

        monkeypatch.setattr(head_hopper, name, run)

    record("scores", stand_in_scores)
    record("hidden_gradient", plain_gradient)
    return used


pytestmark = pytest.mark.usefixtures("compile_quickly")

CUTS = {
    "the fastest": Tiles(),
    "a block alone": Tiles(cluster=1, stages=3),
    "flat": Tiles(rows=64, columns=256, stages=4),
    "two stages": Tiles(rows=64, columns=64, stages=2),
}


@needs_pallas
@pytest.mark.parametrize("blocks", [2, 6])
@pytest.mark.parametrize("name", CUTS)
def test_the_interpreted_kernel_gives_the_scores(
    name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that no tile divides, logits far beyond the cap, more blocks than tiles."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    monkeypatch.setattr(hopper_product, "clusters", lambda tiles: blocks // tiles.cluster)
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
def test_the_interpreted_kernel_gives_the_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that no tile divides. The interpreter cannot add to memory: in one part."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    monkeypatch.setattr(hopper_product, "clusters", lambda tiles: 2 // tiles.cluster)
    random = np.random.default_rng(0)
    unnormalised = jnp.asarray(random.normal(size=(200, 328)), jnp.bfloat16)
    table = jnp.asarray(random.normal(size=(328, 320)), jnp.bfloat16)
    run = functools.partial(
        head_hopper.hidden_gradient,
        tiles=CUTS[name],
        splits=1,
        interpret=plgpu.InterpretGPUParams(),
    )
    expected = plain_gradient(unnormalised, table)
    np.testing.assert_allclose(jax.jit(run)(unnormalised, table), expected, atol=2e-4)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("splits", [1, 3, 11])
def test_the_parts_of_a_gradient_are_all_of_it(
    splits: int, cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile of the result once with every step; the last part is shorter than the others."""
    found: list[Work] = []
    monkeypatch.setattr(
        head_hopper, "multiply", lambda left, right, work, *_, **__: found.append(work)
    )
    unnormalised, table, total = (
        SimpleNamespace(shape=shape) for shape in ((1300, 5000), (5000, 200), (1300, 200))
    )
    tiles = Tiles(cluster=cluster)
    head_hopper._hidden_gradient(unnormalised, table, total, tiles=tiles, splits=splits)
    (work,) = found
    items = [tuple(map(int, work.place(jnp.int32(item)))) for item in range(work.items)]
    rows, columns = -(-1300 // (128 * cluster)), 2
    firsts = [part * work.steps for part in range(splits)]
    assert sorted(items) == list(itertools.product(range(rows), range(columns), firsts))
    assert splits * work.steps * 64 >= 5000 > (splits * work.steps - splits) * 64


def test_rows_enough_are_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_hopper, "_ENOUGH_ROWS", 200)
    random = np.random.default_rng(0)
    unnormalised = jnp.asarray(random.normal(size=(200, 328)), jnp.bfloat16)
    table = jnp.asarray(random.normal(size=(328, 320)), jnp.bfloat16)
    found = head_hopper.hidden_gradient(unnormalised, table)
    np.testing.assert_array_equal(found, plain_gradient(unnormalised, table))

    class Launched(Exception):
        pass

    def launch(*_: Any, **__: Any) -> Any:
        raise Launched

    monkeypatch.setattr(head_hopper, "launch", launch)
    with pytest.raises(Launched):
        head_hopper.hidden_gradient(unnormalised[1:], table)


def test_parts_fill_the_last_round() -> None:
    """132 processors in pairs. Chunks of 1,024 and 1,280: 72 and 90 tiles for 66 pairs."""
    assert head_hopper._splits(72, 66, 4002) == head_hopper._splits(90, 66, 4002) == 11
    assert head_hopper._splits(66, 66, 4002) == 1
    # Too short to be cut.
    assert head_hopper._splits(3, 66, 40) == 1


@needs_pallas
@pytest.mark.parametrize("name", CUTS)
def test_the_kernels_compile_to_the_gpu_dialect(name: str) -> None:
    """As far as it goes without a GPU: layouts, shared memory and barriers at Gemma's sizes."""
    hidden, table, unnormalised = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((1408, 2304), (256_128, 2304), (1408, 256_128))
    )
    scores = jax.jit(functools.partial(head_hopper.scores, cap=30.0, tiles=CUTS[name]))
    gradient = jax.jit(functools.partial(head_hopper.hidden_gradient, tiles=CUTS[name], splits=11))
    for traced in (
        scores.trace(hidden, table, jax.ShapeDtypeStruct((), jnp.int32)),
        gradient.trace(unnormalised, table),
    ):
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_pallas
def test_devices_lower_each_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a mesh of three axes, with three chunks each: one for the first chunk and the loop."""
    monkeypatch.setattr("student_train.step.resolve_kernel", lambda head, *_, **__: head)
    mesh = meshes.make_mesh(MeshConfig(replica=2, fsdp=2, model=2), jax.devices())
    loss = make_loss(HEAD, mesh)
    rows, tokens = 4, 3072

    def of_tokens(dtype: Any, each: int = 1) -> Any:
        return jax.ShapeDtypeStruct((rows, tokens * each), dtype)

    targets = Targets(
        labels=of_tokens(jnp.int32),
        label_weight=of_tokens(jnp.float32),
        entry_id=of_tokens(jnp.int32, 2),
        entry_position=of_tokens(jnp.int32, 2),
        entry_weight=of_tokens(jnp.float32, 2),
        entry_scale=of_tokens(jnp.float32),
    )
    run = jax.jit(jax.grad(lambda x, w, t: loss(x, w, t).loss, argnums=(0, 1)))
    hidden = jax.ShapeDtypeStruct((rows, tokens, 128), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((256_128, 128), jnp.float32)
    text = run.trace(hidden, table, targets).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cap == 30.0])
def test_loss_and_gradients_around_the_kernels(name: str, stand_ins: list[str]) -> None:
    case = CASES[name]
    hidden, table, targets = case.arrays()
    targets = mixed(targets, 0.7)

    def differentiated(loss: Any, head: Head) -> tuple[Losses, Any]:
        def scalar(hidden: jax.Array, table: jax.Array) -> Any:
            losses = loss(hidden, table, targets, head)
            return losses.loss, losses

        gradients, losses = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(hidden, table)
        return losses, gradients

    losses, gradients = differentiated(sparse_target_loss, case.head()._replace(kernel="hopper"))
    assert set(stand_ins) == {"scores", "hidden_gradient"}
    wanted, expected = differentiated(sparse_target_loss, case.head())
    for found, value in zip(losses, wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=2e-6, atol=2e-5)
    for found, value in zip(gradients, expected, strict=True):
        assert relative_error(found, value) < 2e-6


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("model", [1, 4])
def test_devices_share_the_vocabulary(model: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first padded id lies within one device's part, and the last device knows none."""
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
