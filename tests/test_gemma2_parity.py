"""Logits against transformers' Gemma 2, with weights so large that every feature matters.

Each feature is then switched off on our side, and the comparison must fail by far.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2 import checkpoint, model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
LENGTH = 50  # more than twice the window, and no block divides it
WINDOW = 12


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A saved random model, tokens, and transformers' float32 logits for them."""
    config = transformers.Gemma2Config(
        vocab_size=211,
        hidden_size=96,
        num_hidden_layers=4,
        intermediate_size=160,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        query_pre_attn_scalar=96 // 6,
        sliding_window=WINDOW,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        max_position_embeddings=128,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    network = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 1.0)
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(1.2)
            elif "norm" not in name and "embed" not in name:
                parameter.mul_(0.15)
        network.model.embed_tokens.weight.mul_(1.5)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 211, (2, LENGTH)))
    with torch.no_grad():
        logits = network(tokens).logits.numpy()
    folder = tmp_path_factory.mktemp("hf")
    network.save_pretrained(folder)
    return folder, tokens.numpy().astype(np.int32), logits, network


def our_logits(config, params, tokens):
    hidden = model.hidden_states(
        params, config, tokens, jnp.ones(tokens.shape, jnp.int32), dtype=jnp.float32
    )
    return np.asarray(model.logits(params, config, hidden))


def kl(left, right):
    """Largest KL over positions, in nats."""
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(x), axis=-1) for x in (left, right))
    return float(jnp.max(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)))


def test_logits_agree(reference):
    folder, tokens, expected, _ = reference
    config, params = checkpoint.load(folder)
    with jax.default_matmul_precision("highest"):
        ours = our_logits(config, params, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    assert kl(expected, ours) < 1e-6


def test_caps_saturate(reference):
    """Without this, the tests of the caps could not fail."""
    folder, tokens, expected, _ = reference
    assert np.mean(np.abs(expected) > 15) > 0.1
    config, params = checkpoint.load(folder)
    x = params["embedding"][tokens] * config.d_model**0.5
    layer = jax.tree.map(lambda leaf: leaf[0], params["pairs"]["local_layer"])
    norm = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)
    norm = norm * (1 + layer["pre_attention_norm"]["weight"][None, None])
    query, key = (
        (norm @ layer["attention"][name]["kernel"]).reshape(*tokens.shape, -1, config.head_size)
        for name in ("query", "key")
    )
    scores = np.einsum("bthd,bshd->bhts", query[:, :, ::3], key) * config.query_scalar**-0.5
    assert np.mean(np.abs(scores) > 50) > 0.05


def _zeroed(params, *path):
    """A copy of the parameters with one tensor set to zero."""
    changed = jax.tree.map(lambda x: x, params)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = jnp.zeros_like(node[path[-1]])
    return changed


CONFIG_CHANGES = {
    "no attention cap": {"attention_cap": None},
    "no final cap": {"final_cap": None},
    "no window": {"window_tokens": 1000},
    "window without the query itself": {"window_tokens": WINDOW + 1},
    "head size as query scale": {"query_scalar": 24},
    "another rope base": {"rope_base": 1_000_000.0},
    "another epsilon": {"norm_epsilon": 1e-2},
}


@pytest.mark.parametrize("change", CONFIG_CHANGES)
def test_each_setting_matters(reference, change):
    folder, tokens, expected, _ = reference
    config, params = checkpoint.load(folder)
    ours = our_logits(config.model_copy(update=CONFIG_CHANGES[change]), params, tokens)
    assert np.max(np.abs(ours - expected)) > 100 * TOLERANCE


def _swap_layers(monkeypatch):
    call = model.LayerPair.__call__

    def swapped(self, x, segments, execution):
        self.local_layer.attention.window, self.global_layer.attention.window = (
            None,
            self.local_layer.attention.config.window_tokens,
        )
        return call(self, x, segments, execution)

    monkeypatch.setattr(model.LayerPair, "__call__", swapped)


def _exact_gelu(monkeypatch):
    gelu = jax.nn.gelu
    monkeypatch.setattr(model.jax.nn, "gelu", lambda x, approximate: gelu(x, approximate=False))


