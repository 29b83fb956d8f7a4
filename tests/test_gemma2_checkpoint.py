"""Damaged, incomplete and foreign checkpoints, and how a folder is written and replaced."""

import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from gemma2 import checkpoint, model, presets
from gemma2.placement import ALONE, AXES, Placement
from schemas.errors import CheckpointError, ConfigError

CONFIG = presets.PRESETS["tiny"].model_copy(update={"num_layers": 4})
SHARD_BYTES = 100_000


@pytest.fixture(scope="module")
def params():
    return model.init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def whole(tmp_path, params):
    """A checkpoint in one file."""
    checkpoint.save(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, params):
    """The same in several files."""
    checkpoint.save(tmp_path / "model", CONFIG, params, max_shard_bytes=SHARD_BYTES)
    return tmp_path / "model"


def edit(folder, change):
    """Rewrite the single weight file after `change` (tensors by name) was applied."""
    tensors = load_file(folder / checkpoint.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / checkpoint.WEIGHTS_FILE)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_shards_keep_to_their_limit(sharded, params):
    files = sorted(sharded.glob("*.safetensors"))
    largest = max(leaf[0].nbytes for leaf in jax.tree.leaves(params["pairs"]))
    assert len(files) > 3
    assert largest < SHARD_BYTES  # so that only the embedding may exceed it
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= SHARD_BYTES or len(tensors) == 1
    index = json.loads((sharded / checkpoint.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert_equal(checkpoint.load(sharded)[1], params)


def test_the_host_holds_one_tensor_at_a_time(sharded, params, monkeypatch):
    """Each goes to its devices, as a part of its stack, before the next is read."""
    alive, most = [0], [0]
    read = checkpoint._tensor

    def counted(path, name):
        value = read(path, name)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(value, lambda: alive.__setitem__(0, alive[0] - 1))
        return value

    monkeypatch.setattr(checkpoint, "_tensor", counted)
    mesh = jax.make_mesh(
        (1, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:2]
    )
    for placement in (ALONE, Placement(mesh, is_table_whole=True)):
        most[0] = 0
        _, found = checkpoint.load(sharded, placement=placement)
        assert_equal(found, params)
        for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
            where = placement.sharding(path, leaf.shape)
            assert where is None or leaf.sharding.is_equivalent_to(where, leaf.ndim)
        # Two that are not stacked may be the parameters themselves here, where host is device.
        assert 1 <= most[0] <= 4
        del found, leaf


def test_bfloat16_is_stored_as_it_is_and_widened_on_request(tmp_path, params):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    checkpoint.save(tmp_path / "model", CONFIG, narrow)
    _, as_stored = checkpoint.load(tmp_path / "model")
    _, widened = checkpoint.load(tmp_path / "model", dtype=jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(as_stored)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(widened)} == {"float32"}
    assert_equal(as_stored, narrow)
    assert_equal(widened, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow))


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.gate_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_a_missing_tensor_is_named(whole, name):
    edit(whole, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"lacks 1: {name}; restore"):
        checkpoint.load(whole)


def test_a_tensor_too_many_is_named(whole):
    edit(whole, lambda t: t.update({"model.layers.4.mlp.up_proj.weight": np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"no others, but .* has model\.layers\.4\.mlp\.up"):
        checkpoint.load(whole)


@pytest.mark.parametrize(
    ("name", "wanted", "found"),
    [
        ("model.layers.2.mlp.gate_proj.weight", "(128, 64)", "(127, 64)"),
        ("model.layers.0.self_attn.k_proj.weight", "(32, 64)", "(31, 64)"),
        ("model.norm.weight", "(64,)", "(63,)"),
        ("model.embed_tokens.weight", "(512, 64)", "(511, 64)"),
    ],
)
def test_an_ill_shaped_tensor_is_named_with_both_shapes(whole, name, wanted, found):
    edit(whole, lambda tensors: tensors.update({name: tensors[name][:-1].copy()}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(whole)
    assert f"{wanted} for {name}, but in {whole}/model.safetensors it is {found};" in str(
        caught.value
    )


def test_a_truncated_file_is_named(whole):
    path = whole / checkpoint.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"whole safetensors file, but .*model\.safetensors"):
        checkpoint.load(whole)


def test_a_damaged_shard_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=rf"whole safetensors file with .*{path.name}"):
        checkpoint.load(sharded)


def test_a_missing_shard_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"must be there, but .*{path.name} is not"):
        checkpoint.load(sharded)


def test_an_index_that_points_at_the_wrong_shard_is_named(sharded):
    index = json.loads((sharded / checkpoint.INDEX_FILE).read_text())
    places = index["weight_map"]
    name = "model.norm.weight"
    places[name] = next(file for file in places.values() if file != places[name])
    (sharded / checkpoint.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"file with {name}, but .*{places[name]} is not"):
        checkpoint.load(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(sharded, text):
    (sharded / checkpoint.INDEX_FILE).write_text(text)
    with pytest.raises(
        CheckpointError, match=r"must hold a weight_map, but .*index\.json does not"
    ):
        checkpoint.load(sharded)


def test_a_folder_without_weights_is_refused(whole):
    (whole / checkpoint.WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"holds neither; convert the weights"):
        checkpoint.load(whole)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "must be JSON"), ("[]", "must hold key: value pairs")]
)
def test_a_damaged_config_is_named(whole, text, message):
    (whole / checkpoint.CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{message}, but .*config\.json"):
        checkpoint.load(whole)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing/config\.json cannot be read"):
        checkpoint.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation = gelu_pytorch_tanh, but .* has gelu;"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = True, but .* has False"),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "sliding first, but .*full_attention",
        ),
    ],
)
def test_another_architecture_is_refused(whole, change, message):
    edit_json(whole / checkpoint.CONFIG_FILE, **change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_config(whole)


def test_a_config_that_breaks_a_rule_says_which(whole):
    edit_json(whole / checkpoint.CONFIG_FILE, num_key_value_heads=3)
    with pytest.raises(ConfigError, match=r"config\.json: .*num_kv_heads must divide num_heads"):
        checkpoint.load_config(whole)


def test_the_tokenizer_travels_with_the_model(tmp_path, params):
    tokenizer = tmp_path / "pieces.bin"
    tokenizer.write_bytes(b"pieces")
    checkpoint.save(tmp_path / "model", CONFIG, params, tokenizer)
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == b"pieces"


def test_a_checkpoint_is_replaced_whole(sharded, params):
    changed = jax.tree.map(lambda leaf: leaf + 1.0, params)
    checkpoint.save(sharded, CONFIG, changed)
    assert {file.name for file in sharded.iterdir()} == {"config.json", "model.safetensors"}
    assert [entry.name for entry in sharded.parent.iterdir()] == ["model"]
    assert_equal(checkpoint.load(sharded)[1], changed)


def test_a_failed_save_leaves_the_old_checkpoint(whole, params, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(whole, CONFIG, jax.tree.map(jnp.zeros_like, params))
    assert [entry.name for entry in whole.parent.iterdir()] == ["model"]
    assert_equal(checkpoint.load(whole)[1], params)


def test_a_folder_of_the_user_is_not_replaced(whole, params):
    (whole / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"also holds thesis\.tex; choose another folder"):
        checkpoint.save(whole, CONFIG, params)
    assert (whole / "thesis.tex").read_text() == "years of work"


def test_the_fingerprint_follows_config_and_weights(whole, params):
    config_hash, weights_hash = checkpoint.fingerprint(whole)
    assert len(config_hash) == len(weights_hash) == 64
    edit_json(whole / checkpoint.CONFIG_FILE, transformers_version="9.9")
    assert checkpoint.fingerprint(whole) == (config_hash, weights_hash)
    edit_json(whole / checkpoint.CONFIG_FILE, final_logit_softcapping=20.0)
    assert checkpoint.fingerprint(whole)[0] != config_hash
    edit(whole, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1.0))
    assert checkpoint.fingerprint(whole)[1] != weights_hash
