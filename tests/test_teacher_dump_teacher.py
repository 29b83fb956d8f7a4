"""Teacher and targets: distributions, masks, orders of ids, batches, seeds and memory."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from gemma2 import checkpoint
from gemma2.model import Execution, hidden_states, init_params, logits
from logit_store import codec
from logit_store.codec import Entries
from logit_store.layout import predicted_mask
from logit_store.rows import TargetRows
from schemas.errors import BudgetError, ConfigError
from schemas.manifest import MOST_POINTS, SamplerSpec
from schemas.model import ModelConfig
from teacher_dump import teacher as teachers
from teacher_dump.targets import begin_rows
from teacher_dump.teacher import Gemma2Teacher, RowCandidates

pytestmark = pytest.mark.usefixtures("compile_quickly")
ROWS, LENGTH, BLOCK = 5, 32, 8
VOCAB, POINTS = 301, 12
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
SPEC = SamplerSpec(name="systematic", points=POINTS, slots_per_token=POINTS, block_tokens=BLOCK)
TOP_K = SPEC.model_copy(update={"name": "top_k", "points": MOST_POINTS, "slots_per_token": 4})


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
    return Gemma2Teacher.load(folder, "float32", VOCAB)


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


def vocabulary(size: int = VOCAB) -> codec.Vocabulary:
    counts = np.random.default_rng(2).permutation((1e4 / np.arange(1, size + 1)).astype(np.int64))
    return codec.make_vocabulary(counts, POINTS)


def compute(
    teacher: Gemma2Teacher, tokens: np.ndarray, segments: np.ndarray, **other: Any
) -> TargetRows:
    settings: dict[str, Any] = {
        "rows": np.arange(len(tokens)) + 10,
        "spec": SPEC,
        "seed": 1,
        "batch_sequences": ROWS,
    }
    settings |= other
    tables = vocabulary(teacher.info.vocab_size)
    return begin_rows(teacher, tables, tokens, segments, settings.pop("rows"), **settings)()


def propose(
    teacher: Gemma2Teacher,
    tokens: np.ndarray,
    segments: np.ndarray,
    spec: SamplerSpec = SPEC,
    seed: int = 1,
) -> RowCandidates:
    return teacher.begin(tokens, segments, np.arange(len(tokens)) + 10, spec, seed)()


def dense(found: RowCandidates) -> np.ndarray:
    """Points [R, L, V + 1]."""
    points = np.zeros((len(found.points), LENGTH, VOCAB + 1))
    used = found.points > 0
    at = (np.nonzero(used)[0], found.position[used], found.id[used])
    np.add.at(points, at, found.points[used])
    return points


def decode(stored: TargetRows, segments: np.ndarray, spec: SamplerSpec = SPEC) -> Entries:
    return codec.check_rows(
        vocabulary(), predicted_mask(segments), stored.columns(), BLOCK, spec.slots_per_block, 10
    )


def assert_equal(actual: TargetRows, expected: TargetRows, rows: Any = slice(None)) -> None:
    for field in fields(TargetRows):
        np.testing.assert_array_equal(
            getattr(actual, field.name), getattr(expected, field.name)[rows], err_msg=field.name
        )


def dense_log_probs(
    params: Any, tokens: np.ndarray, segments: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    hidden = hidden_states(
        params, MODEL, jnp.asarray(tokens), jnp.asarray(segments), dtype=jnp.float32
    )
    scores = np.asarray(logits(params, MODEL, hidden), np.float64)[..., :VOCAB] / temperature
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def assert_points_are(points: np.ndarray, log_probs: np.ndarray, segments: np.ndarray) -> None:
    """Each id of each predicted position has its share of the points, rounded up or down."""
    predicted = predicted_mask(segments)
    p = np.where(predicted[..., None], np.exp(log_probs), 0.0)
    np.testing.assert_array_equal(points.sum(axis=-1), np.where(predicted, POINTS, 0))
    assert (points[..., VOCAB] == 0).all()
    assert (np.abs(points[..., :VOCAB] - POINTS * p) < 1 + 1e-3).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_candidates_are_of_the_teachers_distribution(
    teacher: Gemma2Teacher,
    params: Any,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    temperature: float,
) -> None:
    spec = SPEC.model_copy(update={"temperature": temperature})
    found = propose(teacher, tokens, segment_ids, spec)
    log_probs = dense_log_probs(params, tokens, segment_ids, temperature)
    predicted = predicted_mask(segment_ids)
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=-1)
    label = np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    label = np.pad(label, ((0, 0), (0, 1)))
    assert np.ptp(entropy[predicted]) > 0.5
    np.testing.assert_allclose(
        found.teacher_entropy, np.where(predicted, entropy, 0), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        found.label_logprob, np.where(predicted, label, 0), rtol=1e-3, atol=1e-3
    )
    assert_points_are(dense(found), log_probs, segment_ids)
    # What is stored is that too: weights of the candidates, nats to the nearest codes.
    stored = compute(teacher, tokens, segment_ids, spec=spec)
    entries = decode(stored, segment_ids)
    position = codec.entry_positions(
        entries.head_count, entries.tail_count, BLOCK, SPEC.slots_per_block
    )
    weights = np.zeros((ROWS, LENGTH, VOCAB + 1))
    used = entries.entry_id >= 0
    at = (np.nonzero(used)[0], position[used], entries.entry_id[used])
    np.add.at(weights, at, entries.entry_weight[used])
    assert_points_are(np.round(weights * POINTS, 4), log_probs, segment_ids)
    nats = codec.decode_nats(stored.teacher_nats)
    exact = np.stack([found.teacher_entropy, -found.label_logprob], axis=1)
    assert (np.abs(nats - exact) <= np.sqrt(exact) / 16 + 1e-3).all()
    assert (nats[~np.broadcast_to(predicted[:, None], nats.shape)] == 0).all()


def test_stored_rows_have_the_formats_shapes_and_types(
    teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    result = compute(teacher, tokens, segment_ids)
    slots = LENGTH * POINTS
    assert {name: (x.shape, x.dtype.name) for name, x in result.columns().items()} == {
        "head_count": ((ROWS, LENGTH), "uint16"),
        "head_points": ((ROWS, slots), "uint8"),
        "entry_bucket": ((ROWS, slots), "uint16"),
        "entry_offset": ((ROWS, slots + 2), "uint8"),
        "block_points": ((ROWS, LENGTH // BLOCK), "uint16"),
        "teacher_nats": ((ROWS, 2, LENGTH), "uint8"),
    }
    assert compute(teacher, tokens, segment_ids, spec=TOP_K).head_points.dtype == np.uint16
    entries = decode(result, segment_ids)
    # Two blocks of padding, and all of them partly used where a document ends.
    assert (entries.entry_id[4, -2 * BLOCK * POINTS :] == -1).all()
    assert (entries.entry_id >= 0).reshape(ROWS, LENGTH // BLOCK, -1).any(axis=2).sum() == 18


def test_ids_beyond_the_tokenizer_are_never_sampled(
    folder: Path, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    """The same checkpoint with all its rows as vocabulary does sample them."""
    draws = SPEC.model_copy(update={"name": "multinomial"})
    for vocab, beyond in ((VOCAB, 0), (MODEL.vocab_size, 10)):
        found = propose(Gemma2Teacher.load(folder, "float32", vocab), tokens, segment_ids, draws)
        ids = found.id[found.points > 0]
        assert (ids >= VOCAB).sum() >= beyond
        assert beyond or ids.max() < VOCAB


# Orders of ids


def test_arranged_ids_have_the_same_distribution(
    folder: Path, teacher: Gemma2Teacher, params: Any, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    """Other points are drawn, since they are cumulated in another order, but of the same p."""
    order = np.random.default_rng(4).permutation(VOCAB)
    arranged = Gemma2Teacher.load(folder, "float32", VOCAB)
    arranged.arrange(order)
    found, plain = (propose(x, tokens, segment_ids) for x in (arranged, teacher))
    np.testing.assert_allclose(found.teacher_entropy, plain.teacher_entropy, atol=1e-4)
    np.testing.assert_allclose(found.label_logprob, plain.label_logprob, atol=1e-3)
    points = dense(found)
    assert_points_are(points, dense_log_probs(params, tokens, segment_ids), segment_ids)
    assert (points != dense(plain)).any()
    # Candidates of a position come in the order in which ids are cumulated.
    place = np.argsort(order)
    used = found.points[0] > 0
    keys = found.position[0][used] * VOCAB + place[found.id[0][used]]
    assert (np.diff(keys) > 0).all()
    # However it is come by, an order gives the same; and the order of ids gives what was before.
    again = Gemma2Teacher.load(folder, "float32", VOCAB)
    for step in (np.random.default_rng(5).permutation(VOCAB), order, order):
        again.arrange(step)
    np.testing.assert_array_equal(dense(propose(again, tokens, segment_ids)), points)
    again.arrange(np.arange(VOCAB))
    np.testing.assert_array_equal(dense(propose(again, tokens, segment_ids)), dense(plain))


def test_the_rest_is_the_id_behind_the_last_in_any_order(
    folder: Path, params: Any, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    arranged = Gemma2Teacher.load(folder, "float32", VOCAB)
    arranged.arrange(np.random.default_rng(4).permutation(VOCAB))
    weights = dense(propose(arranged, tokens, segment_ids, TOP_K)) / MOST_POINTS
    p = np.exp(dense_log_probs(params, tokens, segment_ids))
    p[~predicted_mask(segment_ids)] = 0.0
    best = np.argsort(-p, axis=-1)[..., :3]
    kept = np.zeros_like(p)
    np.put_along_axis(kept, best, np.take_along_axis(p, best, axis=-1), axis=-1)
    np.testing.assert_allclose(weights[..., :VOCAB], kept, rtol=1e-3)
    rest = p.sum(axis=-1) - kept.sum(axis=-1)
    np.testing.assert_allclose(weights[..., VOCAB], rest, atol=1e-3)
    assert rest.max() > 0.3


# Batches, tiles and seeds


def test_a_row_does_not_depend_on_its_batch(
    teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    everything = compute(teacher, tokens, segment_ids)
    # More than a batch, and rows in other places of it.
    order = np.array([3, 0, 4, 2, 2, 1, 3])
    chosen = compute(teacher, tokens[order], segment_ids[order], rows=order + 10)
    assert_equal(chosen, everything, order)
    alone = compute(teacher, tokens[4:], segment_ids[4:], rows=np.array([14]))
    assert_equal(alone, everything, slice(4, 5))


# Of no other test, so that what is compiled for small tiles is not taken for larger ones.
SMALL_TILES = SPEC.model_copy(update={"slots_per_token": POINTS + 1})


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of eight tokens, as rows that are longer than a tile have them."""
    monkeypatch.setattr(teachers, "_TILE_TOKENS", 9)


