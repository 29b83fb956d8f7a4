"""The transformers backend: the same distributions as ours, packed documents, padding, refusals."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from gemma2 import checkpoint
from gemma2.model import init_params
from logit_store.layout import predicted_mask
from schemas.errors import CheckpointError, ConfigError, ManifestMismatchError
from schemas.manifest import MOST_POINTS, SamplerSpec, TokenizerInfo
from schemas.model import ModelConfig
from teacher_dump import backends
from teacher_dump import teacher as teachers
from teacher_dump import transformers_teacher as torch_teachers
from teacher_dump.teacher import Gemma2Teacher, RowCandidates
from teacher_dump.transformers_teacher import TransformersTeacher

ROWS, LENGTH, VOCAB = 3, 32, 301
GEMMA2 = ModelConfig(
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
POINTS = 12
TEMPERATURE = 2.5
SPEC = SamplerSpec(
    name="systematic",
    points=POINTS,
    slots_per_token=POINTS,
    block_tokens=8,
    temperature=TEMPERATURE,
)
FULL = SamplerSpec(name="full", points=MOST_POINTS, slots_per_token=VOCAB, block_tokens=8)


def tiny(kind: str) -> Any:
    """A random model of transformers, loud enough that its context shows in its scores."""
    common: dict[str, Any] = {
        "vocab_size": 320,
        "num_hidden_layers": 2,
        "initializer_range": 0.4,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    wide = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    configs: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(**common, **wide, tie_word_embeddings=False),
        "mistral": lambda: transformers.MistralConfig(
            **common, **wide, num_key_value_heads=1, sliding_window=5
        ),
        "gpt2": lambda: transformers.GPT2Config(
            **(common | {"num_hidden_layers": 2}), n_embd=16, n_head=2, n_layer=2, n_positions=64
        ),
        "bloom": lambda: transformers.BloomConfig(**common, hidden_size=16, n_head=2, n_layer=2),
        "mamba": lambda: transformers.MambaConfig(**common, hidden_size=16, state_size=4),
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[kind]()).eval()


def save(folder: Path, kind: str) -> Path:
    tiny(kind).save_pretrained(folder)
    return folder


def load(folder: Path, vocab: int = VOCAB, dtype: str = "float32") -> TransformersTeacher:
    found = backends.load("transformers", folder, dtype, vocab)
    assert isinstance(found, TransformersTeacher)
    return found


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma2") / "model"
    params = init_params(GEMMA2, jax.random.key(3))
    params["final_norm"]["weight"] = params["final_norm"]["weight"] + 6.0
    checkpoint.save(folder, GEMMA2, params)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(4, VOCAB, (ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def segment_ids() -> np.ndarray:
    """One document, several with one of a single token, and padding."""
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 12:] = 2
    segments[1, 13:] = 3
    segments[1, 22:] = 4
    segments[2, 9:] = 2
    segments[2, 25:] = 0
    return segments


def one_by_one(
    folder: Path, tokens: np.ndarray, segments: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """Log-probabilities [R, L, VOCAB] by transformers itself, each document alone; float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = np.zeros((*tokens.shape, VOCAB))
    for row in range(len(tokens)):
        for number in range(1, segments[row].max() + 1):
            mine = segments[row] == number
            with torch.no_grad():
                scores = model(torch.as_tensor(tokens[row, mine].astype(np.int64))[None]).logits
            scores = scores[0, :, :VOCAB].double() / temperature
            found[row, mine] = torch.log_softmax(scores, -1).numpy()
    return found


