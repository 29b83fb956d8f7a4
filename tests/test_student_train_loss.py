"""The sparse-target loss against a dense oracle: values, gradients, masks and memory."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from schemas.errors import ConfigError
from student_train.loss import Head, Losses, Targets, sparse_target_loss


def dense_oracle(hidden: jax.Array, table: jax.Array, targets: Targets, head: Head) -> Losses:
    """All logits at once, targets as a dense array, gradients left to JAX."""
    logits = jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), table.astype(jnp.float32))
    if head.final_cap is not None:
        logits = head.final_cap * jnp.tanh(logits / head.final_cap)
    logits = logits[..., : head.valid_vocab]
    batch, tokens, width = logits.shape
    row = jnp.arange(batch)[:, None]
    used = jnp.where(targets.entry_id >= 0, targets.entry_weight, 0.0)
    dense = (
        jnp.zeros((batch, tokens, width))
        .at[row, targets.entry_position, jnp.maximum(targets.entry_id, 0)]
        .add(used)
    )
    log_softmax = jax.nn.log_softmax(logits)
    kd = -jnp.sum(dense * log_softmax, axis=-1)
    ce = -jnp.take_along_axis(log_softmax, targets.labels[..., None], axis=-1)[..., 0]
    kd_sum = jnp.sum(targets.entry_scale * kd)
    ce_sum = jnp.sum(targets.label_weight * ce)
    return Losses(kd_sum + ce_sum, kd, ce)


def rounded_oracle(hidden: Any, table: Any, *rest: Any) -> Losses:
    """The oracle on the table as the matrix products of bfloat16 read it."""
    return dense_oracle(hidden, table.astype(jnp.bfloat16), *rest)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one problem; masses differ from 1 and some blocks have unused slots."""

    batch: int = 3
    tokens: int = 24
    block: int = 8
    entries: int = 5
    width: int = 13
    vocab: int = 850
    padded: int = 1003
    cap: float | None = 30.0
    chunk: int = 16
    dtype: Any = jnp.float32

    def head(self) -> Head:
        return Head(self.vocab, self.cap, self.block, self.chunk)

    def arrays(self, seed: int = 0) -> tuple[jax.Array, jax.Array, Targets]:
        """Logits of about ±cap, so that the cap saturates; every block uses other slot counts."""
        random = np.random.default_rng(seed)
        scale = 1.2 * (self.cap or 10.0) / self.width**0.5
        hidden = random.normal(size=(self.batch, self.tokens, self.width)) * scale
        table = random.normal(size=(self.padded, self.width))
        slots = self.block * self.entries
        ids, positions, weights = [], [], []
        for block in itertools.product(range(self.batch), range(self.tokens // self.block)):
            first = block[1] * self.block
            counts = random.multinomial(
                slots - random.integers(0, slots // 2), np.ones(self.block) / self.block
            )
            id_ = np.concatenate(
                [np.sort(random.choice(self.vocab, count, replace=False)) for count in counts]
            )
            missing = slots - counts.sum()
            ids.append(np.concatenate([id_, np.full(missing, -1)]))
            position = np.repeat(first + np.arange(self.block), counts)
            positions.append(np.concatenate([position, np.full(missing, first + self.block - 1)]))
            weight = random.uniform(0.05, 0.6, counts.sum())
            weights.append(np.concatenate([weight, np.zeros(missing)]))
        ids = np.reshape(ids, (self.batch, -1)).astype(np.int32)
        labels = random.integers(0, self.vocab, (self.batch, self.tokens)).astype(np.int32)
        # The label of every second row is an entry of its position, as it usually is.
        positions = np.reshape(positions, (self.batch, -1)).astype(np.int32)
        for slot in range(0, ids.shape[1], 2):
            if ids[0, slot] >= 0:
                labels[0, positions[0, slot]] = ids[0, slot]
        shape = (self.batch, self.tokens)
        targets = Targets(
            labels=jnp.asarray(labels),
            label_weight=jnp.asarray(random.uniform(size=shape) < 0.8, jnp.float32),
            entry_id=jnp.asarray(ids),
            entry_position=jnp.asarray(positions),
            entry_weight=jnp.asarray(np.reshape(weights, ids.shape), jnp.float32),
            entry_scale=jnp.asarray(random.uniform(0.5, 1.5, shape), jnp.float32),
        )
        return jnp.asarray(hidden, self.dtype), jnp.asarray(table, jnp.float32), targets


CASES = {
    "odd width, padded rows": Case(),
    "V=4225, chunks that do not divide": Case(vocab=4224, padded=4225, width=17, chunk=40),
    "no padded row": Case(vocab=333, padded=333, chunk=8),
    "one chunk": Case(chunk=4096),
    "chunk below a block": Case(chunk=1),
    "no cap": Case(cap=None),
    "cap above the bound": Case(cap=70.0),
    "one block a row": Case(tokens=7, block=7, entries=3, chunk=14),
}


@functools.cache
def differentiated(loss: Any, case: Case) -> Any:
    """alpha → (losses, gradients to hidden and table), compiled once for all alphas."""
    hidden, table, targets = case.arrays()

    def scalar(hidden: jax.Array, table: jax.Array, alpha: jax.Array) -> Any:
        losses = loss(hidden, table, mixed(targets, alpha), case.head())
        return 0.01 * losses.loss, losses

    gradient = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))
    return lambda alpha: gradient(hidden, table, jnp.float32(alpha))


def mixed(targets: Targets, alpha: Any) -> Targets:
    """Alpha for the stored targets, the rest for the labels."""
    return targets._replace(
        label_weight=(1 - alpha) * targets.label_weight, entry_scale=alpha * targets.entry_scale
    )


def value_and_gradients(loss: Any, case: Case, alpha: float) -> tuple[Losses, Any]:
    gradients, losses = differentiated(loss, case)(alpha)
    return losses, gradients


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    actual, expected = (np.asarray(a.astype(jnp.float32), np.float64) for a in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_loss_and_gradients_equal_the_dense_oracle(name: str, alpha: float) -> None:
    sums, gradients = value_and_gradients(sparse_target_loss, CASES[name], alpha)
    expected_sums, expected = value_and_gradients(dense_oracle, CASES[name], alpha)
    for actual, wanted in zip(sums, expected_sums, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-6, atol=2e-5)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert relative_error(actual, wanted) < 3e-6


@pytest.mark.parametrize("cap", [None, 30.0, 60.0, 70.0])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_bfloat16_gradients_are_as_close_as_their_rounding(alpha: float, cap: float | None) -> None:
    case = Case(dtype=jnp.bfloat16, vocab=4224, padded=4225, width=17, cap=cap)
    sums, (dx, dw) = value_and_gradients(sparse_target_loss, case, alpha)
    expected_sums, (expected_dx, expected_dw) = value_and_gradients(rounded_oracle, case, alpha)
    assert dx.dtype == jnp.bfloat16
    assert dw.dtype == jnp.float32
    np.testing.assert_allclose(sums.position_kd, expected_sums.position_kd, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(sums.loss, expected_sums.loss, rtol=1e-5)
    # bf16 rounds to 2^-9 relative; the oracle rounds its own dx and dw once as well.
    assert relative_error(dx, expected_dx) < 6e-3
    assert relative_error(dw, expected_dw) < 4e-3


BREAKS = {
    "cap switched off": lambda head, targets: (head._replace(final_cap=None), targets),
    "padded rows not masked": lambda head, targets: (head._replace(valid_vocab=1003), targets),
    "mass taken as 1": lambda head, targets: (head, normalised(targets)),
    "label mask ignored": lambda head, targets: (
        head,
        targets._replace(label_weight=jnp.ones_like(targets.label_weight)),
    ),
    "entry scale ignored": lambda head, targets: (
        head,
        targets._replace(entry_scale=jnp.ones_like(targets.entry_scale)),
    ),
}


def normalised(targets: Targets) -> Targets:
    batch, tokens = targets.labels.shape
    row = jnp.arange(batch)[:, None]
    mass = jnp.zeros((batch, tokens)).at[row, targets.entry_position].add(targets.entry_weight)
    own = jnp.take_along_axis(mass, targets.entry_position, axis=1)
    return targets._replace(entry_weight=targets.entry_weight / jnp.maximum(own, 1e-9))


@pytest.mark.parametrize("name", BREAKS)
def test_the_cases_notice_each_missing_feature(name: str) -> None:
    """The oracle with one feature off must be far from the loss: else the cases prove nothing."""

    def broken(hidden: Any, table: Any, targets: Targets, head: Head) -> Losses:
        head, targets = BREAKS[name](head, targets)
        return dense_oracle(hidden, table, targets, head)

    sums, (dx, dw) = value_and_gradients(sparse_target_loss, Case(), 0.7)
    broken_sums, (broken_dx, broken_dw) = value_and_gradients(broken, Case(), 0.7)
    assert abs(float(broken_sums.loss / sums.loss) - 1) > 1e-3
    assert relative_error(broken_dx, dx) > 1e-2
    assert relative_error(broken_dw, dw) > 1e-3


def test_the_logits_saturate_the_cap() -> None:
    hidden, table, _ = Case().arrays()
    logits = jnp.einsum("btd,vd->btv", hidden, table)
    assert float(jnp.mean(jnp.abs(logits) > 30.0)) > 0.2


def test_without_stored_targets_only_labels_count() -> None:
    case = Case()
    hidden, table, targets = case.arrays()
    bare = targets._replace(
        entry_id=jnp.zeros((3, 0), jnp.int32),
        entry_position=jnp.zeros((3, 0), jnp.int32),
        entry_weight=jnp.zeros((3, 0)),
    )
    head = case.head()._replace(block_tokens=1, chunk_tokens=10)

    def scalar(loss: Any, targets: Targets, head: Head) -> Any:
        return jax.jit(jax.grad(lambda x, w: loss(x, w, targets, head).loss, argnums=(0, 1)))

    actual = scalar(sparse_target_loss, bare, head)(hidden, table)
    expected = scalar(dense_oracle, mixed(targets, 0.0), case.head())(hidden, table)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 3e-6


def arrays_of(jaxpr: Jaxpr) -> list[tuple[int, ...]]:
    """Shapes of every value of a jaxpr and of all jaxprs inside it."""
    shapes = []
    for equation in jaxpr.eqns:
        shapes += [variable.aval.shape for variable in equation.outvars]
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(parameter, ClosedJaxpr):
                parameter = parameter.jaxpr
            if isinstance(parameter, Jaxpr):
                shapes += arrays_of(parameter)
    return shapes


def largest(loss: Any, case: Case, differentiate: bool) -> int:
    hidden, table, targets = case.arrays()

    def scalar(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return loss(hidden, table, targets, case.head()).loss

    function = jax.value_and_grad(scalar, argnums=(0, 1)) if differentiate else scalar
    shapes = arrays_of(jax.make_jaxpr(function)(hidden, table).jaxpr)
    assert shapes
    return max(int(np.prod(shape)) for shape in shapes)


@pytest.mark.parametrize("differentiate", [False, True])
def test_no_array_holds_the_logits_of_all_tokens(differentiate: bool) -> None:
    case = Case(batch=4, tokens=64, width=7, chunk=16)
    assert largest(dense_oracle, case, differentiate) >= 4 * 64 * case.vocab
    assert largest(sparse_target_loss, case, differentiate) == 16 * case.padded


# Three chunks of three blocks, and five: one block, then two in each.
@pytest.mark.parametrize(("chunk", "copies"), [(24, 1), (16, 2)])
def test_without_differentiation_no_gradient_product_is_done(chunk: int, copies: int) -> None:
    case = Case(chunk=chunk)
    hidden, table, targets = case.arrays()

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return sparse_target_loss(hidden, table, targets, case.head()).loss

    def products(function: Any) -> int:
        return jax.jit(function).lower(hidden, table).as_text().count("dot_general")

    # Of the first chunk, if it is unlike the others, and of those in a loop.
    assert products(loss) == copies
    # The first one makes the table's gradient.
    assert products(jax.grad(loss, argnums=(0, 1))) == 2 * 3


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    case = Case()
    hidden, table, targets = case.arrays()
    with pytest.raises(ConfigError, match=r"24 tokens with 120 entry slots are not blocks of 7"):
        sparse_target_loss(hidden, table, targets, case.head()._replace(block_tokens=7))