@pytest.mark.usefixtures("small_tiles")
def test_rows_tiles_and_seeds_have_randomness_of_their_own(teacher: Gemma2Teacher) -> None:
    """Each tile is the same document: nothing but row, tile and seed tell the results apart."""
    assert teachers.tile_tokens(LENGTH) == BLOCK
    document = np.random.default_rng(1).integers(4, VOCAB, BLOCK).astype(np.int32)
    tokens = np.tile(document, (ROWS, LENGTH // BLOCK))
    numbers = np.repeat(np.arange(1, LENGTH // BLOCK + 1), BLOCK)
    segments = np.tile(numbers, (ROWS, 1)).astype(np.int32)
    seeds = (0, 1, 2**32, 2**32 + 1, 2**40)
    points = [dense(propose(teacher, tokens, segments, SMALL_TILES, seed)) for seed in seeds]
    tiles = [tile.tobytes() for x in points for tile in x.reshape(-1, BLOCK, VOCAB + 1)]
    assert len(set(tiles)) == len(tiles) == 100
    again = propose(teacher, tokens, segments, SMALL_TILES, seeds[0])
    np.testing.assert_array_equal(dense(again), points[0])


@pytest.mark.usefixtures("small_tiles")
def test_several_tiles_are_one_row(
    teacher: Gemma2Teacher, params: Any, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    """Positions, entropies and labels of each tile stand where they are in the row."""
    found = propose(teacher, tokens, segment_ids, SMALL_TILES)
    log_probs = dense_log_probs(params, tokens, segment_ids)
    assert_points_are(dense(found), log_probs, segment_ids)
    predicted = predicted_mask(segment_ids)
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=-1)
    np.testing.assert_allclose(
        found.teacher_entropy, np.where(predicted, entropy, 0), rtol=1e-3, atol=1e-4
    )
    label = np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    label = np.where(predicted, np.pad(label, ((0, 0), (0, 1))), 0)
    np.testing.assert_allclose(found.label_logprob, label, rtol=1e-3, atol=1e-3)
    told = teacher.expected_entries(tokens, segment_ids, "systematic", 1.0, np.array([POINTS]))
    p = np.exp(log_probs)[predicted]
    np.testing.assert_allclose(told, [np.minimum(POINTS * p, 1).sum()], rtol=1e-4)


@pytest.mark.parametrize(
    ("length", "size"), [(8192, 1024), (1024, 1024), (1000, 1000), (1537, 53), (2, 2), (1031, 1)]
)
def test_tiles_divide_a_row(length: int, size: int) -> None:
    assert teachers.tile_tokens(length) == size


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_expected_entries_are_those_of_all_rows(
    teacher: Gemma2Teacher,
    params: Any,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    temperature: float,
) -> None:
    p = np.exp(dense_log_probs(params, tokens, segment_ids, temperature))
    p = p[predicted_mask(segment_ids)]
    points = np.array([1, 5, 40])
    told = {
        name: teacher.expected_entries(tokens, segment_ids, name, temperature, points)  # type: ignore[arg-type]
        for name in ("systematic", "multinomial")
    }
    exact = [np.minimum(n * p, 1).sum() for n in points]
    np.testing.assert_allclose(told["systematic"], exact, rtol=1e-4)
    exact = [(1 - (1 - p) ** n).sum() for n in points]
    np.testing.assert_allclose(told["multinomial"], exact, rtol=1e-4)
    assert told["systematic"].dtype == np.float64
    nothing = teacher.expected_entries(
        tokens, np.zeros_like(segment_ids), "systematic", temperature, points
    )
    assert nothing.tolist() == [0.0, 0.0, 0.0]


def test_a_teacher_in_float8_is_much_the_same_on_devices_that_share_it(
    tmp_path: Path, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    """But for sums of parts, which are bfloat16; near the one in bfloat16, and not it."""
    model = MODEL.model_copy(update={"d_model": 32, "num_kv_heads": 2, "mlp_width": 48})
    params = init_params(model, jax.random.key(3))
    params["final_norm"]["weight"] = params["final_norm"]["weight"] + 6.0
    checkpoint.save(tmp_path / "model", model, params)

    def entropy(dtype: str, devices: int) -> np.ndarray:
        teacher = Gemma2Teacher.load(tmp_path / "model", dtype, VOCAB, devices)
        # By draws, whose program is compiled sooner than that of systematic sampling.
        draws = SPEC.model_copy(update={"name": "multinomial"})
        return propose(teacher, tokens, segment_ids, draws).teacher_entropy

    alone, shared, wide = entropy("float8", 1), entropy("float8", 2), entropy("bfloat16", 1)
    assert wide.std() > 0.1
    assert 0.01 < np.abs(alone - wide).mean() < 0.2
    assert np.abs(shared - alone).mean() < 0.4 * np.abs(alone - wide).mean()


def test_devices_that_share_a_teacher_find_what_one_finds(
    tmp_path: Path,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles too: ten of them, which three devices do not share evenly."""
    monkeypatch.setattr(teachers, "_TILE_TOKENS", 16)
    model = MODEL.model_copy(
        update={
            "vocab_size": 321,
            "d_model": 96,
            "num_heads": 6,
            "num_kv_heads": 3,
            "mlp_width": 96,
        }
    )
    params = init_params(model, jax.random.key(3))
    params["final_norm"]["weight"] = params["final_norm"]["weight"] + 6.0
    checkpoint.save(tmp_path / "model", model, params)
    alone, shared = (Gemma2Teacher.load(tmp_path / "model", "float32", VOCAB, n) for n in (1, 3))
    matrices = [x for x in jax.tree.leaves(shared._params["pairs"]) if x.size >= 2**12]
    assert matrices
    for leaf in matrices:
        assert leaf.addressable_shards[0].data.size * 3 == leaf.size
    expected = propose(alone, tokens, segment_ids, SPEC)
    found = propose(shared, tokens, segment_ids, SPEC)
    assert expected.teacher_entropy.std() > 0.1
    np.testing.assert_allclose(
        found.teacher_entropy, expected.teacher_entropy, rtol=1e-4, atol=2e-5
    )
    np.testing.assert_allclose(found.label_logprob, expected.label_logprob, rtol=1e-3, atol=1e-5)
    # The same draws, but for a point on an edge that a last bit moves.
    assert np.mean(dense(found) == dense(expected)) > 0.999
    assert not np.array_equal(dense(found)[0], dense(found)[1])
    points = np.array([3, 30])
    told, expected_entries = (
        teacher.expected_entries(tokens, segment_ids, "systematic", 1.0, points)
        for teacher in (shared, alone)
    )
    np.testing.assert_allclose(told, expected_entries, rtol=1e-4)
    with pytest.raises(ConfigError, match="divide the model's num_kv_heads, but 2 does not"):
        Gemma2Teacher.load(tmp_path / "model", "float32", VOCAB, 2)


def test_a_teacher_on_more_devices_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="model_devices must be devices of the worker, but it is 9"
    ):
        Gemma2Teacher.load(folder, "float32", VOCAB, 9)


def test_bfloat16_is_close_and_is_not_float32(
    folder: Path, teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    half = propose(Gemma2Teacher.load(folder, "bfloat16", VOCAB), tokens, segment_ids, TOP_K)
    full = propose(teacher, tokens, segment_ids, TOP_K)
    error = np.abs(half.teacher_entropy - full.teacher_entropy)
    assert error.max() > 1e-4
    assert error.mean() < 0.1
    predicted = predicted_mask(segment_ids)
    totals = dense(half).sum(axis=-1)
    np.testing.assert_allclose(totals, np.where(predicted, MOST_POINTS, 0), rtol=1e-4)
    assert half.teacher_entropy.dtype == np.float32


# Refusals


def test_entries_that_do_not_fit_are_refused_by_name(
    teacher: Gemma2Teacher, tokens: np.ndarray, segment_ids: np.ndarray
) -> None:
    for changes, message in (
        ({"slots_per_token": VOCAB + 2}, "vocabulary's 301 ids and the rest, but it is 303"),
        ({"name": "full"}, "slots_per_token must be 301, but it is 12; set it so"),
    ):
        with pytest.raises(BudgetError, match=message):
            compute(teacher, tokens, segment_ids, spec=SPEC.model_copy(update=changes))


def test_a_teacher_of_fewer_ids_than_the_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has 320 and the tokenizer 321"):
        Gemma2Teacher.load(folder, "float32", 321)


def test_the_teacher_says_who_it_is(folder: Path, teacher: Gemma2Teacher) -> None:
    config, weights = checkpoint.fingerprint(folder)
    info = teacher.info
    assert (info.name, info.config_sha256, info.weights_sha256, info.vocab_size) == (
        "model",
        config,
        weights,
        VOCAB,
    )


# Memory


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


@pytest.mark.parametrize("name", ["systematic", "multinomial", "top_k", "expected"])
def test_scores_of_more_than_a_tile_never_exist(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tile, batch, length, vocab = 16, 4, 128, 4001
    monkeypatch.setattr(teachers, "_TILE_TOKENS", tile)
    model = MODEL.model_copy(update={"vocab_size": vocab})
    params = jax.eval_shape(
        lambda: teachers._rows(
            init_params(model, jax.random.key(0)), teachers._padded(np.arange(vocab - 2))
        )
    )
    spec = SPEC.model_copy(update={"name": name, "points": 6, "slots_per_token": 6})
    shape = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, length), jnp.bool)
    shared: dict[str, Any] = {
        "config": model,
        "dtype": jnp.dtype("float32"),
        "vocab_size": vocab - 2,
        "execution": Execution(),
    }

    def candidates(params: Any, tokens: Any, segments: Any, predicted: Any, rows: Any) -> Any:
        return teachers.candidates_step(
            params, tokens, segments, predicted, rows, jax.random.key(0), spec=spec, **shared
        )

    def expected(params: Any, tokens: Any, segments: Any, predicted: Any, points: Any) -> Any:
        return teachers._expected_entries(
            params,
            tokens,
            segments,
            predicted,
            points,
            name="systematic",
            temperature=1.0,
            **shared,
        )

    jaxpr = jax.make_jaxpr(expected if name == "expected" else candidates)(
        params, shape, shape, mask, jax.ShapeDtypeStruct((batch,), jnp.int32)
    )
    largest = largest_array(jaxpr.jaxpr)
    # The vocabulary is padded to 4096; attention scores are 4 x 2 x 128 x 128, and fewer.
    assert batch * 2 * length * length == 2 * tile * 4096
    assert tile * 4096 <= largest <= 2 * tile * 4096
    assert largest < length * vocab / 3
