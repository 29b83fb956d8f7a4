"""The teacher: a Gemma 2 checkpoint that turns packed rows into sampled targets on its device.

Hidden states are computed once for a batch of rows; logits exist for one block of tokens at a time.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma2 import checkpoint
from gemma2.model import Params, hidden_states, logits
from logit_store.layout import predicted_mask
from schemas.errors import ConfigError
from schemas.manifest import SamplerSpec, TeacherInfo
from schemas.model import ModelConfig
from teacher_dump.samplers import BlockTargets, sample_block


class RowTargets(NamedTuple):
    """Sampled targets of b rows of n blocks: BlockTargets with leading axes [b, n], and per token

    teacher_entropy and label_logprob float32 [b, L] in nats over the whole vocabulary, of the
    distribution that was sampled; 0 where the next token is not of the same document.
    """

    blocks: BlockTargets
    teacher_entropy: Array
    label_logprob: Array


class Teacher(Protocol):
    """What a dump needs of a teacher."""

    info: TeacherInfo

    def targets(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        rows: np.ndarray,
        spec: SamplerSpec,
        seed: int,
    ) -> RowTargets:
        """Targets of tokens and segment ids int32 [b, L] that are the store's rows int32 [b].

        A row's result depends on the row, the spec and the seed, never on its batch.
        """
        ...


class Gemma2Teacher:
    """A Gemma 2 checkpoint in Hugging Face's form, on this process's default device."""

    def __init__(self, folder: str | Path, dtype: str, vocab_size: int):
        """Load the weights in `dtype`; ids from `vocab_size` up are never given probability.

        Raises ConfigError if the checkpoint has fewer ids than the tokenizer.
        """
        config_sha256, weights_sha256 = checkpoint.fingerprint(folder)
        self._config, self._params = checkpoint.load(folder, dtype=jnp.dtype(dtype))
        if self._config.vocab_size < vocab_size:
            raise ConfigError(
                f"A teacher must know every id of the store's tokenizer, but {folder} has "
                f"{self._config.vocab_size} and the tokenizer {vocab_size}; give the teacher that "
                "belongs to the tokenizer."
            )
        self._dtype = jnp.dtype(dtype)
        self.info = TeacherInfo(
            name=Path(folder).resolve().name,
            config_sha256=config_sha256,
            weights_sha256=weights_sha256,
            vocab_size=vocab_size,
        )

    def targets(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        rows: np.ndarray,
        spec: SamplerSpec,
        seed: int,
    ) -> RowTargets:
        """As the protocol says; compiled once for each batch shape and spec."""
        return _targets(
            self._params,
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(segment_ids, jnp.int32),
            jnp.asarray(predicted_mask(np.asarray(segment_ids))),
            jnp.asarray(rows, jnp.int32),
            _seed_key(seed),
            config=self._config,
            dtype=self._dtype,
            spec=spec,
            vocab_size=self.info.vocab_size,
        )


def _seed_key(seed: int) -> Array:
    """A PRNG key of all bits of the seed; jax.random.key alone drops those above 32."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return jax.random.fold_in(jax.random.key(low), np.uint32(high))


@partial(jax.jit, static_argnames=("config", "dtype", "spec", "vocab_size"))
def _targets(
    params: Params,
    tokens: Array,
    segment_ids: Array,
    predicted: Array,
    rows: Array,
    key: Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    spec: SamplerSpec,
    vocab_size: int,
) -> RowTargets:
    batch, length = tokens.shape
    block = spec.block_tokens
    count = length // block
    hidden = hidden_states(params, config, tokens, segment_ids, dtype=dtype)
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    keys = jax.vmap(
        lambda row_key: jax.vmap(lambda i: jax.random.fold_in(row_key, i))(jnp.arange(count))
    )(row_keys)

    def one_block(item: tuple[Array, Array, Array, Array]) -> tuple[BlockTargets, Array, Array]:
        block_hidden, block_predicted, block_labels, block_key = item
        scores = logits(params, config, block_hidden) / spec.temperature
        is_real = jnp.arange(scores.shape[1]) < vocab_size
        log_probs = jax.nn.log_softmax(jnp.where(is_real[None, :], scores, -jnp.inf))
        probabilities = jnp.exp(log_probs)
        entropy = -jnp.sum(jnp.where(probabilities > 0.0, probabilities * log_probs, 0.0), axis=-1)
        label = jnp.take_along_axis(log_probs, block_labels[:, None], axis=-1)[:, 0]
        return (
            sample_block(spec, log_probs[:, :vocab_size], block_predicted, block_key),
            jnp.where(block_predicted, entropy, 0.0),
            jnp.where(block_predicted, label, 0.0),
        )

    blocks, entropy, label = jax.lax.map(
        one_block,
        (
            hidden.reshape(batch * count, block, -1),
            predicted.reshape(batch * count, block),
            labels.reshape(batch * count, block),
            keys.reshape(batch * count),
        ),
    )
    return RowTargets(
        jax.tree.map(lambda x: x.reshape(batch, count, *x.shape[1:]), blocks),
        entropy.reshape(batch, length),
        label.reshape(batch, length),
    )
