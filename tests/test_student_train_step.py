"""One step: micro-batches, routing by entropy, the average of parameters, and what is skipped."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_store import MODEL as FIELDS
from student_store import VOCAB, dense_targets, make_store

from gemma2 import model as gemma2
from schemas.errors import ConfigError
from schemas.model import ModelConfig
from schemas.runs import MeshConfig, OptimizerConfig, RateSchedule, RoutingConfig, TrainConfig
from student_train import guard as guards
from student_train import mesh as meshes
from student_train.average import decay_at
from student_train.data import Batch, StoreSource, place
from student_train.step import (
    State,
    abstract_state,
    make_gradients,
    make_head,
    make_norms,
    make_state,
    make_train_step,
    split_rows,
)

MODEL = ModelConfig(**FIELDS)
CONFIG = TrainConfig(
    store="",
    out=Path("."),
    steps=40,
    batch_sequences=8,
    dtype="float32",
    remat="none",
    ema_decay=0.5,
    optimizer=OptimizerConfig(schedule=RateSchedule(warmup_steps=2)),
)
ALPHA = np.float32(0.7)
# Of 32 tokens a row: one micro-batch of padding alone, one nearly so, and two that are full.
LENGTHS = [0, 0, 2, 3, 32, 32, 31, 32]
pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> StoreSource:
    return StoreSource(str(make_store(tmp_path_factory.mktemp("step") / "store")), "default")


def uneven(source: StoreSource) -> Batch:
    batch = source.read(np.arange(8))
    is_padding = np.arange(32)[None, :] >= np.array(LENGTHS)[:, None]
    return batch._replace(segment_ids=np.where(is_padding, 0, batch.segment_ids))


@functools.cache
def first_params() -> Any:
    """Larger than at the start, so that the soft-caps and the attention matter."""
    params = jax.jit(lambda: gemma2.init_params(MODEL, jax.random.key(3)))()
    return jax.device_get(jax.tree.map(lambda leaf: 3 * leaf, params))


@functools.cache
def compiled_gradients(source: StoreSource, config: TrainConfig, devices: int) -> Any:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:devices])
    head = make_head(MODEL, VOCAB, source.targets_manifest, 64)
    return mesh, jax.jit(make_gradients(MODEL, config, head, mesh))


def gradients(
    source: StoreSource, batch: Batch, config: TrainConfig = CONFIG, devices: int = 1
) -> tuple[Any, Any]:
    mesh, compiled = compiled_gradients(source, config, devices)
    placed = place(np.arange(8), lambda rows: Batch(*(a[rows] for a in batch)), rows_of(mesh))
    params = jax.device_put(first_params(), meshes.state_shardings(first_params(), mesh))
    found, means = compiled(params, placed, ALPHA)
    return jax.device_get(found), jax.device_get(means)


def rows_of(mesh: Any) -> Any:
    return meshes.rows_sharding(mesh)


def error(found: Any, wanted: Any) -> float:
    """Norm of the difference over the norm."""
    flat = [
        np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])
        for tree in (found, wanted)
    ]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


@pytest.mark.parametrize(("parts", "devices"), [(4, 1), (2, 4)])
def test_micro_batches_have_the_gradients_of_their_batch(
    source: StoreSource, parts: int, devices: int
) -> None:
    batch = uneven(source)
    whole, means = gradients(source, batch)
    config = CONFIG.model_copy(update={"accumulate": parts})
    found, found_means = gradients(source, batch, config, devices)
    assert error(found, whole) < 2e-6
    np.testing.assert_allclose(found_means, means, rtol=2e-6)


def test_a_mean_of_means_would_be_another(source: StoreSource) -> None:
    """So unevenly are the micro-batches filled that the test before tells the two apart."""
    batch = uneven(source)
    _, means = gradients(source, batch)
    losses = []
    for rows in ([2, 3], [4, 5], [6, 7]):
        # The others are padding: the mean is that of the micro-batch alone.
        mine = np.isin(np.arange(8), rows)[:, None]
        part = batch._replace(segment_ids=np.where(mine, batch.segment_ids, 0))
        losses.append(gradients(source, part)[1].loss)
    assert abs(np.mean(losses) / means.loss - 1) > 1e-2


def test_each_device_cuts_its_own_rows() -> None:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:4])
    batch = Batch(*[np.repeat(np.arange(8)[:, None], 3, axis=1)] * len(Batch._fields))
    placed = jax.device_put(batch, meshes.rows_sharding(mesh))
    compiled = jax.jit(lambda batch: split_rows(batch, 2, mesh)).lower(placed).compile()
    parts = compiled(placed)
    np.testing.assert_array_equal(parts.tokens[..., 0], [[0, 2, 4, 6], [1, 3, 5, 7]])
    for shard in parts.tokens.addressable_shards:
        assert shard.data.shape == (2, 1, 3)
    # Nothing moves between devices.
    assert not re.search(r"all-|collective", compiled.as_text())


def test_micro_batches_that_do_not_divide_are_refused() -> None:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices())
    message = r"multiple of the 8 devices .* times 3 micro-batches, but it is 16; use 24"
    with pytest.raises(ConfigError, match=message):
        meshes.check_batch(mesh, 16, 3)
    with pytest.raises(ConfigError, match="3 does not divide 8"):
        TrainConfig.parse({"store": "s", "out": "o", "accumulate": 3}, "here")


def dense_loss(params: Any, batch: Batch, alpha: np.ndarray) -> jax.Array:
    """The mixed loss with dense targets, where `alpha` float32 [B, L] differs by position."""
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segment_ids)
    mask = np.pad((segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != 0), ((0, 0), (0, 1)))
    dense = dense_targets(batch)
    label = np.eye(VOCAB, dtype=np.float32)[np.roll(tokens, -1, axis=1)]
    mixed = alpha[..., None] * dense + (1 - alpha[..., None]) * label
    mixed = mixed * mask[..., None] / mask.sum()
    hidden = gemma2.hidden_states(params, MODEL, tokens, segments, dtype=np.dtype("float32"))
    logits = gemma2.logits(params, MODEL, hidden)[..., :VOCAB]
    return -jnp.sum(jnp.asarray(mixed) * jax.nn.log_softmax(logits))


def test_sure_positions_learn_from_their_labels_alone(source: StoreSource) -> None:
    batch = uneven(source)
    entropies = np.unique(batch.teacher_entropy[batch.teacher_entropy > 0])
    below = float(entropies[len(entropies) // 2])
    routed = batch.teacher_entropy < below
    config = CONFIG.model_copy(update={"routing": RoutingConfig(below_nats=below)})
    found, means = gradients(source, batch, config)
    alpha = np.where(routed, np.float32(0), ALPHA)
    loss, wanted = jax.jit(jax.value_and_grad(lambda p: dense_loss(p, batch, alpha)))(
        first_params()
    )
    np.testing.assert_allclose(means.loss, loss, rtol=1e-6)
    assert error(found, wanted) < 2e-6
    # Neither no routing nor alpha's remainder of the label's weight would pass for it.
    assert error(gradients(source, batch)[0], wanted) > 1e-2
    segments = batch.segment_ids
    mask = np.zeros_like(routed)
    mask[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != 0)
    assert 0.2 < means.routed_share < 0.8
    np.testing.assert_allclose(means.routed_share, routed[mask].mean(), rtol=1e-6)


@functools.cache
def train_step(source: StoreSource) -> tuple[Any, Any]:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    head = make_head(MODEL, VOCAB, source.targets_manifest, 64)
    return mesh, make_train_step(MODEL, CONFIG, head, mesh)


@functools.cache
def first_state() -> State:
    """On the host: what is placed is donated."""
    return jax.device_get(jax.jit(functools.partial(make_state, MODEL, CONFIG))(jax.random.key(0)))


def run(source: StoreSource, batches: list[Batch], state: State | None = None) -> Any:
    """(states after each step, metrics of each), on the host."""
    mesh, step = train_step(source)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(MODEL, CONFIG, mesh))
    if state is None:
        state = first_state()
    state = jax.device_put(state, shardings)
    states, metrics = [], []
    for batch in batches:
        placed = place(
            np.arange(8), lambda rows, b=batch: Batch(*(a[rows] for a in b)), rows_of(mesh)
        )
        state, found = step(state, placed)
        states.append(jax.tree.map(np.array, state))
        metrics.append(jax.device_get(found))
    return states, metrics


def with_weights(batch: Batch, factor: float, row: int) -> Batch:
    weight = batch.entry_weight.copy()
    weight[row, weight[row] > 0] *= np.float32(factor)
    return batch._replace(entry_weight=weight)


def assert_equal(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_average_follows_the_parameters(source: StoreSource) -> None:
    assert [round(float(decay_at(0.5, step)), 6) for step in (0, 1, 7, 8, 1000)] == [
        0.1,
        0.181818,
        0.470588,
        0.5,
        0.5,
    ]
    batch = source.read(np.arange(8))
    first = first_state()
    assert_equal(first.ema, first.params)
    states, _ = run(source, [batch] * 4)
    expected = first.params
    for step, state in enumerate(states):
        kept = min(0.5, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda old, new, kept=kept: kept * old + (1 - kept) * new, expected, state.params
        )
        assert error(state.ema, expected) < 1e-6
    assert error(states[-1].ema, states[-1].params) > 1e-5
    assert states[-1].result is states[-1].ema


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e6], ids=["nan", "infinite", "spike"])
def test_a_bad_step_changes_nothing_but_its_number(source: StoreSource, factor: float) -> None:
    batch = source.read(np.arange(8))
    good = guards.LEAST_HISTORY
    states, metrics = run(source, [batch] * good + [with_weights(batch, factor, 5), batch])
    before, skipped, after = states[-3:]
    for part in ("params", "opt_state", "ema"):
        assert_equal(getattr(skipped, part), getattr(before, part))
    assert (int(before.step), int(skipped.step)) == (good, good + 1)
    assert [float(m.bad_in_a_row) for m in metrics[-3:]] == [0, 1, 0]
    if np.isfinite(factor):
        # Only the gradient is at fault, and only since enough is known to call it a spike.
        assert np.isfinite(metrics[-2].loss)
        assert metrics[-2].grad_norm > metrics[-2].grad_norm_limit > metrics[-3].grad_norm
    # The step after it is that of a run that goes on from the same state, at its own number.
    alone, _ = run(source, [batch], skipped)
    assert_equal(alone[0], after)
    assert error(after.params, skipped.params) > 1e-6


def test_without_enough_history_a_large_gradient_is_taken(source: StoreSource) -> None:
    batch = source.read(np.arange(8))
    _, metrics = run(source, [batch, with_weights(batch, 1e6, 5)])
    assert float(metrics[-1].bad_in_a_row) == 0
    assert np.isinf(metrics[-1].grad_norm_limit)


def test_norms_are_those_of_what_they_name(source: StoreSource) -> None:
    batch = source.read(np.arange(8))
    (before, after), _ = run(source, [batch] * 2)
    found = make_norms(CONFIG)(after)

    def norm(tree: Any) -> float:
        return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))

    assert float(found.param_norm) == pytest.approx(norm(after.params), rel=1e-5)
    moved = jax.tree.map(np.subtract, after.params, before.params)
    assert float(found.update_norm) == pytest.approx(norm(moved), rel=1e-3)


def judged(norms: list[float], spike_factor: float | None) -> tuple[list[bool], guards.Guard]:
    guard, verdicts = guards.new_guard(), []

    @jax.jit
    def judge(guard: guards.Guard, norm: jax.Array) -> Any:
        limit = guards.norm_limit(guard, spike_factor)
        return guards.judge(guard, jnp.zeros(()), norm, limit)

    for norm in norms:
        is_good, guard = judge(guard, np.float32(norm))
        verdicts.append(bool(is_good))
    return verdicts, guard


def test_the_limit_is_a_multiple_of_the_median_of_good_norms() -> None:
    history = [float(n) for n in range(1, 17)]
    verdicts, guard = judged([*history, 24.1, 23.9, np.nan], 3.0)
    # The lower median of 1 … 16 is 8, and of those with 23.9 it is 9.
    assert verdicts == [True] * 16 + [False, True, False]
    assert float(guards.norm_limit(guard, 3.0)) == 27.0
    assert (int(guard.good_steps), int(guard.bad_in_a_row)) == (17, 1)


def test_only_the_last_norms_are_remembered() -> None:
    _, guard = judged([1000.0] * guards.HISTORY + [1.0] * guards.HISTORY, None)
    assert float(guards.norm_limit(guard, 2.0)) == 2.0
    assert np.isinf(guards.norm_limit(guard, None))
