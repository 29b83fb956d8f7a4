"""Eight devices compute what one does, hold their part of the state each, and gather no logits."""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from student_store import VOCAB, dense_targets, make_store

from gemma2 import model as gemma2
from gemma2.placement import check_model, partition
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
    num_heads=16,
    num_kv_heads=8,
    head_size=8,
    query_scalar=8,
    window_tokens=8,
)
CONFIG = TrainConfig(
    store="", out=Path("."), alpha=0.7, steps=20, batch_sequences=8, dtype="float32", remat="none"
)
CHUNK = 8
# Each axis alone, each pair of axes, and all three.
SHAPES = [(1, 1, 8), (1, 8, 1), (8, 1, 1), (1, 2, 4), (4, 1, 2), (2, 4, 1), (2, 2, 2)]
MESHES = {"one": (MeshConfig(), 1), "model alone": (MeshConfig(model=2), 2)} | {
    f"replica {r} fsdp {f} model {m}": (MeshConfig(replica=r, fsdp=f, model=m), 8)
    for r, f, m in SHAPES
}
FSDP, MODEL_AXIS = "replica 1 fsdp 8 model 1", "replica 1 fsdp 1 model 8"
MIXED, REPLICA = "replica 2 fsdp 2 model 2", "replica 8 fsdp 1 model 1"
# Gradients and steps are compiled of these alone: of each axis, and of all three.
STEPPED = (FSDP, MODEL_AXIS, MIXED, REPLICA)
pytestmark = pytest.mark.usefixtures("compile_quickly")


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


@pytest.mark.parametrize("name", ["model alone", *STEPPED])
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
    dense = dense_targets(batch)
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


@pytest.mark.parametrize("name", STEPPED)
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


@pytest.mark.parametrize(("replica", "fsdp", "model"), SHAPES)
def test_each_device_holds_its_part_of_the_state(
    source: StoreSource, replica: int, fsdp: int, model: int
) -> None:
    """Parameters and the optimizer's state, before a step and, where it is compiled, after."""
    whole = setup(source, "one")[3]
    norms = sum(
        leaf.nbytes
        for path, leaf in jax.tree_util.tree_flatten_with_path(whole)[0]
        if "norm" in jax.tree_util.keystr(path)
    )
    matrices = bytes_on(jax.devices()[0], whole) - norms
    name = f"replica {replica} fsdp {fsdp} model {model}"
    states = [setup(source, name)[3]]
    if name in STEPPED:
        states.append(run_steps(source, name)[1])
    for device, state in itertools.product(jax.devices(), states):
        # Norms are replicated; what is left over is a few counters.
        assert bytes_on(device, state) - norms == pytest.approx(matrices / (fsdp * model), abs=64)


def test_a_step_needs_less_memory_the_more_devices_share_it(source: StoreSource) -> None:
    """Arguments and temporaries of the compiled step, by the compiler's own count."""

    def needed(name: str) -> float:
        found = compiled_step(source, name).memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes

    # Of eight rows; whatever else is done, each mesh has an eighth of the rows or of the widths.
    one = needed("one")
    assert needed(FSDP) < one / 3
    assert needed(MODEL_AXIS) < one / 3
    assert needed(MIXED) < one / 2


@pytest.mark.parametrize(("name", "parts"), [(FSDP, 1), (MODEL_AXIS, 8), (MIXED, 2)])
def test_no_device_gathers_logits_or_forms_those_of_all_its_tokens(
    source: StoreSource, name: str, parts: int
) -> None:
    """Of the arrays with a vocabulary dimension only the table is larger than a chunk's logits.

    Nor does a device have logits of another's part of the vocabulary.
    """
    shapes = set()
    for line in compiled_step(source, name).as_text().splitlines():
        for shape in line.split("[")[1:]:
            numbers = shape.split("]")[0].split(",")
            if all(number.isdigit() for number in numbers):
                shapes.add(tuple(int(number) for number in numbers))
    own = MODEL.vocab_size // parts
    table = {(own, MODEL.d_model), (MODEL.d_model, own)}
    others = {shape for shape in shapes if own in shape} - table
    assert (CHUNK, own) in others
    assert max(np.prod(shape) for shape in others) == CHUNK * own
    assert parts == 1 or not any(MODEL.vocab_size in shape for shape in shapes)
    # One device's tokens, 32 at least, would be a larger array.
    assert CHUNK < 32


