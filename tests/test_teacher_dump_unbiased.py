"""The stored bytes are unbiased: logits → sampler → weight code → store → reader → mean over rows.

A store holds the same tokens in every row, so rows differ in their seeds alone and the mean of the
decoded weights over rows must be the teacher's probability, in every class of entries. The same
check is shown to fail for top_k and for each way in which stored targets are usually spoilt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_store.decode import TargetRows

from gemma2 import checkpoint
from gemma2.model import hidden_states, init_params, logits
from logit_store import reader, writer
from logit_store.codec import decode_weights
from logit_store.layout import predicted_mask
from schemas.manifest import (
    SamplerSpec,
    TargetsManifest,
    TokenizerInfo,
    TokensManifest,
    WeightCode,
    identity,
)
from schemas.model import ModelConfig
from teacher_dump import samplers, targets
from teacher_dump.teacher import Gemma2Teacher

ROWS, LENGTH, BLOCK = 2304, 16, 8
VOCAB, EMBEDDING_ROWS = 333, 340
TEMPERATURE = 0.8
WORST_Z = 5.0

MODEL = ModelConfig(
    vocab_size=EMBEDDING_ROWS,
    d_model=32,
    num_layers=2,
    mlp_width=48,
    num_heads=2,
    num_kv_heads=1,
    head_size=16,
    query_scalar=16,
    window_tokens=8,
    max_tokens=LENGTH,
)


@dataclass(frozen=True)
class Setting:
    """A teacher, one row of tokens, and the probabilities [L, V] that its targets should mean."""

    teacher: Gemma2Teacher
    tokens: np.ndarray
    segment_ids: np.ndarray
    p: np.ndarray


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    params = init_params(MODEL, jax.random.key(0))
    # Louder logits: sharp and flat positions, and a soft-cap that bites.
    params["final_norm"]["weight"] = params["final_norm"]["weight"] + 2.5
    checkpoint.save(folder, MODEL, params)
    tokens = np.random.default_rng(1).integers(4, VOCAB, (1, LENGTH)).astype(np.int32)
    segment_ids = np.array([[1] * 6 + [2] * 7 + [0] * 3], np.uint16)
    hidden = hidden_states(
        params, MODEL, jnp.asarray(tokens), jnp.asarray(segment_ids, jnp.int32), dtype=jnp.float32
    )
    scores = np.asarray(logits(params, MODEL, hidden), np.float64)[0, :, :VOCAB] / TEMPERATURE
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[~predicted_mask(segment_ids[0])] = 0.0
    return Setting(Gemma2Teacher(folder, "float32", VOCAB), tokens, segment_ids, p)


def store(
    path: Path, setting: Setting, spec: SamplerSpec, code: WeightCode
) -> reader.TargetsReader:
    """A store of ROWS equal rows and their targets, written and opened again."""
    tokens_manifest = TokensManifest(
        tokenizer=TokenizerInfo(sha256="0", vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0),
        num_sequences=ROWS,
        sequence_tokens=LENGTH,
        shard_sequences=ROWS,
        sources=(),
        splits=(),
        software={},
    )
    manifest = TargetsManifest(
        tokens_fingerprint=identity(tokens_manifest),
        num_sequences=ROWS,
        sequence_tokens=LENGTH,
        shard_sequences=ROWS,
        teacher=setting.teacher.info,
        sampler=spec,
        weight_code=code,
        seed=5,
        batch_sequences=256,
        software={},
    )
    url = str(path)
    tokens = np.repeat(setting.tokens, ROWS, axis=0)
    segment_ids = np.repeat(setting.segment_ids, ROWS, axis=0)
    writer.create_tokens(url, tokens_manifest)
    (shard,) = writer.plan_shards(tokens_manifest)
    writer.TokensWriter(url).write(shard, tokens, segment_ids)
    writer.create_targets(url, "t", manifest)
    (shard,) = writer.plan_shards(manifest)
    rows = targets.compute_rows(
        setting.teacher,
        tokens,
        segment_ids.astype(np.int32),
        np.arange(ROWS),
        spec=spec,
        seed=manifest.seed,
        weight_code=code,
        batch_sequences=manifest.batch_sequences,
    )
    writer.TargetsWriter(url, "t").write(shard, tokens, segment_ids, rows)
    return reader.TargetsReader(url, "t")


def bias_scores(batch: reader.TargetBatch, p: np.ndarray, tau: np.ndarray) -> dict[str, float]:
    """For each class, how many standard errors its mean stored mass is from the teacher's.

    tau [L] separates heads from tails. Rows are independent, so a class's error is measured by
    its own spread over rows; the smallest error that counts is float32's, 1e-6 of the mass. The
    last score is chi-square-like: the mean square of each entry's own z, as a distance from 1 in
    its standard errors, over entries that are expected at least 30 times.
    """
    used = batch.entry_id >= 0
    row = np.nonzero(used)[0]
    flat = batch.entry_position[used].astype(np.int64) * VOCAB + batch.entry_id[used]
    weight = batch.entry_weight[used].astype(np.float64)
    rank = np.argsort(np.argsort(-p, axis=1), axis=1)
    is_head = p >= tau[:, None]
    members = {
        "head": is_head,
        "large tail": ~is_head & (p >= tau[:, None] / 10),
        "small tail": ~is_head & (p < tau[:, None] / 10),
        "rank > 100": rank > 100,
        "tail ids below 128": ~is_head & (np.arange(VOCAB)[None, :] < 128),
    }
    scores = {}
    for name, member in members.items():
        expected = p[member].sum()
        sums = np.bincount(row, weight * member.reshape(-1)[flat], minlength=ROWS)
        error = sums.std() / np.sqrt(ROWS) + 1e-6 * expected
        scores[name] = float(abs(sums.mean() - expected) / error)
    often = np.nonzero((p * ROWS / tau[:, None] >= 30).reshape(-1))[0]
    mean = (np.bincount(flat, weight, minlength=p.size) / ROWS)[often]
    square = (np.bincount(flat, weight**2, minlength=p.size) / ROWS)[often]
    expected = p.reshape(-1)[often]
    error = np.sqrt(np.maximum(square - mean**2, 0) / ROWS) + 1e-6 * expected
    z = (mean - expected) / error
    scores["each entry"] = float((np.mean(z**2) - 1) / np.sqrt(2 / len(z)))
    return scores


def taus(batch: reader.TargetBatch, p: np.ndarray) -> np.ndarray:
    """Per position, the weight that most tails have: of the block's first stored row."""
    weight = np.where(batch.entry_id[0] >= 0, batch.entry_weight[0], np.inf).reshape(-1)
    return np.repeat(weight.reshape(LENGTH // BLOCK, -1).min(axis=1) * 1.001, BLOCK)


def is_unbiased(scores: dict[str, float]) -> bool:
    return all(score < WORST_Z for score in scores.values())


def spec_of(name: str) -> SamplerSpec:
    """A sampler at about six entries a token (full: all of them)."""
    more: dict[str, Any] = {
        "threshold": {"entries_per_token": 6},
        "top_k": {"entries_per_token": 6},
        "multinomial": {"entries_per_token": 20, "draws": 20},
        "full": {"entries_per_token": VOCAB},
    }[name]
    return SamplerSpec(name=name, block_tokens=BLOCK, temperature=TEMPERATURE, **more)


@pytest.fixture(scope="module")
def threshold_batch(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> Any:
    path = tmp_path_factory.mktemp("threshold") / "store"
    return store(path, setting, spec_of("threshold"), "log_uint8").rows(np.arange(ROWS))


def test_the_check_has_something_to_check(
    threshold_batch: reader.TargetBatch, setting: Setting
) -> None:
    p, tau = setting.p, taus(threshold_batch, setting.p)[:, None]
    assert (p >= tau).sum() > 20
    assert 0.3 < p[p >= tau].sum() / p.sum() < 0.9
    assert p[(p < tau) & (p >= tau / 10)].sum() / p.sum() > 0.05
    assert p[p < tau / 10].sum() / p.sum() > 0.03
    assert (threshold_batch.entry_count.sum(axis=1) == LENGTH * 6).all()


def test_threshold_is_unbiased(threshold_batch: reader.TargetBatch, setting: Setting) -> None:
    assert samplers.SAMPLERS["threshold"].unbiased
    scores = bias_scores(threshold_batch, setting.p, taus(threshold_batch, setting.p))
    assert is_unbiased(scores), scores


def test_multinomial_in_16_bits_is_unbiased(tmp_path: Path, setting: Setting) -> None:
    assert samplers.SAMPLERS["multinomial"].unbiased
    batch = store(tmp_path / "store", setting, spec_of("multinomial"), "log_uint16").rows(
        np.arange(ROWS)
    )
    scores = bias_scores(batch, setting.p, np.full(LENGTH, 1 / 20))
    assert is_unbiased(scores), scores


def test_top_k_is_biased(tmp_path: Path, setting: Setting) -> None:
    assert not samplers.SAMPLERS["top_k"].unbiased
    batch = store(tmp_path / "store", setting, spec_of("top_k"), "log_uint8").rows(np.arange(ROWS))
    scores = bias_scores(batch, setting.p, taus(batch, setting.p))
    assert scores["small tail"] > 1000
    assert scores["rank > 100"] > 1000


def renormalise(batch: reader.TargetBatch) -> np.ndarray:
    flat = batch.entry_position + np.arange(ROWS)[:, None] * LENGTH
    mass = np.bincount(flat.reshape(-1), batch.entry_weight.reshape(-1))
    return batch.entry_weight / np.maximum(mass[flat], 1e-9)


def heavier_tails(batch: reader.TargetBatch) -> np.ndarray:
    weights = batch.entry_weight.reshape(ROWS, LENGTH // BLOCK, -1)
    floor = np.where(weights > 0, weights, np.inf).min(axis=2, keepdims=True)
    return np.where(weights <= floor * 1.001, weights * 1.02, weights).reshape(ROWS, -1)


SPOILT: dict[str, Callable[[reader.TargetBatch], np.ndarray]] = {
    "renormalised to one": renormalise,
    "tails 2 % heavier": heavier_tails,
    "everything 0.1 % lighter": lambda batch: batch.entry_weight * 0.999,
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_weights_are_noticed(
    threshold_batch: reader.TargetBatch, setting: Setting, name: str
) -> None:
    tau = taus(threshold_batch, setting.p)
    spoilt = with_weights(threshold_batch, SPOILT[name](threshold_batch))
    scores = bias_scores(spoilt, setting.p, tau)
    assert not is_unbiased(scores), scores


def with_weights(batch: reader.TargetBatch, weights: np.ndarray) -> reader.TargetBatch:
    """The batch with other weights."""
    return reader.TargetBatch(**{**vars(batch), "entry_weight": weights})


def test_rounding_to_the_nearest_code_is_noticed(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        targets, "_uniforms", lambda rows, seed, shape: np.full((len(rows), *shape), 0.5)
    )
    batch = store(tmp_path / "store", setting, spec_of("threshold"), "log_uint8").rows(
        np.arange(ROWS)
    )
    scores = bias_scores(batch, setting.p, taus(batch, setting.p))
    assert scores["each entry"] > 20, scores


def test_full_stores_every_probability_without_bias(setting: Setting) -> None:
    """By compute_rows alone: a store of all entries would be large."""
    rows = 64
    tokens, segment_ids = (
        np.repeat(x, rows, axis=0).astype(np.int32) for x in (setting.tokens, setting.segment_ids)
    )
    result: TargetRows = targets.compute_rows(
        setting.teacher,
        tokens,
        segment_ids,
        np.arange(rows),
        spec=spec_of("full"),
        seed=0,
        weight_code="log_uint16",
        batch_sequences=32,
    )
    predicted = predicted_mask(setting.segment_ids[0])
    np.testing.assert_array_equal(
        result.entry_count, np.tile(np.where(predicted, VOCAB, 0), (rows, 1))
    )
    floor = np.repeat(result.weight_floor, BLOCK * VOCAB, axis=1)
    weights = decode_weights(result.entry_weight, floor, "log_uint16")
    used = result.entry_id[0] != 0xFFFFFFFF
    mean = weights.mean(axis=0, dtype=np.float64)[used]
    np.testing.assert_allclose(mean, setting.p[predicted].reshape(-1), rtol=3e-4)
