"""The stored bytes are unbiased: logits → sampler → thinning → entry code → decoder → mean.

Rows hold the same tokens, so they differ in their seeds alone and the mean of the decoded weights
over rows must be the teacher's probability, in every class of entries. The same check is shown to
fail for top_k and for each way in which stored targets are usually spoilt.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2 import checkpoint
from gemma2.model import hidden_states, init_params, logits
from logit_store import codec, reader, writer
from logit_store.codec import Vocabulary
from logit_store.layout import predicted_mask
from logit_store.ledger import Ledger
from logit_store.rows import TargetRows
from schemas.manifest import (
    MOST_POINTS,
    Corpus,
    SamplerSpec,
    TargetsManifest,
    TokenizerInfo,
    TokensManifest,
    identity,
)
from schemas.model import ModelConfig
from teacher_dump import samplers, targets
from teacher_dump import teacher as teachers
from teacher_dump.samplers import Balance
from teacher_dump.teacher import Gemma2Teacher
from teacher_dump.vocabulary import similarity_order

ROWS, BATCH, LENGTH, BLOCK = 1536, 256, 16, 8
VOCAB, EMBEDDING_ROWS = 1400, 1410
TEMPERATURE = 0.8
SEED = 5
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
    """A teacher, one row of tokens, and the distributions that its targets should mean.

    p [L, V], 0 where nothing is predicted; entropy and label log-probability [L].
    """

    teacher: Gemma2Teacher
    order: np.ndarray
    vocabulary: Vocabulary
    tokens: np.ndarray
    segment_ids: np.ndarray
    p: np.ndarray
    entropy: np.ndarray
    label: np.ndarray

    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segment ids of all rows."""
        return np.repeat(self.tokens, ROWS, axis=0), np.repeat(self.segment_ids, ROWS, axis=0)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    params = init_params(MODEL, jax.random.key(0))
    # A few loud directions: sharp and flat positions, and a soft-cap that bites.
    loud = jnp.where(jnp.arange(MODEL.d_model) < 6, 4.8, 0.0)
    params["final_norm"]["weight"] = params["final_norm"]["weight"] + loud
    checkpoint.save(folder, MODEL, params)
    random = np.random.default_rng(1)
    tokens = random.integers(4, VOCAB, (1, LENGTH)).astype(np.int32)
    segment_ids = np.array([[1] * 6 + [2] * 7 + [0] * 3], np.uint16)
    hidden = hidden_states(
        params, MODEL, jnp.asarray(tokens), jnp.asarray(segment_ids, jnp.int32), dtype=jnp.float32
    )
    scores = np.asarray(logits(params, MODEL, hidden), np.float64)[0, :, :VOCAB] / TEMPERATURE
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    predicted = predicted_mask(segment_ids[0])
    label = np.zeros(LENGTH)
    label[:-1] = np.log(p[np.arange(LENGTH - 1), tokens[0, 1:]])
    teacher = Gemma2Teacher.load(folder, "float32", VOCAB)
    # The order of a real dump, so that what the sampler draws has to find its way back to ids.
    order = similarity_order(checkpoint.load_embedding(folder)[:VOCAB])
    teacher.arrange(order)
    counts = random.permutation((1e5 / np.arange(1, VOCAB + 1)).astype(np.int64))
    return Setting(
        teacher,
        order,
        codec.make_vocabulary(counts, 6),
        tokens,
        segment_ids,
        np.where(predicted[:, None], p, 0.0),
        np.where(predicted, -(p * np.log(p)).sum(axis=1), 0.0),
        np.where(predicted, label, 0.0),
    )


SPECS: dict[str, dict[str, Any]] = {
    "systematic": {"points": 12, "slots_per_token": 12},
    # The second block overflows in some rows, both in all, and the sampler's own room besides.
    "systematic, some thinned": {"points": 11, "slots_per_token": 5},
    "systematic, thinned": {"points": 12, "slots_per_token": 4},
    "systematic, halved": {"points": 32, "slots_per_token": 2},
    "multinomial": {"points": 20, "slots_per_token": 20},
    "multinomial, thinned": {"points": 20, "slots_per_token": 4},
    "top_k": {"points": MOST_POINTS, "slots_per_token": 6},
    "full": {"points": MOST_POINTS, "slots_per_token": VOCAB},
}


def spec_of(name: str) -> SamplerSpec:
    settings = {"name": name.split(",")[0], "block_tokens": BLOCK, "temperature": TEMPERATURE}
    return SamplerSpec.model_validate(settings | SPECS[name])


