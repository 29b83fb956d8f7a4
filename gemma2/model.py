"""The Gemma 2 decoder: its modules in Flax NNX, and the pure functions that everything else calls.

Source: arXiv 2408.00118. Layers alternate local (sliding window) and global attention, the first
is local; one `LayerPair` holds both. Pairs are stacked on axis 0 and run by a scan, so that the
time to compile does not grow with depth. Parameters keep Hugging Face's values (norms as `1 + w`);
no scale is folded into a weight.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax import checkpoint_policies as policies
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from gemma2 import attention as attention_kernels
from gemma2.float8 import Float8, product
from gemma2.placement import ALONE, Placement
from schemas.errors import ConfigError
from schemas.model import ModelConfig, Remat

Params = dict[str, Any]


def _all_but_copies(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in ("convert_element_type", "sharding_constraint")


# What of a layer pair is kept for the backward; the rest is computed again. Gathered weights never
# are kept: each device would come to hold all of them.
_POLICIES: dict[Remat, Any] = {
    "none": _all_but_copies,
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names("attention"),
    ),
    "attention": policies.save_only_these_names("attention"),
    "full": policies.nothing_saveable,
}


class Execution(NamedTuple):
    """What is static about how the layers run."""

    attention: str = "auto"
    """The kernel's name."""
    placement: Placement = ALONE
    is_unrolled: bool = False
    """Layer after layer in one program instead of a loop: nothing is copied into stacks of what
    the backward needs, and compiling takes longer the more layers there are."""


# So few are not worth a loop, in which XLA on CPU does less in parallel.
_UNROLLED_PAIRS = 2


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + w) in float32, returned in x's dtype."""

    def __init__(self, size: int, epsilon: float, param_dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros((size,), param_dtype))
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return jnp.einsum(
            "...d,d->...d", wide * scale, 1.0 + self.weight[...].astype(jnp.float32)
        ).astype(x.dtype)


class Linear(nnx.Module):
    """y = x @ kernel; kernel [inputs, outputs], no bias; or, in a forward pass, a Float8."""

    def __init__(
        self, name: str, inputs: int, outputs: int, rngs: nnx.Rngs, param_dtype: DTypeLike
    ):
        self.name = name
        scale = inputs**-0.5
        self.kernel = nnx.Param(
            scale * jax.random.normal(rngs.params(), (inputs, outputs), param_dtype)
        )

    @jax.named_scope("linear")
    def __call__(self, x: Array, execution: Execution) -> Array:
        kernel = self.kernel.get_value()
        # As one matrix: XLA on CPU is three times slower at the gradient of a batched product.
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(kernel, Float8):
            rows = product(rows, kernel)
        else:
            rows = execution.placement.product(self.name, rows, kernel)
        return rows.reshape(*x.shape[:-1], -1)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and a soft-cap on the scores."""

    def __init__(
        self, config: ModelConfig, window: int | None, rngs: nnx.Rngs, param_dtype: DTypeLike
    ):
        self.config, self.window = config, window
        d, h = config.d_model, config.head_size
        self.query = Linear("query", d, config.num_heads * h, rngs, param_dtype)
        self.key = Linear("key", d, config.num_kv_heads * h, rngs, param_dtype)
        self.value = Linear("value", d, config.num_kv_heads * h, rngs, param_dtype)
        self.output = Linear("output", config.num_heads * h, d, rngs, param_dtype)

    def __call__(self, x: Array, segment_ids: Array, execution: Execution) -> Array:
        config = self.config
        heads = (*x.shape[:2], -1, config.head_size)
        query = rotate(self.query(x, execution).reshape(heads), config.rope_base)
        key = rotate(self.key(x, execution).reshape(heads), config.rope_base)
        run = attention_kernels.choose(
            execution.attention, config, window=self.window, dtype=x.dtype, backward=True
        )
        out = execution.placement.attend(
            partial(run, cap=config.attention_cap, window=self.window),
            query * jnp.asarray(config.query_scalar**-0.5, query.dtype),
            key,
            self.value(x, execution).reshape(heads),
            segment_ids,
        )
        out = checkpoint_name(out, "attention")
        return self.output(out.reshape(*x.shape[:2], -1), execution)


class MLP(nnx.Module):
    """GeGLU with the tanh approximation of GELU."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.gate = Linear("gate", config.d_model, config.mlp_width, rngs, param_dtype)
        self.up = Linear("up", config.d_model, config.mlp_width, rngs, param_dtype)
        self.down = Linear("down", config.mlp_width, config.d_model, rngs, param_dtype)

    @jax.named_scope("mlp")
    def __call__(self, x: Array, execution: Execution) -> Array:
        gate = jax.nn.gelu(self.gate(x, execution), approximate=True)
        return self.down(gate * self.up(x, execution), execution)


