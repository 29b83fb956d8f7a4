"""The count of FLOPs and parameters, against the model itself and against measured figures."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from gemma2 import attention, flops, model, presets
from schemas.model import ModelConfig

# No two widths are alike, so that none can stand in for another.
ODD = ModelConfig(
    vocab_size=89,
    d_model=24,
    num_layers=6,
    mlp_width=56,
    num_heads=6,
    num_kv_heads=2,
    head_size=10,
    query_scalar=10,
    window_tokens=5,
    max_tokens=64,
)


@pytest.mark.parametrize(
    ("name", "embedding", "others"),
    [
        ("gemma2-2.6b", 590_118_912, 2_024_517_888),
        ("gemma2-9b", 917_962_752, 8_324_201_984),
        ("gemma2-27b", 1_180_237_824, 26_047_480_320),
    ],
)
def test_parameters_are_the_reports(name, embedding, others):
    counted = flops.parameters(presets.PRESETS[name])
    assert (counted.embedding, counted.non_embedding) == (embedding, others)
    assert counted.total == embedding + others


def test_parameters_are_those_of_the_model():
    """By kind: norms are the vectors, the embedding is the table, all else is in products."""
    shapes = jax.eval_shape(lambda: model.init_params(ODD, jax.random.key(0)))
    leaves = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree.leaves_with_path(shapes)}
    norms = sum(leaf.size for path, leaf in leaves.items() if "norm" in path)
    table = sum(leaf.size for path, leaf in leaves.items() if "embedding" in path)
    counted = flops.parameters(ODD)
    assert (counted.norms, counted.embedding) == (norms, table)
    assert counted.total == model.num_parameters(ODD)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 13, 14])
def test_attended_pairs_are_those_the_kernel_uses(window):
    """Values that reach an output, counted one by one from the kernel's own derivative."""
    length = 13
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (1, length, 1, 2)) for k in keys)
    segments = jnp.ones((1, length), jnp.int32)

    def out(value):
        return attention.reference(query, key, value, segments, cap=5.0, window=window)[0, :, 0, 0]

    weights = jax.jacobian(out)(value)[:, 0, :, 0, 0]
    assert weights.shape == (length, length)
    assert flops.attended_pairs(length, window) == int(np.count_nonzero(weights))


def product_flops(jaxpr) -> dict[str, int]:
    """FLOPs of every matrix product in a traced program, loops unrolled, by kind of product.

    A product has free axes on both sides; the norms' scales are contractions without.
    """
    found = {"linear": 0, "head": 0, "attention": 0}
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            for kind, count in product_flops(inner).items():
                found[kind] += times * count
        if equation.primitive.name != "dot_general":
            continue
        contracted, batched = equation.params["dimension_numbers"]
        left, right = (operand.aval.shape for operand in equation.invars)
        sizes = [
            [size for axis, size in enumerate(shape) if axis not in (*over, *each)]
            for shape, over, each in zip((left, right), contracted, batched, strict=True)
        ]
        if not all(sizes):
            continue
        over = int(np.prod([left[axis] for axis in contracted[0]]))
        out = int(np.prod(equation.outvars[0].aval.shape))
        is_head = ODD.vocab_size in (*left, *right)
        found["attention" if batched[0] else "head" if is_head else "linear"] += 2 * out * over
    return found


def test_a_forward_has_the_counted_products():
    """The traced model: the same products, except that its masked scores are computed too."""
    batch, length = 3, 17
    shapes = jax.eval_shape(lambda: model.init_params(ODD, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def forward(params, tokens, segments):
        hidden = model.hidden_states(params, ODD, tokens, segments, dtype=jnp.float32)
        return model.logits(params, ODD, hidden)

    traced = product_flops(jax.make_jaxpr(forward)(shapes, ids, ids).jaxpr)
    tokens = batch * length
    counted = flops.forward_flops_per_token(ODD, length)
    assert traced["linear"] == counted.linear * tokens
    assert traced["head"] == counted.head * tokens
    pairs = {"local": 0, "global": 0}
    for t in range(length):
        for s in range(length):
            pairs["global"] += s <= t
            pairs["local"] += 0 <= t - s < ODD.window_tokens
    layers = {"local": 3, "global": 3}
    all_pairs = 6 * length**2
    per_pair = traced["attention"] / (batch * all_pairs)
    for kind, found in (("local", counted.local_attention), ("global", counted.global_attention)):
        assert found * tokens == pytest.approx(batch * layers[kind] * pairs[kind] * per_pair)


def test_a_backward_has_twice_the_products_of_the_forward():
    length = 9
    shapes = jax.eval_shape(lambda: model.init_params(ODD, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(params, tokens, segments):
        hidden = model.hidden_states(params, ODD, tokens, segments, dtype=jnp.float32)
        return jnp.sum(model.logits(params, ODD, hidden))

    forward, both = (
        product_flops(jax.make_jaxpr(run)(shapes, ids, ids).jaxpr)
        for run in (loss, jax.value_and_grad(loss))
    )
    assert both == {kind: flops.TRAINING_TO_FORWARD * count for kind, count in forward.items()}
    one = flops.forward_flops_per_token(ODD, length).total
    assert flops.training_flops_per_token(ODD, length) == 3 * one


@pytest.mark.parametrize(
    ("name", "tokens_per_second", "model_tflops_per_second"),
    [("gemma2-9b", 27_540, 577), ("gemma2-27b", 10_076, 576)],
)
def test_measured_forward_rates_agree(name, tokens_per_second, model_tflops_per_second):
    """Rates that were counted independently when they were measured: one H200, L = 8192."""
    counted = flops.forward_flops_per_token(presets.PRESETS[name], 8192).total
    assert round(tokens_per_second * counted / 1e12) == model_tflops_per_second


def test_the_training_step_of_the_smallest_is_18_gflop_a_token():
    counted = flops.training_flops_per_token(presets.PRESETS["gemma2-2.6b"], 8192)
    assert round(counted / 1e9, 1) == 18.0
    assert round(27_016 * counted / 1e12) == 486


def test_a_window_wider_than_the_row_is_none():
    wide = ODD.model_copy(update={"window_tokens": 9})
    counted = flops.forward_flops_per_token(wide, 9)
    assert counted.local_attention == counted.global_attention
    assert flops.forward_flops_per_token(ODD, 9).local_attention < counted.local_attention


def test_counting_needs_no_jax():
    code = "import sys, gemma2.flops; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