def stored_rows(setting: Setting, spec: SamplerSpec, rows: int = ROWS) -> TargetRows:
    tokens, segment_ids = setting.repeated()
    return targets.begin_rows(
        setting.teacher,
        setting.vocabulary,
        tokens[:rows],
        segment_ids[:rows].astype(np.int32),
        np.arange(rows),
        spec=spec,
        seed=SEED,
        batch_sequences=min(BATCH, rows),
    )()


@dataclass(frozen=True)
class Decoded:
    """Used entries of all rows: row, position, id int64 [n] and weight float64 [n]; block_points
    [R, blocks]."""

    rows: int
    row: np.ndarray
    position: np.ndarray
    id: np.ndarray
    weight: np.ndarray
    block_points: np.ndarray


def decode(setting: Setting, spec: SamplerSpec, stored: TargetRows) -> Decoded:
    predicted = np.repeat(predicted_mask(setting.segment_ids), len(stored.head_count), axis=0)
    entries = codec.check_rows(
        setting.vocabulary, predicted, stored.columns(), BLOCK, spec.slots_per_block, 0
    )
    position = codec.entry_positions(
        entries.head_count, entries.tail_count, BLOCK, spec.slots_per_block
    )
    used = entries.entry_id >= 0
    return Decoded(
        len(used),
        np.nonzero(used)[0],
        position[used].astype(np.int64),
        entries.entry_id[used].astype(np.int64),
        entries.entry_weight[used].astype(np.float64),
        stored.block_points,
    )


def decoded(setting: Setting, name: str) -> Decoded:
    spec = spec_of(name)
    return decode(setting, spec, stored_rows(setting, spec))


def bias_scores(found: Decoded, p: np.ndarray, points: int) -> dict[str, float]:
    """For each class, how many standard errors its mean decoded weight is from the teacher's.

    Heads have a point of `points` or more. Rows are independent, so a class's error is measured by
    its own spread over rows; the smallest error that counts is float32's, 1e-6 of the mass. The
    last score is chi-square-like: the mean square of each entry's own z, as a distance from 1 in
    its standard errors, over entries that are expected at least 30 times.
    """
    flat = found.position * (VOCAB + 1) + found.id
    p = np.pad(p, ((0, 0), (0, 1)))
    rank = np.argsort(np.argsort(-p, axis=1), axis=1)
    is_head = p >= 1 / points
    members = {
        "all": np.ones_like(is_head),
        "head": is_head,
        "large tail": ~is_head & (p >= 0.1 / points),
        "small tail": ~is_head & (p < 0.1 / points),
        "rank > 1000": rank > 1000,
        "tail ids below 128": ~is_head & (np.arange(VOCAB + 1) < 128)[None, :],
    }
    scores = {}
    for name, member in members.items():
        expected = p[member].sum()
        weight = found.weight * member.reshape(-1)[flat]
        sums = np.bincount(found.row, weight, minlength=found.rows)
        error = sums.std() / np.sqrt(found.rows) + 1e-6 * expected
        scores[name] = float(abs(sums.mean() - expected) / error)
    often = np.nonzero((p * found.rows * points >= 30).reshape(-1))[0]
    mean = (np.bincount(flat, found.weight, minlength=p.size) / found.rows)[often]
    square = (np.bincount(flat, found.weight**2, minlength=p.size) / found.rows)[often]
    expected = p.reshape(-1)[often]
    error = np.sqrt(np.maximum(square - mean**2, 0) / found.rows) + 1e-6 * expected
    z = (mean - expected) / error
    scores["each entry"] = float((np.mean(z**2) - 1) / np.sqrt(2 / len(z)))
    return scores


def is_unbiased(scores: dict[str, float]) -> bool:
    return all(score < WORST_Z for score in scores.values())


@pytest.fixture(scope="module")
def systematic(setting: Setting) -> TargetRows:
    return stored_rows(setting, spec_of("systematic"))


@pytest.fixture(scope="module")
def thinned(setting: Setting) -> Decoded:
    return decoded(setting, "systematic, thinned")


def test_the_check_has_something_to_check(setting: Setting) -> None:
    """Mass in every class, sharp and flat positions, and ids far down."""
    p = setting.p
    total = p.sum()
    assert total == pytest.approx(11)
    assert (p >= 1 / 12).sum() > 8
    assert 0.2 < p[p >= 1 / 12].sum() / total < 0.8
    assert p[(p < 1 / 12) & (p >= 1 / 120)].sum() / total > 0.1
    assert p[p < 1 / 120].sum() / total > 0.1
    assert np.sort(p, axis=1)[:, :-1001].sum() / total > 0.001
    assert not np.array_equal(setting.order, np.arange(VOCAB))
    assert setting.vocabulary.bucket_bits.max() >= 3


