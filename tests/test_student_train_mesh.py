"""Eight devices compute what one does, hold an eighth of the state each, and gather no logits."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from student_store import BLOCK, ENTRIES, VOCAB, make_store

from gemma2 import model as gemma2
from logit_store import codec
from schemas.errors import ConfigError
from schemas.model import ModelConfig
from schemas.runs import MeshConfig, TrainConfig
from student_train import mesh as meshes
from student_train.data import StoreSource, place
from student_train.step import (
    State,
    abstract_batch,
    abstract_state,
    make_head,
    make_objective,
    make_state,
    make_train_step,
)

MODEL = ModelConfig(
    vocab_size=304,
    d_model=64,
    num_layers=4,
    mlp_width=128,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    query_scalar=16,
    window_tokens=8,
)
CONFIG = TrainConfig(
    store="", out=Path("."), alpha=0.7, steps=20, batch_sequences=8, dtype="float32", remat="none"
)
CHUNK = 8
MESHES = {
    "one": (MeshConfig(), 1),
    "fsdp 8": (MeshConfig(), 8),
    "replica 2 fsdp 4": (MeshConfig(replica=2), 8),
    "replica 8": (MeshConfig(replica=8, fsdp=1), 8),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> StoreSource:
    return StoreSource(str(make_store(tmp_path_factory.mktemp("mesh") / "store")), "default")


def setup(source: StoreSource, name: str) -> tuple[Any, Any, Any, Any]:
    """(mesh, head, placed batch of rows 0 to 7, placed state)."""
    config, count = MESHES[name]
    mesh = meshes.make_mesh(config, jax.devices()[:count])
    head = make_head(MODEL, VOCAB, source.targets_manifest, CHUNK)
    batch = place(np.arange(8), source.read, meshes.rows_sharding(mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(MODEL, CONFIG, mesh))
    return mesh, head, batch, jax.device_put(first_state(), shardings)


@functools.cache
def first_state() -> State:
    """Larger weights than at the start, so that the soft-caps and the attention matter."""
    state = jax.jit(lambda: make_state(MODEL, CONFIG, jax.random.key(3)))()
    return jax.device_get(state._replace(params=jax.tree.map(lambda leaf: 3 * leaf, state.params)))


@functools.cache
def loss_and_gradients(source: StoreSource, name: str) -> tuple[Any, Any]:
    mesh, head, batch, state = setup(source, name)
    objective = make_objective(MODEL, CONFIG, head, mesh)
    gradients, metrics = jax.jit(jax.grad(objective, has_aux=True))(state.params, batch, 0.7)
    return jax.device_get(metrics), jax.device_get(gradients)


@pytest.mark.parametrize("name", ["fsdp 8", "replica 2 fsdp 4"])
def test_losses_and_gradients_are_those_of_one_device(source: StoreSource, name: str) -> None:
    metrics, gradients = loss_and_gradients(source, name)
    expected_metrics, expected = loss_and_gradients(source, "one")
    np.testing.assert_allclose(metrics, expected_metrics, rtol=2e-6)
    paths = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, wanted), actual in zip(paths, jax.tree.leaves(gradients), strict=True):
        error = np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)
        assert error < 1e-5, jax.tree_util.keystr(path)


def test_one_device_has_the_gradients_of_the_dense_model(source: StoreSource) -> None:
    _, _, batch, state = setup(source, "one")
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segment_ids)
    mask = np.pad((segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != 0), ((0, 0), (0, 1)))
    dense = np.zeros((*tokens.shape, VOCAB), np.float32)
    row = np.broadcast_to(np.arange(8)[:, None], batch.entry_id.shape)
    used = np.asarray(batch.entry_id) >= 0
    position = codec.entry_positions(
        np.asarray(batch.head_count), np.asarray(batch.tail_count), BLOCK, BLOCK * ENTRIES
    )
    place = (row[used], position[used], np.asarray(batch.entry_id)[used])
    np.add.at(dense, place, np.asarray(batch.entry_weight)[used])
    label = np.eye(VOCAB, dtype=np.float32)[np.roll(tokens, -1, axis=1)]
    mixed = (0.7 * dense + 0.3 * label) * mask[..., None] / mask.sum()

    def objective(params: Any) -> jax.Array:
        hidden = gemma2.hidden_states(params, MODEL, tokens, segments, dtype=np.dtype("float32"))
        logits = gemma2.logits(params, MODEL, hidden)[..., :VOCAB]
        return -jnp.sum(jnp.asarray(mixed) * jax.nn.log_softmax(logits))

    loss, expected = jax.jit(jax.value_and_grad(objective))(state.params)
    metrics, gradients = loss_and_gradients(source, "one")
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    paths = jax.tree_util.tree_flatten_with_path(jax.device_get(expected))[0]
    for (path, wanted), actual in zip(paths, jax.tree.leaves(gradients), strict=True):
        error = np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)
        assert error < 1e-5, jax.tree_util.keystr(path)


@functools.cache
def compiled_step(source: StoreSource, name: str) -> Any:
    """The step, compiled ahead of time from descriptions alone, as for devices not at hand."""
    config, count = MESHES[name]
    mesh = meshes.make_mesh(config, jax.devices()[:count])
    head = make_head(MODEL, VOCAB, source.targets_manifest, CHUNK)
    state = abstract_state(MODEL, CONFIG, mesh)
    batch = abstract_batch(8, 32, source.targets_manifest, mesh)
    return make_train_step(MODEL, CONFIG, head, mesh).lower(state, batch).compile()


@functools.cache
def run_steps(source: StoreSource, name: str, count: int = 4) -> tuple[list[float], State]:
    _, _, batch, state = setup(source, name)
    losses = []
    for _ in range(count):
        state, metrics = compiled_step(source, name)(state, batch)
        losses.append(float(metrics.loss))
    return losses, state


@pytest.mark.parametrize("name", ["fsdp 8", "replica 8"])
def test_steps_are_those_of_one_device(source: StoreSource, name: str) -> None:
    expected, _ = run_steps(source, "one")
    losses, _ = run_steps(source, name)
    assert expected[0] - expected[-1] > 1e-3
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def bytes_on(device: Any, tree: Any) -> int:
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def test_each_device_holds_an_eighth_of_the_state(source: StoreSource) -> None:
    whole = bytes_on(jax.devices()[0], setup(source, "one")[3])
    _, state = run_steps(source, "fsdp 8", count=1)
    for device in jax.devices():
        # Norms are replicated, which keeps it a little above an eighth.
        assert whole / 8 <= bytes_on(device, state) < whole / 7


def test_no_device_gathers_logits_or_forms_those_of_all_its_tokens(source: StoreSource) -> None:
    """Of the arrays with a vocabulary dimension only the table is larger than a chunk's logits."""
    shapes = set()
    for line in compiled_step(source, "fsdp 8").as_text().splitlines():
        for shape in line.split("[")[1:]:
            numbers = shape.split("]")[0].split(",")
            if all(number.isdigit() for number in numbers):
                shapes.add(tuple(int(number) for number in numbers))
    table = {(MODEL.vocab_size, MODEL.d_model), (MODEL.d_model, MODEL.vocab_size)}
    others = {shape for shape in shapes if MODEL.vocab_size in shape} - table
    assert (CHUNK, MODEL.vocab_size) in others
    assert max(np.prod(shape) for shape in others) == CHUNK * MODEL.vocab_size
    # One device's 32 tokens would be a larger array.
    assert CHUNK < 32