def test_the_stacked_axis_of_layer_pairs_stays_whole() -> None:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices())
    key = jax.tree_util.DictKey
    assert partition((key("pairs"), key("kernel")), (16, 72, 64), mesh) == P(None, "fsdp")
    assert partition((key("pairs"), key("kernel")), (16, 7, 811), mesh) == P()
    assert partition((key("embedding"),), (4096, 64), mesh) == P("fsdp")
    assert partition((key("embedding"),), (4097, 64), mesh) == P(None, "fsdp")
    assert partition((key("norm"),), (64,), mesh) == P()


def test_what_model_cuts_adds_up_where_it_must() -> None:
    mesh = meshes.make_mesh(MeshConfig(fsdp=2, model=4), jax.devices())
    key = jax.tree_util.DictKey
    for names, shape, expected in (
        (("pairs", "attention", "query", "kernel"), (2, 64, 512), P(None, None, ("model", "fsdp"))),
        (("pairs", "attention", "query", "kernel"), (2, 512, 64), P(None, "fsdp", "model")),
        (("pairs", "attention", "output", "kernel"), (2, 64, 512), P(None, "model", "fsdp")),
        (("pairs", "mlp", "down", "kernel"), (2, 512, 64), P(None, ("model", "fsdp"))),
        # The first dimension in parts of 128, though another is larger.
        (("pairs", "mlp", "gate", "kernel"), (2, 256, 4096), P(None, "fsdp", "model")),
        (("pairs", "mlp", "gate", "kernel"), (2, 192, 4096), P(None, None, ("model", "fsdp"))),
        (("embedding",), (4096, 64), P(("model", "fsdp"))),
        (("embedding",), (4, 2**12), P("model", "fsdp")),
        (("pairs", "pre_mlp_norm", "weight"), (2, 64), P()),
    ):
        assert partition(tuple(key(name) for name in names), shape, mesh) == expected, names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "divide the model's num_kv_heads, but 8 does not divide 4"),
        ({"vocab_size": 300}, "divide the model's vocab_size, but 8 does not divide 300"),
        ({"mlp_width": 100}, "divide the model's mlp_width, but 8 does not divide 100"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(change: dict[str, int], message: str) -> None:
    mesh = meshes.make_mesh(MeshConfig(fsdp=1, model=8), jax.devices())
    check_model(MODEL, mesh)
    with pytest.raises(ConfigError, match=message):
        check_model(MODEL.model_copy(update=change), mesh)


def test_a_large_array_that_cannot_be_sharded_is_refused() -> None:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices())
    message = r"8 divides none of embedding \(4097, 1025\); use another mesh.fsdp"
    with pytest.raises(ConfigError, match=message):
        partition((jax.tree_util.DictKey("embedding"),), (4097, 1025), mesh)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(model=3), "replica 1 x fsdp -1 x model 3 does not make 8 devices"),
        (MeshConfig(fsdp=3), "replica 1 x fsdp 3 x model 1 does not make 8 devices"),
        (MeshConfig(replica=3), "replica 3 x fsdp -1 x model 1 does not make 8 devices"),
        (MeshConfig(fsdp=0), "replica 1 x fsdp 0 x model 1 does not make 8 devices"),
    ],
)
def test_impossible_meshes_are_refused(config: MeshConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        meshes.make_mesh(config, jax.devices())


def test_a_batch_that_does_not_divide_is_refused() -> None:
    mesh = meshes.make_mesh(MeshConfig(replica=2), jax.devices())
    with pytest.raises(ConfigError, match=r"multiple of the 8 devices .* it is 12; use 16"):
        meshes.check_batch(mesh, 12)