def test_systematic_is_unbiased(setting: Setting, systematic: TargetRows) -> None:
    assert samplers.SAMPLERS["systematic"].unbiased
    found = decode(setting, spec_of("systematic"), systematic)
    assert (found.block_points == 12).all()
    scores = bias_scores(found, setting.p, 12)
    assert is_unbiased(scores), scores


def test_blocks_thinned_to_fit_are_unbiased(setting: Setting, thinned: Decoded) -> None:
    assert (thinned.block_points < 12).mean() > 0.9
    assert len(np.unique(thinned.block_points)) > 2
    scores = bias_scores(thinned, setting.p, 6)
    assert is_unbiased(scores), scores


def test_blocks_of_which_chance_decides_if_they_are_thinned_are_unbiased(setting: Setting) -> None:
    found = decoded(setting, "systematic, some thinned")
    assert 0.2 < (found.block_points[:, 1] < 11).mean() < 0.8
    scores = bias_scores(found, setting.p, 11)
    assert is_unbiased(scores), scores


def test_tiles_without_room_for_their_points_are_unbiased(setting: Setting) -> None:
    tokens, segment_ids = (x[:BATCH] for x in setting.repeated())
    spec = spec_of("systematic, halved")
    proposed = setting.teacher.begin(tokens, segment_ids, np.arange(BATCH), spec, SEED)()
    totals = proposed.points.sum(axis=1)
    assert set(totals.tolist()) <= {11 * points for points in (16, 8, 4)}
    found = decoded(setting, "systematic, halved")
    assert (found.block_points <= 12).all()
    scores = bias_scores(found, setting.p, 6)
    assert is_unbiased(scores), scores


@pytest.mark.parametrize("name", ["multinomial", "multinomial, thinned"])
def test_multinomial_is_unbiased(setting: Setting, name: str) -> None:
    assert samplers.SAMPLERS["multinomial"].unbiased
    found = decoded(setting, name)
    is_thinned = found.block_points < 20
    assert is_thinned.mean() > 0.9 if "thinned" in name else not is_thinned.any()
    scores = bias_scores(found, setting.p, 12)
    assert is_unbiased(scores), scores


def test_top_k_is_biased(setting: Setting) -> None:
    """The kept ids' mass is right and the others' is not there: it is that of the rest, id V."""
    assert not samplers.SAMPLERS["top_k"].unbiased
    found = decoded(setting, "top_k")
    scores = bias_scores(found, setting.p, 12)
    assert scores["small tail"] > 1000
    assert scores["rank > 1000"] > 1000
    rest = found.weight[found.id == VOCAB].sum() / ROWS
    kept = np.sort(setting.p, axis=1)[:, -5:].sum()
    assert rest == pytest.approx(11 - kept, rel=1e-4)


def test_full_stores_every_probability_without_bias(setting: Setting) -> None:
    """To a point of 65,535, which is rounded so that the mean is right."""
    spec, rows = spec_of("full"), 128
    found = decode(setting, spec, stored_rows(setting, spec, rows))
    flat = found.position * VOCAB + found.id
    mean = np.bincount(flat, found.weight, minlength=setting.p.size) / rows
    part = setting.p.reshape(-1) * MOST_POINTS % 1
    # A teacher's float32 is right to about 1e-5.
    error = np.sqrt(part * (1 - part) / rows) / MOST_POINTS + 1e-5 * setting.p.reshape(-1)
    often = part * (1 - part) * rows > 5
    z = (mean - setting.p.reshape(-1))[often] / error[often]
    assert np.abs(z).max() < WORST_Z + 1
    some = setting.p.reshape(-1)[often] < 1e-3
    assert some.sum() > 5000
    # Entries of a position share an offset, so that this varies more than their number says.
    assert 0.6 < np.mean(z[some] ** 2) < 1.5
    assert np.abs(found.weight - setting.p.reshape(-1)[flat]).max() < 1.1 / MOST_POINTS


# Spoilt weights


def heavier_tails(found: Decoded) -> np.ndarray:
    return np.where(found.weight < 1.001 / 12, found.weight * 1.02, found.weight)