def _no_rope(monkeypatch):
    monkeypatch.setattr(model, "rotate", lambda x, base: x)


def _interleaved_rope(monkeypatch):
    rotate = model.rotate

    def interleaved(x, base):
        order = jnp.concatenate([jnp.arange(0, x.shape[-1], 2), jnp.arange(1, x.shape[-1], 2)])
        return rotate(x[..., order], base)[..., jnp.argsort(order)]

    monkeypatch.setattr(model, "rotate", interleaved)


def _no_unit_offset(monkeypatch):
    def plain(self, x):
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        return jnp.einsum("...d,d->...d", x * scale, self.weight[...])

    monkeypatch.setattr(model.RMSNorm, "__call__", plain)


def _no_post_norms(monkeypatch):
    def without(self, x, segments, execution):
        x = x + self.attention(self.pre_attention_norm(x), segments, execution)
        return x + self.mlp(self.pre_mlp_norm(x), execution)

    monkeypatch.setattr(model.Layer, "__call__", without)


def _other_groups(monkeypatch):
    reference_kernel = model.attention_kernels.reference

    def regrouped(query, key, value, segments, **options):
        heads = query.shape[2]
        order = jnp.arange(heads).reshape(-1, key.shape[2]).T.reshape(-1)
        out = reference_kernel(query[:, :, order], key, value, segments, **options)
        return out[:, :, jnp.argsort(order)]

    monkeypatch.setattr(model.attention_kernels, "choose", lambda *a, **k: regrouped)


def _no_embedding_scale(monkeypatch):
    original = model.Gemma2.__call__

    def unscaled(self, *args, **kwargs):
        self.config = self.config.model_copy(update={"d_model": 1})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(model.Gemma2, "__call__", unscaled)


BREAKS = [
    _swap_layers,
    _exact_gelu,
    _no_rope,
    _interleaved_rope,
    _no_unit_offset,
    _no_post_norms,
    _other_groups,
    _no_embedding_scale,
]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__.strip("_"))
def test_each_feature_matters(reference, break_it, monkeypatch):
    folder, tokens, expected, _ = reference
    config, params = checkpoint.load(folder)
    break_it(monkeypatch)
    ours = our_logits(config, params, tokens)
    assert np.max(np.abs(ours - expected)) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "path",
    [
        ("final_norm", "weight"),
        ("pairs", "local_layer", "post_mlp_norm", "weight"),
        ("pairs", "global_layer", "attention", "value", "kernel"),
        ("pairs", "global_layer", "mlp", "up", "kernel"),
    ],
    ids="/".join,
)
def test_each_tensor_matters(reference, path):
    folder, tokens, expected, _ = reference
    config, params = checkpoint.load(folder)
    ours = our_logits(config, _zeroed(params, *path), tokens)
    assert np.max(np.abs(ours - expected)) > 100 * TOLERANCE


@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 200_000], ids=["one file", "sharded"])
def test_transformers_opens_what_we_save(reference, tmp_path, max_shard_bytes):
    folder, tokens, expected, _ = reference
    config, params = checkpoint.load(folder)
    checkpoint.save(tmp_path / "out", config, params, max_shard_bytes=max_shard_bytes)
    is_sharded = (tmp_path / "out" / checkpoint.INDEX_FILE).exists()
    assert is_sharded == (max_shard_bytes < 2**30)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = network(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-6)
    again, reloaded = checkpoint.load(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)


def test_we_open_what_transformers_shards(reference, tmp_path):
    _, tokens, expected, network = reference
    network.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config, params = checkpoint.load(tmp_path)
    np.testing.assert_allclose(our_logits(config, params, tokens), expected, rtol=0, atol=TOLERANCE)


def test_hf_config_that_is_no_gemma2_is_refused(reference, tmp_path):
    folder, *_ = reference
    stored = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"model_type": "llama"}))
    with pytest.raises(checkpoint.CheckpointError, match=r"model_type = gemma2, but .* has llama"):
        checkpoint.load_config(tmp_path)
