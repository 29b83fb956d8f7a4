"""Teacher and targets: what is stored beside the entries, masks, batches, seeds and memory."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from logit_store.decode import TargetRows

from gemma2 import checkpoint
from gemma2.model import hidden_states, init_params, logits
from logit_store.layout import UNUSED_ID, predicted_mask
from schemas.errors import BudgetError, ConfigError
from schemas.manifest import SamplerSpec
from schemas.model import ModelConfig
from teacher_dump import teacher as teachers
from teacher_dump.targets import compute_rows
from teacher_dump.teacher import Gemma2Teacher

ROWS, LENGTH, BLOCK = 5, 32, 8
VOCAB = 301
MODEL = ModelConfig(
    vocab_size=320,
    d_model=16,
    num_layers=2,
    mlp_width=24,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    query_scalar=8,
    window_tokens=8,
    max_tokens=LENGTH,
)
SPEC = SamplerSpec(entries_per_token=6, block_tokens=BLOCK)


@pytest.fixture(scope="module")
def params() -> Any:
    params = init_params(MODEL, jax.random.key(3))
    # Loud enough that most padded rows would be sampled and that the final soft-cap bites.
    params["final_norm"]["weight"] = params["final_norm"]["weight"] + 6.0
    return params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, params: Any) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    checkpoint.save(folder, MODEL, params)
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Gemma2Teacher:
    return Gemma2Teacher(folder, "float32", VOCAB)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(4, VOCAB, (ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def segment_ids() -> np.ndarray:
    """Documents that end inside blocks and at their edges; the last row is half padding."""
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 8:] = 2
    segments[2, 5:] = 2
    segments[2, 6:] = 3
    segments[4, 13:] = 0
    return segments


def compute(
    teacher: Gemma2Teacher, tokens: np.ndarray, segments: np.ndarray, **other: Any
) -> TargetRows:
    settings: dict[str, Any] = {
        "rows": np.arange(len(tokens)) + 10,
        "spec": SPEC,
        "seed": 1,
        "weight_code": "log_uint8",
        "batch_sequences": 2,
    }
    settings |= other
    return compute_rows(teacher, tokens, segments, settings.pop("rows"), **settings)


def assert_equal(actual: TargetRows, expected: TargetRows, rows: Any = slice(None)) -> None:
    for field in fields(TargetRows):
        np.testing.assert_array_equal(
            getattr(actual, field.name), getattr(expected, field.name)[rows], err_msg=field.name
        )


def dense_log_probs(
    params: Any, tokens: np.ndarray, segments: np.ndarray, temperature: float
) -> np.ndarray:
    hidden = hidden_states(
        params, MODEL, jnp.asarray(tokens), jnp.asarray(segments), dtype=jnp.float32
    )
    scores = np.asarray(logits(params, MODEL, hidden), np.float64)[..., :VOCAB] / temperature
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_entropy_and_label_are_of_the_sampled_distribution(
    teacher: Gemma2Teacher,
    params: Any,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    temperature: float,
) -> None:
    spec = SPEC.model_copy(update={"temperature": temperature})
    result = compute(teacher, tokens, segment_ids, spec=spec)
    log_probs = dense_log_probs(params, tokens, segment_ids, temperature)
    predicted = predicted_mask(segment_ids)
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=-1)
    label = np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    label = np.pad(label, ((0, 0), (0, 1)))
    assert np.ptp(entropy[predicted]) > 0.5
    np.testing.assert_allclose(
        result.teacher_entropy, np.where(predicted, entropy, 0), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        result.label_logprob, np.where(predicted, label, 0), rtol=1e-3, atol=1e-3
    )
    # Heads are that distribution too: the largest probability of every position is stored.
    counts = result.entry_count.astype(int)
    assert (counts[~predicted] == 0).all()
    assert (counts[predicted] > 0).mean() > 0.9
    best = log_probs.argmax(axis=-1)
    slots = result.entry_id.reshape(ROWS, LENGTH // BLOCK, -1)
    for row, position in np.argwhere(predicted & (np.exp(log_probs.max(axis=-1)) > 0.5)):
        assert best[row, position] in slots[row, position // BLOCK]


def test_stored_rows_have_the_formats_shapes_and_types(
    teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    result = compute(teacher, tokens, segment_ids, weight_code="log_uint16")
    shapes = {field.name: getattr(result, field.name).shape for field in fields(result)}
    entries = (ROWS, LENGTH * SPEC.entries_per_token)
    per_token = (ROWS, LENGTH)
    assert shapes == {
        "entry_count": per_token,
        "entry_id": entries,
        "entry_weight": entries,
        "weight_floor": (ROWS, LENGTH // BLOCK),
        "teacher_entropy": per_token,
        "label_logprob": per_token,
    }
    types = [getattr(result, field.name).dtype.name for field in fields(result)]
    assert types == ["uint16", "uint32", "uint16", "float32", "float16", "float16"]
    # Unused slots are all alike, in a block of padding and at the end of another.
    top_k = SamplerSpec(name="top_k", entries_per_token=6, block_tokens=BLOCK)
    partly = compute(teacher, tokens, segment_ids, spec=top_k)
    unused = (partly.entry_id == UNUSED_ID).reshape(ROWS, LENGTH // BLOCK, -1)
    assert (unused.any(axis=2) & ~unused.all(axis=2)).sum() > 3
    assert (partly.entry_weight[partly.entry_id == UNUSED_ID] == 0).all()
    assert (result.entry_id[4, -2 * BLOCK * 6 :] == UNUSED_ID).all()
    assert (result.weight_floor[4, 2:] == 1).all()
    assert (result.entry_weight[result.entry_id == UNUSED_ID] == 0).all()


def test_tails_are_code_0(
    teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    result = compute(teacher, tokens, segment_ids)
    used = result.entry_id != UNUSED_ID
    share = (result.entry_weight[used] == 0).mean()
    assert 0.4 < share < 0.99


def test_ids_beyond_the_tokenizer_are_never_stored(
    folder: Path, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    """The same checkpoint with all its rows as vocabulary does store them."""
    for vocab, beyond in ((VOCAB, 0), (MODEL.vocab_size, 10)):
        result = compute(Gemma2Teacher(folder, "float32", vocab), tokens, segment_ids)
        used = result.entry_id != UNUSED_ID
        assert (result.entry_id[used] >= VOCAB).sum() >= beyond
        assert beyond or result.entry_id[used].max() < VOCAB


def test_a_row_does_not_depend_on_its_batch(
    teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    everything = compute(teacher, tokens, segment_ids)
    order = np.array([3, 0, 4])
    chosen = compute(teacher, tokens[order], segment_ids[order], rows=order + 10)
    assert_equal(chosen, everything, order)
    alone = compute(teacher, tokens[4:], segment_ids[4:], rows=np.array([14]))
    assert_equal(alone, everything, slice(4, 5))


def test_rows_blocks_and_seeds_have_randomness_of_their_own(teacher: Gemma2Teacher) -> None:
    """Each block is the same document: nothing but row, block and seed tell the results apart."""
    document = np.random.default_rng(1).integers(4, VOCAB, BLOCK).astype(np.int32)
    tokens = np.tile(document, (2, LENGTH // BLOCK))
    segments = np.tile(np.repeat(np.arange(1, LENGTH // BLOCK + 1), BLOCK), (2, 1)).astype(np.int32)
    results = [
        compute(teacher, tokens, segments, seed=seed) for seed in (0, 1, 2**32, 2**32 + 1, 2**40)
    ]
    blocks = [
        block.tobytes()
        for result in results
        for row in result.entry_id
        for block in np.split(row, LENGTH // BLOCK)
    ]
    # One number decides a block's picks, so that two blocks may agree by chance.
    assert len(set(blocks)) > 0.8 * len(blocks)
    assert_equal(compute(teacher, tokens, segments, seed=0), results[0])


def test_bfloat16_is_close_and_is_not_float32(
    folder: Path, teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    half = compute(Gemma2Teacher(folder, "bfloat16", VOCAB), tokens, segment_ids)
    full = compute(teacher, tokens, segment_ids)
    error = np.abs(half.teacher_entropy.astype(float) - full.teacher_entropy)
    assert error.max() > 0
    assert error.mean() < 0.1


def test_entries_that_do_not_fit_are_refused_by_name(
    teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    spec = SamplerSpec(name="multinomial", entries_per_token=1, block_tokens=BLOCK, draws=30)
    message = r"must fit its 8 slots, but .* the multinomial sampler do not in block 0 of row 10"
    with pytest.raises(BudgetError, match=message):
        compute(teacher, tokens, segment_ids, spec=spec)
    spec = SamplerSpec(entries_per_token=VOCAB + 1, block_tokens=BLOCK)
    with pytest.raises(BudgetError, match=f"at most the vocabulary size {VOCAB}, but it is 302"):
        compute(teacher, tokens, segment_ids, spec=spec)


def test_a_teacher_of_fewer_ids_than_the_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has 320 and the tokenizer 321"):
        Gemma2Teacher(folder, "float32", 321)


def test_the_teacher_says_who_it_is(folder: Path, teacher: Gemma2Teacher) -> None:
    config, weights = checkpoint.fingerprint(folder)
    info = teacher.info
    assert (info.name, info.config_sha256, info.weights_sha256, info.vocab_size) == (
        "model",
        config,
        weights,
        VOCAB,
    )


def largest_array(jaxpr: Jaxpr) -> int:
    """Elements of the largest value that a program makes, inner programs included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [getattr(variable.aval, "size", 0) for variable in equation.outvars]
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, ClosedJaxpr):
                    sizes.append(largest_array(inner.jaxpr))
                elif isinstance(inner, Jaxpr):
                    sizes.append(largest_array(inner))
    return max(sizes)


def test_logits_of_more_than_a_block_never_exist() -> None:
    model = MODEL.model_copy(update={"vocab_size": 4001})
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    spec = SamplerSpec(entries_per_token=6, block_tokens=16)
    batch, length = 4, 128
    shape = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def run(params: Any, tokens: Any, segments: Any, predicted: Any, rows: Any) -> Any:
        return teachers._targets(
            params,
            tokens,
            segments,
            predicted,
            rows,
            jax.random.key(0),
            config=model,
            dtype=jnp.dtype("float32"),
            spec=spec,
            vocab_size=3999,
        )

    jaxpr = jax.make_jaxpr(run)(
        params,
        shape,
        shape,
        jax.ShapeDtypeStruct((batch, length), jnp.bool),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    largest = largest_array(jaxpr.jaxpr)
    # Chunks round the vocabulary up to 4096; attention scores are 4 x 2 x 128 x 128.
    assert 16 * 4001 <= largest <= max(16 * 4096, batch * 2 * length * length)
    assert largest < length * 4001