SPOILT: dict[str, Callable[[Decoded], np.ndarray]] = {
    "tails 2 % heavier": heavier_tails,
    "everything 0.1 % lighter": lambda found: found.weight * 0.999,
    "heads 2 % heavier": lambda found: np.where(found.weight > 0.2, 1.02, 1.0) * found.weight,
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_weights_are_noticed(setting: Setting, systematic: TargetRows, name: str) -> None:
    found = decode(setting, spec_of("systematic"), systematic)
    scores = bias_scores(replace(found, weight=SPOILT[name](found)), setting.p, 12)
    assert not is_unbiased(scores), scores


def test_points_over_another_number_than_the_blocks_are_noticed(
    setting: Setting, thinned: Decoded
) -> None:
    points = thinned.block_points[thinned.row, thinned.position // BLOCK]
    scores = bias_scores(replace(thinned, weight=thinned.weight * points / 12), setting.p, 6)
    assert not is_unbiased(scores), scores


def test_thinning_from_the_same_place_on_is_noticed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Same:
        def integers(self, low: int, high: np.ndarray) -> np.ndarray:
            return np.zeros(len(high), np.int64)

    thin = targets._thin
    monkeypatch.setattr(targets, "_thin", lambda *args: thin(*args[:-1], Same()))  # type: ignore[arg-type]
    scores = bias_scores(decoded(setting, "systematic, thinned"), setting.p, 6)
    assert scores["each entry"] > 20, scores


def test_half_points_that_always_go_to_the_first_are_noticed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = samplers.settle

    def without_flips(draft: samplers.Draft) -> samplers.Candidates:
        assert isinstance(draft.balance, Balance)
        never = jnp.zeros_like(draft.balance.flip)
        return settle(draft._replace(balance=draft.balance._replace(flip=never)))

    monkeypatch.setattr(samplers, "settle", without_flips)
    teachers.candidates_step.jitted("cpu").clear_cache()
    try:
        scores = bias_scores(decoded(setting, "systematic"), setting.p, 12)
    finally:
        teachers.candidates_step.jitted("cpu").clear_cache()
    assert scores["each entry"] > 20, scores


# What is stored beside the entries


def nats_scores(setting: Setting, stored: TargetRows) -> np.ndarray:
    """Standard errors that each mean of entropy and label is off [2, L]."""
    nats = codec.decode_nats(stored.teacher_nats)
    error = nats.std(axis=0) / np.sqrt(ROWS) + 1e-5
    return np.abs(nats.mean(axis=0) - np.stack([setting.entropy, -setting.label])) / error


def test_entropy_and_label_are_unbiased(setting: Setting, systematic: TargetRows) -> None:
    assert setting.entropy.max() > 4
    assert setting.label.min() < -4
    assert nats_scores(setting, systematic).max() < WORST_Z
    assert len(np.unique(systematic.teacher_nats[:, :, 0])) == 4


def test_nats_to_the_nearest_code_are_noticed(setting: Setting, systematic: TargetRows) -> None:
    exact = np.stack([setting.entropy, -setting.label])
    nearest = codec.encode_nats(exact, np.full(exact.shape, 0.5))
    spoilt = replace(systematic, teacher_nats=np.repeat(nearest[None], ROWS, axis=0))
    assert nats_scores(setting, spoilt).max() > 20


# Through a store


def test_a_store_gives_the_weights_that_were_checked(
    tmp_path: Path, setting: Setting, systematic: TargetRows
) -> None:
    """Written and read again, entries are those that the tests above found unbiased."""
    corpus, spec, url = Corpus(sources=(), splits=()), spec_of("systematic"), str(tmp_path / "s")
    tokens_manifest = TokensManifest(
        tokenizer=TokenizerInfo(sha256="0", vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0),
        num_sequences=ROWS,
        sequence_tokens=LENGTH,
        shard_sequences=ROWS,
        corpus=corpus.summary(),
        software={},
    )
    tables = writer.Tables(setting.vocabulary, setting.order)
    manifest = TargetsManifest(
        tokens_fingerprint=identity(tokens_manifest),
        num_sequences=ROWS,
        sequence_tokens=LENGTH,
        shard_sequences=ROWS,
        teacher=setting.teacher.info,
        sampler=spec,
        vocabulary=tables.info(),
        seed=SEED,
        dtype="float32",
        batch_sequences=BATCH,
        software={},
    )
    tokens, segment_ids = setting.repeated()
    writer.create_tokens(url, tokens_manifest, corpus)
    (shard,) = Ledger(url, None, tokens_manifest).pending()
    writer.TokensWriter(url).write(shard, tokens, segment_ids)
    writer.create_targets(url, "t", manifest, tables)
    (shard,) = Ledger(url, "t", manifest).pending()
    writer.TargetsWriter(url, "t").write(shard, tokens, segment_ids, systematic)
    opened = reader.TargetsReader(url, "t")
    batch = opened.rows(np.arange(ROWS))
    used = batch.entry_id >= 0
    found = decode(setting, spec, systematic)
    np.testing.assert_array_equal(batch.entry_id[used], found.id)
    np.testing.assert_array_equal(batch.entry_weight[used], found.weight)
    np.testing.assert_array_equal(opened.positions(batch)[used], found.position)
    # What is read has a column for each token that is decoded without bias too.
    off = np.abs(batch.teacher_entropy - setting.entropy)
    assert (off <= np.sqrt(setting.entropy) / 16 + 2e-3).all()