def test_the_stacked_axis_of_layer_pairs_stays_whole() -> None:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices())
    key = jax.tree_util.DictKey
    assert meshes.partition((key("pairs"), key("kernel")), (16, 64, 24), mesh) == P(None, "fsdp")
    assert meshes.partition((key("pairs"), key("kernel")), (16, 7, 81), mesh) == P()
    assert meshes.partition((key("embedding"),), (4096, 64), mesh) == P("fsdp")
    assert meshes.partition((key("embedding"),), (4097, 64), mesh) == P(None, "fsdp")
    assert meshes.partition((key("norm"),), (64,), mesh) == P()


def test_a_large_array_that_cannot_be_sharded_is_refused() -> None:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices())
    message = r"8 divides none of embedding \(4097, 1025\); use another mesh.fsdp"
    with pytest.raises(ConfigError, match=message):
        meshes.partition((jax.tree_util.DictKey("embedding"),), (4097, 1025), mesh)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(model=2), "mesh.model must be 1, as tensor parallelism is not supported yet"),
        (MeshConfig(fsdp=3), r"replica 1 x fsdp 3 does not make 8 devices"),
        (MeshConfig(replica=3), r"replica 3 x fsdp -1 does not make 8 devices"),
        (MeshConfig(fsdp=0), r"replica 1 x fsdp 0 does not make 8 devices"),
    ],
)
def test_impossible_meshes_are_refused(config: MeshConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        meshes.make_mesh(config, jax.devices())


def test_a_batch_that_does_not_divide_is_refused() -> None:
    mesh = meshes.make_mesh(MeshConfig(replica=2), jax.devices())
    with pytest.raises(ConfigError, match=r"multiple of the 8 devices .* it is 12; use 16"):
        meshes.check_batch(mesh, 12)
