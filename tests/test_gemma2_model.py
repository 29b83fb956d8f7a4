"""Parameter counts, packed segments, remat and bf16 of the decoder."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma2 import attention, model, presets
from gemma2.model import Execution
from gemma2.placement import Placement
from schemas.errors import ConfigError
from schemas.runs import MeshConfig
from student_train import mesh as meshes

TINY = presets.PRESETS["tiny"]
pytestmark = pytest.mark.usefixtures("compile_once", "compile_quickly")


@pytest.mark.parametrize(
    ("name", "embedding", "others"),
    [
        ("gemma2-2.6b", 590_118_912, 2_024_517_888),
        ("gemma2-9b", 917_962_752, 8_324_201_984),
        ("gemma2-27b", 1_180_237_824, 26_047_480_320),
    ],
)
def test_parameter_counts_are_the_reports(name, embedding, others):
    config = presets.PRESETS[name]
    assert config.vocab_size * config.d_model == embedding
    assert model.num_parameters(config) == embedding + others


def test_27b_query_scale_is_not_the_head_size():
    config = presets.PRESETS["gemma2-27b"]
    assert (config.query_scalar, config.head_size) == (144, 128)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: model.init_params(TINY, jax.random.key(0)))()


@functools.partial(jax.jit, static_argnames=("dtype", "remat"))
def hidden(params, tokens, segments, *, dtype=jnp.float32, remat="none"):
    return model.hidden_states(params, TINY, tokens, segments, dtype=dtype, remat=remat)


def test_packed_documents_are_as_if_alone(params):
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, TINY.vocab_size, (1, n)).astype(np.int32) for n in (21, 40))
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], axis=1)
    segments = np.repeat([1, 2, 0], [21, 40, 3])[None].astype(np.int32)
    together = hidden(params, packed, segments)
    for document, part in ((first, together[:, :21]), (second, together[:, 21:61])):
        alone = hidden(params, document, np.ones_like(document))
        np.testing.assert_allclose(part, alone, atol=2e-5)
    merged = hidden(params, packed, np.ones_like(packed))
    assert np.abs(merged[:, 21:61] - together[:, 21:61]).max() > 0.1


def test_later_tokens_change_nothing_before_them(params):
    tokens = np.arange(48, dtype=np.int32)[None]
    changed = tokens.copy()
    changed[0, 30] = 400
    ones = np.ones_like(tokens)
    before, after = hidden(params, tokens, ones), hidden(params, changed, ones)
    np.testing.assert_array_equal(before[:, :30], after[:, :30])
    assert np.abs(before[:, 30:] - after[:, 30:]).max() > 0.1


@pytest.mark.parametrize("block", [16, 24], ids=["even", "last block short"])
def test_query_blocks_change_nothing(monkeypatch, block):
    keys = jax.random.split(jax.random.key(3), 3)
    query, key, value = (
        jax.random.normal(k, (2, 64, heads, 8)) for k, heads in zip(keys, (4, 2, 2), strict=True)
    )
    segments = jnp.repeat(jnp.array([1, 2]), 32)[None].repeat(2, axis=0)

    def value_and_gradients():
        def loss(query, key, value):
            out = attention.reference(query, key, value, segments, cap=5.0, window=9)
            return jnp.sum(jnp.sin(out)), out

        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        (_, out), gradients = run(query, key, value)
        return out, *gradients

    whole = value_and_gradients()
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    blocked = value_and_gradients()
    assert blocked[0].shape == (2, 64, 4, 8)
    for left, right in zip(whole, blocked, strict=True):
        assert float(jnp.max(jnp.abs(left))) > 0.1
        np.testing.assert_allclose(left, right, atol=2e-6)


def test_remat_changes_no_gradient(params):
    tokens = jnp.arange(48, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradients(params, remat):
        return jnp.sum(jnp.square(hidden(params, tokens, jnp.ones_like(tokens), remat=remat)))

    plain = gradients(params, "none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    for remat in ("dots", "attention", "full"):
        other = gradients(params, remat)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other
        )


@functools.cache
def kept(remat, execution=None):
    """(shape, dtype) of all that the backward is given, but for the parameters themselves."""
    config = TINY.model_copy(update={"num_layers": 8})
    params = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2 if execution is None else 8, 40), jnp.int32)

    def residuals(params, tokens):
        def run(params):
            return model.hidden_states(
                params,
                config,
                tokens,
                tokens,
                dtype=jnp.bfloat16,
                remat=remat,
                execution=execution,
            )

        return jax.vjp(run, params)[1]

    given = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
    found = jax.tree.leaves(jax.eval_shape(residuals, params, tokens))
    return [x for x in found if (x.shape, x.dtype) not in given], jax.tree.leaves(params)


def test_each_remat_policy_keeps_less_than_the_one_before():
    sizes = [
        sum(x.size * x.dtype.itemsize for x in kept(remat)[0])
        for remat in ("none", "dots", "attention", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    of_pairs = [x.shape for x in kept("full")[0] if x.shape[:1] == (4,)]
    assert of_pairs == [(4, 2, 40, TINY.d_model)]


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_no_weight_is_kept_in_the_compute_dtype(remat):
    """Under fsdp it would be a gathered one, and each device would come to hold them all."""
    check_that_no_weight_is_kept(*kept(remat))


@pytest.mark.parametrize("is_unrolled", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_no_gathered_weight_is_kept(remat, is_unrolled):
    mesh = meshes.make_mesh(MeshConfig(fsdp=8), jax.devices()[:8])
    execution = Execution("reference", Placement(mesh), is_unrolled)
    check_that_no_weight_is_kept(*kept(remat, execution))


def check_that_no_weight_is_kept(residuals, params):
    weights = {leaf.shape for leaf in params if leaf.ndim == 3}
    assert weights
    # Of the stack of a loop, or of one pair.
    weights |= {shape[1:] for shape in weights}
    assert not [x for x in residuals if x.dtype == jnp.bfloat16 and x.shape in weights]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_weights_are_gathered_for_the_forward_and_once_for_the_backward(remat):
    """Also where nothing keeps the compiler from using the first copy again."""
    placement = Placement(meshes.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))
    execution = Execution("reference", placement, is_unrolled=True)
    shapes = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=placement.sharding(path, x.shape)
        ),
        jax.eval_shape(lambda: model.init_params(TINY, jax.random.key(0))),
    )
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def loss(params, tokens):
        hidden = model.hidden_states(
            params, TINY, tokens, tokens, dtype=jnp.bfloat16, remat=remat, execution=execution
        )
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    text = jax.jit(jax.grad(loss)).lower(shapes, tokens).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    # Two layers; keys' and values' matrices are too small to be cut.
    assert Counter(gathered) == {"512,64": 1, "64,64": 2 * 4, "64,128": 2 * 4, "128,64": 2 * 2}


@pytest.mark.parametrize("devices", [1, 4])
def test_a_product_has_the_gradients_of_the_one_jax_knows(devices):
    mesh = meshes.make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
    placement = Placement(mesh if devices > 1 else None)
    keys = jax.random.split(jax.random.key(0), 3)
    rows, kernel, cotangent = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((24, 512), (512, 96), (24, 96)), strict=True)
    )
    part = jax.device_put(kernel, NamedSharding(mesh, P("fsdp"))) if devices > 1 else kernel

    def gradients(multiply, kernel):
        found, back = jax.vjp(multiply, rows, kernel)
        return found, *back(cotangent)

    product = functools.partial(placement.product, "gate")
    found = jax.jit(functools.partial(gradients, product))(part)
    for actual, expected in zip(found, gradients(jnp.matmul, kernel), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert found[2].sharding.shard_shape(kernel.shape) == (512 // devices, 96)


def test_bfloat16_is_near_float32(params):
    tokens = jnp.arange(48, dtype=jnp.int32)[None]
    ones = jnp.ones_like(tokens)
    wide, narrow = hidden(params, tokens, ones), hidden(params, tokens, ones, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    error = jnp.abs(wide - narrow.astype(jnp.float32))
    assert 1e-4 < float(jnp.max(error)) < 0.15


def test_depth_does_not_grow_the_program():
    def size(layers):
        config = TINY.model_copy(update={"num_layers": layers})
        shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        run = jax.jit(lambda p, t: model.hidden_states(p, config, t, t, dtype=jnp.float32))
        return len(run.lower(shapes, tokens).as_text().splitlines())

    assert size(16) == size(8)


def test_a_kernel_without_a_feature_is_refused_by_name(monkeypatch):
    plain = attention.Kernel(attention.reference, False, True, True, True)
    monkeypatch.setitem(attention.KERNELS, "plain", plain)
    needs = {"window": 4, "dtype": jnp.float32, "backward": True}
    attention.choose("plain", TINY.model_copy(update={"attention_cap": None}), **needs)
    with pytest.raises(ConfigError, match="'plain' lacks soft-cap"):
        attention.choose("plain", TINY, **needs)


def test_a_kernel_without_segments_is_refused_by_name(monkeypatch):
    single = attention.Kernel(attention.reference, True, True, False, True)
    monkeypatch.setitem(attention.KERNELS, "single", single)
    with pytest.raises(ConfigError, match="'single' lacks segments; choose"):
        attention.choose("single", TINY, window=None, dtype=jnp.float32, backward=True)


def test_an_unknown_remat_policy_is_refused(params):
    ones = np.ones((1, 4), np.int32)
    with pytest.raises(ConfigError, match="one of none, dots, attention, full, but it is 'half'"):
        hidden(params, ones, ones, remat="half")


def test_padding_alone_is_finite(params):
    zeros = np.zeros((1, 48), np.int32)
    assert bool(jnp.isfinite(hidden(params, zeros, zeros)).all())


def test_a_model_file_is_read_and_checked(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(TINY.model_dump_json())
    assert presets.resolve(str(path)) == TINY
    path.write_text(TINY.model_dump_json().replace('"num_layers":2', '"num_layers":3'))
    with pytest.raises(ConfigError, match=r"num_layers must be even.*it is 3"):
        presets.resolve(str(path))


def test_an_unknown_model_names_the_presets():
    with pytest.raises(ConfigError, match=r"preset \(gemma2-2\.6b.*'gemma3' is neither"):
        presets.resolve("gemma3")