def all_log_probabilities(
    teacher: Any, tokens: np.ndarray, segments: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """float32 [R, L, VOCAB]."""
    position = np.tile(np.repeat(np.arange(LENGTH), VOCAB), (len(tokens), 1))
    ids = np.tile(np.arange(VOCAB), (len(tokens), LENGTH))
    found = teacher.log_probabilities(tokens, segments, position, ids, temperature)
    return found.reshape(len(tokens), LENGTH, VOCAB)


def dense(found: RowCandidates) -> np.ndarray:
    """Points [R, L, VOCAB + 1]."""
    points = np.zeros((len(found.points), LENGTH, VOCAB + 1))
    used = found.points > 0
    at = (np.nonzero(used)[0], found.position[used], found.id[used])
    np.add.at(points, at, found.points[used])
    return points


def test_both_backends_have_the_same_distributions(
    gemma2: Path, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    ours, theirs = Gemma2Teacher.load(gemma2, "float32", VOCAB), load(gemma2)
    assert theirs.is_packing
    order = np.random.default_rng(4).permutation(VOCAB)
    rows = np.arange(ROWS) + 7
    for teacher in (ours, theirs):
        teacher.arrange(order)
    a, b = (all_log_probabilities(t, tokens, segment_ids, TEMPERATURE) for t in (ours, theirs))
    predicted = predicted_mask(segment_ids)
    np.testing.assert_allclose(b[predicted], a[predicted], rtol=1e-4, atol=1e-4)
    assert np.ptp(a[predicted]) > 10 / TEMPERATURE
    x, y = (t.begin(tokens, segment_ids, rows, SPEC, seed=5)() for t in (ours, theirs))
    np.testing.assert_allclose(y.teacher_entropy, x.teacher_entropy, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(y.label_logprob, x.label_logprob, rtol=1e-3, atol=1e-4)
    # The same randomness: but for a point on an edge that a last bit moves, the same draws.
    z = ours.begin(tokens, segment_ids, rows, SPEC, seed=6)()
    same, other = (np.minimum(dense(x), dense(k)).sum() / dense(x).sum() for k in (y, z))
    assert same > 0.99
    assert other < 0.9
    points = np.array([2, 30], np.int32)
    told = [
        t.expected_entries(tokens, segment_ids, "systematic", TEMPERATURE, points)
        for t in (ours, theirs)
    ]
    np.testing.assert_allclose(told[1], told[0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "bloom", "mamba"])
def test_a_packed_row_is_its_documents_one_by_one(
    tmp_path: Path, tokens: np.ndarray, segment_ids: np.ndarray, kind: str
) -> None:
    folder = save(tmp_path / "model", kind)
    teacher = load(folder)
    # Those that know no positions, or do not heed them, read each document alone.
    assert teacher.is_packing == (kind in ("llama", "mistral", "gpt2"))
    predicted = predicted_mask(segment_ids)
    expected = one_by_one(folder, tokens, segment_ids)
    found = all_log_probabilities(teacher, tokens, segment_ids)
    np.testing.assert_allclose(found[predicted], expected[predicted], rtol=1e-4, atol=2e-4)
    # Where documents run into each other the difference is no question of rounding.
    as_one = one_by_one(folder, tokens, np.ones_like(segment_ids))
    inside = predicted & (segment_ids > 1)
    assert np.abs(as_one - expected)[inside].max() > 0.05


def test_a_model_that_mixes_documents_reads_them_one_by_one(
    llama: Path, tokens: np.ndarray, segment_ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes positions, and whose mask does not heed them."""
    expected = all_log_probabilities(load(llama), tokens, segment_ids)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda _: None)
    teacher = load(llama)
    assert not teacher.is_packing
    predicted = predicted_mask(segment_ids)
    found = all_log_probabilities(teacher, tokens, segment_ids)
    np.testing.assert_allclose(found[predicted], expected[predicted], rtol=1e-4, atol=2e-4)


def test_full_targets_are_the_models_softmax(
    llama: Path, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    """In an order that is not that of ids, and with rows of the head beyond the vocabulary."""
    teacher = load(llama)
    teacher.arrange(np.random.default_rng(4).permutation(VOCAB))
    p = np.exp(one_by_one(llama, tokens, segment_ids))
    p[~predicted_mask(segment_ids)] = 0.0
    found = dense(teacher.begin(tokens, segment_ids, np.arange(ROWS), FULL, 0)())
    np.testing.assert_allclose(found[..., :VOCAB] / MOST_POINTS, p, rtol=1e-3, atol=1e-7)
    assert (found[..., VOCAB] == 0).all()
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
    again = teacher.begin(tokens, segment_ids, np.arange(ROWS), FULL, 0)()
    np.testing.assert_allclose(again.teacher_entropy, entropy, rtol=1e-4, atol=1e-5)


def test_systematic_targets_are_unbiased_and_of_the_vocabulary(
    llama: Path, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    """Each id has its share of the points, rounded up or down, and in the mean exactly."""
    teacher = load(llama)
    p = np.exp(one_by_one(llama, tokens, segment_ids, TEMPERATURE))[1]
    p[~predicted_mask(segment_ids)[1]] = 0.0
    times = 96
    # Rows of the same tokens under other numbers have randomness of their own.
    batch = np.arange(times) + 50
    same = [np.repeat(x[1:2], times, axis=0) for x in (tokens, segment_ids)]
    points = dense(teacher.begin(same[0], same[1], batch, SPEC, 3)())
    assert (np.abs(points[..., :VOCAB] - POINTS * p) < 1 + 1e-3).all()
    assert (points[..., VOCAB] == 0).all()
    # Of errors below one point: five standard deviations, of 9,632 numbers, and something.
    share = POINTS * p - np.floor(POINTS * p)
    deviation = np.sqrt(share * (1 - share) / times)
    error = np.abs(points.mean(axis=0)[:, :VOCAB] - POINTS * p)
    assert (error < 5 * deviation + 0.05).all()
    assert (error > 0.5 * deviation).mean() > 0.1
    assert len({x.tobytes() for x in points}) == times


def test_tiles_are_of_a_row_and_scores_of_more_never_exist(
    llama: Path, tokens: np.ndarray, segment_ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load(llama)
    whole = all_log_probabilities(teacher, tokens, segment_ids)
    spec = SPEC.model_copy(update={"name": "multinomial", "temperature": 1.0})
    monkeypatch.setattr(teachers, "_TILE_TOKENS", 9)
    sizes = []
    scores = torch_teachers.TransformersTeacher._scores

    def seen(self: Any, hidden: Any) -> Any:
        sizes.append(len(hidden))
        return scores(self, hidden)

    monkeypatch.setattr(torch_teachers.TransformersTeacher, "_scores", seen)
    tiled = all_log_probabilities(teacher, tokens, segment_ids)
    np.testing.assert_allclose(tiled, whole, rtol=1e-4, atol=1e-5)
    found = teacher.begin(tokens, segment_ids, np.arange(ROWS), spec, 0)()
    entropy = -(np.exp(whole) * whole).sum(axis=-1)
    entropy[~predicted_mask(segment_ids)] = 0.0
    np.testing.assert_allclose(found.teacher_entropy, entropy, rtol=1e-4, atol=1e-4)
    assert set(sizes) == {8}
    totals = dense(found).sum(axis=-1)
    np.testing.assert_array_equal(totals, np.where(predicted_mask(segment_ids), POINTS, 0))


def test_bfloat16_scores_are_added_up_in_float32(
    llama: Path, tokens: np.ndarray, segment_ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in parts of the vocabulary, of which the last is smaller."""
    monkeypatch.setattr(torch_teachers, "_HEAD_ROWS", 100)
    teacher = load(llama, dtype="bfloat16")
    hidden = teacher._hidden(tokens, segment_ids)
    assert hidden.dtype == torch.bfloat16
    scores = teacher._scores(hidden[0])
    exact = hidden[0].double() @ teacher._table.double().T
    np.testing.assert_allclose(scores.numpy(), exact.numpy(), rtol=1e-5, atol=1e-5)
    # To bfloat16 most of them would be rounded.
    assert (scores != scores.bfloat16().float()).float().mean() > 0.5


def test_the_heads_matrix_is_found_among_the_tensors(
    tmp_path: Path, llama: Path, gemma2: Path
) -> None:
    stored = AutoModelForCausalLM.from_pretrained(llama).lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(backends.load_embedding("transformers", llama), stored)
    tied = backends.load_embedding("transformers", gemma2)
    np.testing.assert_array_equal(tied, backends.load_embedding("jax", gemma2))
    gpt2 = save(tmp_path / "gpt2", "gpt2")
    table = AutoModelForCausalLM.from_pretrained(gpt2).transformer.wte.weight.detach().numpy()
    np.testing.assert_array_equal(backends.load_embedding("transformers", gpt2), table)


def test_the_backend_follows_from_the_model(llama: Path, gemma2: Path, tmp_path: Path) -> None:
    assert backends.choose("auto", gemma2) == "jax"
    assert backends.choose("transformers", gemma2) == "transformers"
    assert backends.choose("auto", llama) == "transformers"
    with pytest.raises(CheckpointError, match=r"must be a folder with config\.json"):
        backends.choose("auto", tmp_path)
    with pytest.raises(CheckpointError, match="must be a Gemma 2 with model_type = gemma2"):
        backends.describe("jax", llama, VOCAB)
    jax_info = backends.describe("jax", gemma2, VOCAB)
    info = backends.describe("transformers", gemma2, VOCAB)
    assert info.weights_sha256 == jax_info.weights_sha256
    assert info.backend == "transformers"
    # Manifests of before there was a choice keep their fingerprints.
    assert "backend" not in jax_info.canonical_json()
    assert "backend" in info.canonical_json()


def test_folders_that_are_no_teacher_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 320 and the tokenizer 321"):
        load(llama, vocab=321)
    info = backends.describe("transformers", llama, VOCAB)
    # Also where the config does not say how many there are.
    many = info.model_copy(update={"vocab_size": 321})
    with pytest.raises(ConfigError, match="has 320 and the tokenizer 321"):
        TransformersTeacher.load(many, llama, "float32")
    with pytest.raises(ConfigError, match="runs on one device, but model_devices is 2"):
        TransformersTeacher.load(info, llama, "float32", devices=2)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((llama / "config.json").read_bytes())
    torch.save(tiny("llama").state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds neither; convert the weights to safetensors"):
        backends.describe("transformers", pickled, VOCAB)
    with pytest.raises(CheckpointError, match="that transformers reads from safetensors, but"):
        TransformersTeacher.load(info, pickled, "float32")
    # Code that comes with a model is not run.
    remote = tmp_path / "remote"
    remote.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "evil.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(CheckpointError, match="that transformers reads from safetensors, but"):
        TransformersTeacher.load(info, remote, "float32")


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    info = TokenizerInfo(sha256="ab" * 32, vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0)
    backends.check_tokenizer(tmp_path, info)
    pieces = {"model": {"vocab": {str(i): i for i in range(300)}}, "added_tokens": [{"id": 300}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(pieces))
    backends.check_tokenizer(tmp_path, info)
    more = info.model_copy(update={"vocab_size": VOCAB + 1})
    digest = "[0-9a-f]{64}"
    with pytest.raises(
        ManifestMismatchError,
        match=rf"tokenizer\.json in .* is {digest} \(301 ids\) and the store was tokenized with "
        rf"(ab){{32}} \(302 ids\)",
    ):
        backends.check_tokenizer(tmp_path, more)
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(
        ManifestMismatchError,
        match=rf"tokenizer\.model in .* is {digest} and the store was tokenized with (ab){{32}} ",
    ):
        backends.check_tokenizer(tmp_path, info)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json must be a tokenizer's"):
        backends.check_tokenizer(tmp_path, info)
