"""Samplers: what a block holds, exactly; the threshold's oracle; edge cases; variance; resolution.

That the stored bytes are unbiased is tested in test_teacher_dump_unbiased.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import BudgetError
from schemas.manifest import SamplerSpec
from teacher_dump import samplers
from teacher_dump.samplers import BlockTargets, check, sample_block, sample_block_jit


def log_probabilities(
    positions: int, vocab: int, seed: int = 0, sharpest: float = 7.0
) -> jax.Array:
    """Log-probabilities [B, V] whose entropies run from sharp to flat over the block."""
    random = np.random.default_rng(seed)
    scale = np.linspace(sharpest, 0.5, positions)[:, None]
    return jax.nn.log_softmax(
        jnp.asarray(random.normal(size=(positions, vocab)) * scale, jnp.float32)
    )


def some_predicted(positions: int) -> jax.Array:
    return jnp.asarray(np.arange(positions) % 7 != 3)


def masses(log_probs: jax.Array, predicted: jax.Array) -> np.ndarray:
    """The probabilities [B, V] in float64; 0 where nothing is predicted."""
    return np.where(np.asarray(predicted)[:, None], np.exp(np.asarray(log_probs, np.float64)), 0.0)


def exact_tau(p: np.ndarray, slots: int) -> float:
    """The threshold by sorting: the first number of heads whose tail lies below its own tau."""
    order = np.sort(p.reshape(-1))[::-1]
    tail = np.cumsum(order[::-1])[::-1]
    heads = np.arange(slots)
    tau = tail[:slots] / (slots - heads)
    return float(tau[np.argmax(order[:slots] < tau)])


def check_block(block: BlockTargets, p: np.ndarray, slots: int) -> tuple[np.ndarray, ...]:
    """Assert what every block obeys; returns position, id and weight of the used entries."""
    ids, positions, weights, counts = (np.asarray(x) for x in block[:4])
    assert ids.shape == positions.shape == weights.shape == (slots,)
    assert not bool(block.overflow)
    used = int(counts.sum())
    assert (ids[:used] >= 0).all()
    assert (ids[used:] == -1).all()
    assert (weights[used:] == 0).all()
    assert (positions[used:] == len(p) - 1).all()
    ids, positions, weights = ids[:used], positions[:used], weights[:used]
    flat = positions.astype(np.int64) * p.shape[1] + ids
    assert (np.diff(flat) > 0).all()
    np.testing.assert_array_equal(counts, np.bincount(positions, minlength=len(p)))
    assert (p[positions, ids] > 0).all()
    assert float(block.floor) == (weights.min() if used else 1.0)
    return positions, ids, weights


SHAPES = [(256, 1000, 12), (64, 4097, 12), (16, 128, 40), (1, 1000, 12)]


@pytest.mark.parametrize(("positions", "vocab", "entries"), SHAPES)
def test_threshold_fills_its_budget_with_exact_heads_and_equal_tails(
    positions: int, vocab: int, entries: int
) -> None:
    spec = SamplerSpec(entries_per_token=entries, block_tokens=positions)
    log_probs, predicted = log_probabilities(positions, vocab), some_predicted(positions)
    p = masses(log_probs, predicted)
    tau = exact_tau(p, spec.entries_per_block)
    for seed in range(5):
        block = sample_block_jit(spec, log_probs, predicted, jax.random.key(seed))
        position, id_, weight = check_block(block, p, spec.entries_per_block)
        assert len(id_) == spec.entries_per_block
        np.testing.assert_allclose(float(block.floor), tau, rtol=3e-4)
        is_head = p[position, id_] > tau * 1.0003
        assert is_head.sum() == (p > tau * 1.0003).sum() > 0
        np.testing.assert_allclose(weight[is_head], p[position, id_][is_head], rtol=1e-6)
        is_tail = p[position, id_] < tau * 0.9997
        assert is_tail.sum() > 0
        assert len(set(weight[is_tail].tolist())) == 1
        np.testing.assert_allclose(weight[is_tail], tau, rtol=3e-4)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sharpest=st.floats(0.0, 40.0),
    predicted=st.lists(st.booleans(), min_size=8, max_size=8),
    cut=st.integers(1, 300),
)
def test_threshold_on_any_block(
    seed: int, sharpest: float, predicted: list[bool], cut: int
) -> None:
    """All of the support if it fits the budget, else exactly the budget; only `cut` ids exist."""
    spec = SamplerSpec(entries_per_token=9, block_tokens=8)
    is_real = jnp.arange(300) < cut
    logits = jnp.where(is_real[None, :], log_probabilities(8, 300, seed, sharpest), -jnp.inf)
    log_probs, mask = jax.nn.log_softmax(logits), jnp.asarray(predicted)
    p = masses(log_probs, mask)
    p[p < np.finfo(np.float32).tiny] = 0.0
    block = sample_block_jit(spec, log_probs, mask, jax.random.key(seed))
    position, id_, weight = check_block(block, p, 72)
    support = int((p > 0).sum())
    assert len(id_) == min(support, 72)
    if support <= 72:
        np.testing.assert_allclose(weight, p[position, id_], rtol=1e-6)
    else:
        tau = exact_tau(p, 72)
        np.testing.assert_allclose(weight, np.maximum(p[position, id_], tau), rtol=1e-2)


@pytest.mark.parametrize("name", ["threshold", "multinomial", "top_k", "full"])
def test_nothing_predicted_gives_nothing(name: str) -> None:
    spec = SamplerSpec.model_validate(
        {"name": name, "entries_per_token": 130, "block_tokens": 4}
        | ({"draws": 5} if name == "multinomial" else {})
    )
    log_probs, nothing = log_probabilities(4, 130), jnp.zeros(4, bool)
    block = sample_block_jit(spec, log_probs, nothing, jax.random.key(0))
    position, _, _ = check_block(block, masses(log_probs, nothing), 520)
    assert len(position) == 0


def test_a_certain_position_costs_one_entry() -> None:
    """Sure tokens leave their budget to the others."""
    spec = SamplerSpec(entries_per_token=6, block_tokens=4)
    log_probs = jnp.full((4, 500), -jnp.inf).at[:3, 17].set(0.0).at[3].set(-jnp.log(500.0))
    block = sample_block_jit(spec, log_probs, jnp.ones(4, bool), jax.random.key(0))
    check_block(block, masses(log_probs, jnp.ones(4)), 24)
    assert block.entry_count.tolist() == [1, 1, 1, 21]
    assert block.entry_weight[:3].tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(block.entry_weight[3:], 1 / 21, rtol=1e-6)


def test_a_tail_is_kept_where_near_heads_would_use_up_the_budget() -> None:
    """The second of two slots is shared by what is just below tau and a sliver, not given away."""
    spec = SamplerSpec(entries_per_token=2, block_tokens=1)
    log_probs = jnp.log(jnp.asarray([[0.5, 0.49998, 2e-5]], jnp.float32))
    block = sample_block_jit(spec, log_probs, jnp.ones(1, bool), jax.random.key(0))
    assert block.entry_id.tolist() == [0, 1]
    np.testing.assert_allclose(block.entry_weight, [0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("vocab", [13, 300])
def test_equal_probabilities_fill_the_budget(vocab: int) -> None:
    spec = SamplerSpec(entries_per_token=12, block_tokens=16)
    log_probs = jnp.full((16, vocab), -jnp.log(jnp.float32(vocab)))
    for seed in range(20):
        block = sample_block_jit(spec, log_probs, jnp.ones(16, bool), jax.random.key(seed))
        check_block(block, masses(log_probs, jnp.ones(16)), 192)
        assert int(block.entry_count.sum()) == 192
        # Systematic sampling also spreads them: every position gets its share.
        assert block.entry_count.tolist() == [12] * 16


def test_the_smallest_tail_is_sampled_with_its_own_probability() -> None:
    """2,000 ids of 5e-10 after one of almost 1: float32 has 17 numbers between them and 1."""
    small = 5e-10
    first = 128  # The large one has a chunk of its own.
    vocab = first + 2000
    p = jnp.full((1, vocab), small).at[0, :first].set(0.0).at[0, 0].set(1.0 - 2000 * small)
    chunked = samplers._chunked(p)
    mass = jnp.sum(chunked, axis=2)
    draws = 400_000
    fraction = 1.0 - jnp.float32(2000 * small) * jax.random.uniform(jax.random.key(0), (draws,))
    ids = np.asarray(
        jax.jit(samplers._pick, static_argnames="vocab")(
            chunked,
            mass,
            jnp.float32(jnp.inf),
            jnp.zeros(draws, jnp.int32),
            fraction,
            jax.random.key(1),
            vocab=vocab,
        )
    )
    assert len(np.unique(fraction)) < 40
    counts = np.bincount(ids, minlength=vocab)[first:]
    expected = draws / 2000
    # 200 +- 14 each, but where the range begins.
    assert counts[100:].min() > 0.6 * expected
    assert counts[100:].max() < 1.5 * expected


def test_points_per_position_are_its_mass_rounded_up_or_down() -> None:
    """Sums that float32 cannot hold: the excess of the others comes off the largest position."""
    mass = jnp.asarray([2.0, 1.0 + 2**-20, 1.0 + 2**-20], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 500)
    position, fraction = jax.jit(
        jax.vmap(lambda key: samplers._systematic(mass, jnp.int32(4), 4, key))
    )(keys)
    counts = np.stack([np.bincount(row, minlength=3) for row in np.asarray(position)])
    assert (counts == [2, 1, 1]).mean() > 0.99
    # One place is uniform over a position of one point; two are half a position apart.
    assert np.asarray(fraction)[:, 2].mean() == pytest.approx(0.5, abs=0.06)
    gaps = np.diff(np.asarray(fraction)[:, :2], axis=1)
    np.testing.assert_allclose(gaps[counts[:, 0] == 2], 0.5, atol=1e-5)


def test_ids_without_probability_are_never_picked() -> None:
    """Every other chunk, and all but one id in the others, have no mass."""
    log_probs = np.full((8, 4097), -np.inf, np.float32)
    log_probs[:, 5::256] = np.random.default_rng(0).normal(size=(8, 16)) * 3
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(log_probs)))
    for spec in (
        SamplerSpec(entries_per_token=4, block_tokens=8),
        SamplerSpec(name="multinomial", entries_per_token=16, block_tokens=8, draws=200),
    ):
        for seed in range(50):
            block = sample_block_jit(
                spec, jnp.asarray(log_probs), jnp.ones(8, bool), jax.random.key(seed)
            )
            check_block(block, np.exp(log_probs), spec.entries_per_block)


def test_top_k_is_the_k_largest() -> None:
    spec = SamplerSpec(name="top_k", entries_per_token=5, block_tokens=16)
    log_probs, predicted = log_probabilities(16, 1000), some_predicted(16)
    p = masses(log_probs, predicted)
    block = sample_block_jit(spec, log_probs, predicted, jax.random.key(0))
    position, id_, weight = check_block(block, p, 80)
    expected = np.zeros_like(p, bool)
    np.put_along_axis(expected, np.argsort(-p, axis=1)[:, :5], True, axis=1)
    expected &= np.asarray(predicted)[:, None]
    np.testing.assert_array_equal(np.stack([position, id_], 1), np.argwhere(expected))
    np.testing.assert_allclose(weight, p[expected], rtol=1e-6)


def test_multinomial_weights_are_counts_of_draws() -> None:
    spec = SamplerSpec(name="multinomial", entries_per_token=40, block_tokens=16, draws=40)
    log_probs, predicted = log_probabilities(16, 1000), some_predicted(16)
    p = masses(log_probs, predicted)
    block = sample_block_jit(spec, log_probs, predicted, jax.random.key(0))
    position, _, weight = check_block(block, p, 640)
    np.testing.assert_allclose(weight * 40, np.round(weight * 40), atol=1e-4)
    np.testing.assert_allclose(float(block.floor), 1 / 40, rtol=1e-6)
    mass = np.bincount(position, weight, minlength=16)
    np.testing.assert_allclose(mass, np.asarray(predicted), atol=1e-5)
    assert weight.max() > 0.3


def test_full_is_everything() -> None:
    spec = SamplerSpec(name="full", entries_per_token=130, block_tokens=4)
    log_probs, predicted = log_probabilities(4, 130), jnp.asarray([True, False, True, True])
    p = masses(log_probs, predicted)
    block = sample_block_jit(spec, log_probs, predicted, jax.random.key(0))
    position, id_, weight = check_block(block, p, 520)
    assert len(id_) == 390
    np.testing.assert_allclose(weight, p[position, id_], rtol=1e-6)


def test_entries_that_do_not_fit_are_flagged() -> None:
    spec = SamplerSpec(name="multinomial", entries_per_token=2, block_tokens=16, draws=40)
    block = sample_block_jit(
        spec, log_probabilities(16, 1000), jnp.ones(16, bool), jax.random.key(0)
    )
    assert bool(block.overflow)


@pytest.mark.parametrize(
    ("settings_", "vocab", "message"),
    [
        ({"name": "full"}, 100, "stores the whole vocabulary, so entries_per_token must be 100"),
        ({"entries_per_token": 101}, 100, "must be at most the vocabulary size 100, but it is 101"),
        ({"block_tokens": 8192}, 2**18, "must be below 2147483647, but it is 8192 x 262144"),
    ],
)
def test_impossible_budgets_are_refused(settings_: dict, vocab: int, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        check(SamplerSpec.model_validate(settings_), vocab)


def test_jit_scan_and_vmap_agree() -> None:
    spec = SamplerSpec(entries_per_token=9, block_tokens=8)
    log_probs = jnp.stack([log_probabilities(8, 300, seed) for seed in range(3)])
    predicted = jnp.stack([some_predicted(8), jnp.ones(8, bool), jnp.zeros(8, bool)])
    keys = jax.random.split(jax.random.key(0), 3)
    one = partial(sample_block, spec)
    alone = [sample_block_jit(spec, *x) for x in zip(log_probs, predicted, keys, strict=True)]
    expected = jax.tree.map(lambda *x: np.stack(x), *alone)
    vmapped = jax.jit(jax.vmap(one))(log_probs, predicted, keys)
    mapped = jax.jit(lambda *x: jax.lax.map(lambda item: one(*item), x))(log_probs, predicted, keys)
    for other in (vmapped, mapped):
        for field in ("entry_id", "entry_position", "entry_count", "overflow"):
            np.testing.assert_array_equal(getattr(other, field), getattr(expected, field))
        np.testing.assert_allclose(other.entry_weight, expected.entry_weight, rtol=1e-6)


def test_threshold_has_less_variance_than_draws_at_equal_entries() -> None:
    """E||p^ - p||^2 over a block of sharp and flat positions; FACTS: 0.35 to 0.7 of the draws'."""
    positions, vocab, seeds = 32, 1000, 200
    log_probs, predicted = log_probabilities(positions, vocab), jnp.ones(positions, bool)
    p = jnp.exp(log_probs)
    keys = jax.random.split(jax.random.key(0), seeds)

    def squared_error(spec: SamplerSpec) -> tuple[float, float]:
        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            block = sample_block(spec, log_probs, predicted, key)
            dense = (
                jnp.zeros_like(p)
                .at[block.entry_position, block.entry_id]
                .add(block.entry_weight, mode="drop")
            )
            return jnp.sum(jnp.square(dense - p)), jnp.sum(block.entry_count)

        error, entries = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
        return float(jnp.mean(error)), float(jnp.mean(entries)) / positions

    draws = SamplerSpec(name="multinomial", entries_per_token=50, block_tokens=positions, draws=24)
    draws_error, draws_entries = squared_error(draws)
    rounded = int(draws_entries)
    assert 8 <= rounded <= 20
    # Rounded down: the threshold gets no more entries than the draws used.
    threshold = SamplerSpec(entries_per_token=rounded, block_tokens=positions)
    threshold_error, threshold_entries = squared_error(threshold)
    assert threshold_entries == rounded <= draws_entries
    assert threshold_error < 0.6 * draws_error
    # Each is what theory says: sum p (tau - p) of the tail, and (1 - sum p^2) / draws.
    exact = masses(log_probs, predicted)
    tau = exact_tau(exact, threshold.entries_per_block)
    assert threshold_error == pytest.approx((exact * np.maximum(tau - exact, 0)).sum(), rel=0.05)
    assert draws_error == pytest.approx((1 - (exact**2).sum(axis=1)).sum() / 24, rel=0.05)
