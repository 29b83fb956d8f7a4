"""Parameters and model FLOPs of a Gemma 2 decoder, counted from its config alone.

Nothing here runs a model or imports JAX: a plan and a trainer's utilisation use the same count.
Model FLOPs are those of matrix products that the result needs: a masked pair of positions counts
nothing, and neither do norms, rotary positions, soft-caps, softmax, the embedding's look-up or what
the backward computes again. One multiply-add is two FLOPs. A row is one document: packed documents
attend to fewer pairs.
"""

from dataclasses import dataclass

from schemas.model import ModelConfig

FLOPS_PER_MULTIPLY_ADD = 2
TRAINING_TO_FORWARD = 3
"""Each product y = x w of the forward needs two in the backward: dx = dy wᵀ and dw = xᵀ dy."""
_PRODUCTS_PER_PAIR = 2
"""A query and a key it sees: the score q·k, and the value times its weight; head_size each."""


@dataclass(frozen=True)
class Parameters:
    """Parameters by what they do; the embedding is tied, so the head has none of its own."""

    embedding: int
    linear: int
    norms: int

    @property
    def non_embedding(self) -> int:
        return self.linear + self.norms

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding


@dataclass(frozen=True)
class FlopsPerToken:
    """Model FLOPs of one token, a mean over the positions of its row."""

    linear: float
    head: float
    local_attention: float
    global_attention: float

    @property
    def total(self) -> float:
        return self.linear + self.head + self.local_attention + self.global_attention


def parameters(config: ModelConfig) -> Parameters:
    """The model's parameters, to the unit."""
    query_and_output = 2 * config.d_model * config.num_heads * config.head_size
    key_and_value = 2 * config.d_model * config.num_kv_heads * config.head_size
    gate_up_down = 3 * config.d_model * config.mlp_width
    norms_per_layer = 4  # before and after each of attention and MLP
    return Parameters(
        embedding=config.vocab_size * config.d_model,
        linear=config.num_layers * (query_and_output + key_and_value + gate_up_down),
        norms=(config.num_layers * norms_per_layer + 1) * config.d_model,
    )


def attended_pairs(sequence_tokens: int, window_tokens: int | None) -> int:
    """Pairs (t, s) of a row's positions with s <= t and, under a window, t - s < window_tokens.

    Position t sees min(t + 1, w) keys: the first w positions 1, 2, …, w of them, the others w each.
    """
    window = min(sequence_tokens, window_tokens or sequence_tokens)
    return window * (window + 1) // 2 + (sequence_tokens - window) * window


def forward_flops_per_token(config: ModelConfig, sequence_tokens: int) -> FlopsPerToken:
    """Model FLOPs of the forward, vocabulary head included, in rows of `sequence_tokens`."""
    counted = parameters(config)
    layers_of_a_kind = config.num_layers // 2
    multiply_adds_per_pair = _PRODUCTS_PER_PAIR * config.num_heads * config.head_size

    def attention(window_tokens: int | None) -> float:
        pairs_per_token = attended_pairs(sequence_tokens, window_tokens) / sequence_tokens
        multiply_adds = layers_of_a_kind * multiply_adds_per_pair * pairs_per_token
        return FLOPS_PER_MULTIPLY_ADD * multiply_adds

    return FlopsPerToken(
        linear=FLOPS_PER_MULTIPLY_ADD * counted.linear,
        head=FLOPS_PER_MULTIPLY_ADD * counted.embedding,
        local_attention=attention(config.window_tokens),
        global_attention=attention(None),
    )


def training_flops_per_token(config: ModelConfig, sequence_tokens: int) -> float:
    """Model FLOPs of a training step per token: forward and backward, nothing recomputed."""
    return TRAINING_TO_FORWARD * forward_flops_per_token(config, sequence_tokens).total