class Layer(nnx.Module):
    """Attention and MLP, each between a norm before and a norm after, added to the stream."""

    def __init__(
        self, config: ModelConfig, window: int | None, rngs: nnx.Rngs, param_dtype: DTypeLike
    ):
        norm = partial(RMSNorm, config.d_model, config.norm_epsilon, param_dtype)
        self.pre_attention_norm, self.post_attention_norm = norm(), norm()
        self.pre_mlp_norm, self.post_mlp_norm = norm(), norm()
        self.attention = Attention(config, window, rngs, param_dtype)
        self.mlp = MLP(config, rngs, param_dtype)

    def __call__(self, x: Array, segment_ids: Array, execution: Execution) -> Array:
        rows = execution.placement.rows
        mixed = rows(self.attention(self.pre_attention_norm(x), segment_ids, execution))
        x = x + self.post_attention_norm(mixed)
        return x + self.post_mlp_norm(rows(self.mlp(self.pre_mlp_norm(x), execution)))


class LayerPair(nnx.Module):
    """A local layer, then a global one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.local_layer = Layer(config, config.window_tokens, rngs, param_dtype)
        self.global_layer = Layer(config, None, rngs, param_dtype)

    def __call__(self, x: Array, segment_ids: Array, execution: Execution) -> Array:
        x = self.local_layer(x, segment_ids, execution)
        return self.global_layer(x, segment_ids, execution)


class Gemma2(nnx.Module):
    """The whole decoder; `pairs` holds the parameters of all layer pairs stacked on axis 0."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        self.config = config
        # Scaled so that the embedded tokens, times sqrt(d_model), have unit variance.
        self.embedding = nnx.Param(
            config.d_model**-0.5
            * jax.random.normal(rngs.params(), (config.vocab_size, config.d_model), param_dtype)
        )
        make_pair = nnx.vmap(lambda keys: LayerPair(config, keys, param_dtype))
        self.pairs = make_pair(rngs.fork(split=config.num_layers // 2))
        self.final_norm = RMSNorm(config.d_model, config.norm_epsilon, param_dtype)

    def __call__(
        self,
        tokens: Array,
        segment_ids: Array,
        *,
        dtype: DTypeLike,
        remat: Remat,
        execution: Execution,
    ) -> Array:
        """Final normalised hidden states [B, T, D] in `dtype`. Raises ConfigError."""
        if remat not in _POLICIES:
            raise ConfigError(f"remat must be one of {', '.join(_POLICIES)}, but it is '{remat}'.")
        x = execution.placement.embed(self.embedding[...], tokens, dtype)
        x = x * jnp.asarray(self.config.d_model**0.5, dtype)
        definition, stacked = nnx.split(self.pairs)
        policy, is_kept_apart = _POLICIES[remat], execution.is_unrolled
        if execution.is_unrolled and remat == "none":
            # The compiler finds what is to be computed again, and keeps what it finds useful. Were
            # all of it kept, it would write what it otherwise never takes out of a register.
            policy, is_kept_apart = _POLICIES["dots"], False

        def body(x: Array, pair: Any) -> tuple[Array, None]:
            return nnx.merge(definition, pair)(x, segment_ids, execution), None

        is_short = self.config.num_layers // 2 <= _UNROLLED_PAIRS
        body = jax.checkpoint(body, policy=policy, prevent_cse=is_kept_apart)
        x, _ = jax.lax.scan(body, x, stacked, unroll=execution.is_unrolled or is_short)
        return self.final_norm(x)


@jax.named_scope("rotary")
def rotate(x: Array, base: float) -> Array:
    """Rotary positions, half-split form: (x1, x2) of [B, T, heads, h] by angle t / base^(2i/h)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def init_params(config: ModelConfig, key: Array, param_dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters as a nested dict of arrays; layer pairs are stacked on axis 0."""
    model = Gemma2(config, nnx.Rngs(params=key), param_dtype)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    segment_ids: Array,
    *,
    dtype: DTypeLike,
    remat: Remat = "none",
    execution: Execution | None = None,
) -> Array:
    """Final normalised hidden states [B, T, D] in `dtype`, of tokens and segment ids [B, T].

    Without an `execution` it is one device and any of its kernels. Attention is causal and never
    crosses segment ids; segment 0 is padding, whose states are finite and mean nothing. Raises
    ConfigError for an unknown remat policy or attention kernel.
    """
    return _merge(params, config)(
        tokens,
        segment_ids,
        dtype=dtype,
        remat=remat,
        execution=execution or Execution(),
    )


def embedding(params: Params) -> Array:
    """The tied table [V, D]."""
    return params["embedding"]


def logits(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """Soft-capped logits float32 [..., V] of hidden states [..., D]."""
    products = head_products(params, hidden)
    return products if config.final_cap is None else soft_cap(products, config.final_cap)


def head_products(params: Params, hidden: Array) -> Array:
    """float32 [..., V], the logits before the cap; in hidden's dtype, summed in float32."""
    table = embedding(params).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def soft_cap(scores: Array, cap: float) -> Array:
    """cap · tanh(scores / cap)."""
    return cap * jnp.tanh(scores / cap)


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, without making any array."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _merge(params: Params, config: ModelConfig) -> Gemma2:
    abstract = nnx.eval_shape(lambda: Gemma2(config, nnx.Rngs(params=0)))
    definition, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(definition, state)
