"""A student for the inspector: an exported model, asked about a row when its page is made.

Here and not in the inspector, as the store's rooms know no JAX.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma2 import checkpoint
from gemma2.model import Params, hidden_states, logits
from logit_store.entries import Entries
from logit_store.inspect.queries import Predictions, Row
from logit_store.inspect.web.stores import Student
from logit_store.reader import TokensReader
from schemas.model import ModelConfig
from student_train.evaluate import check_vocabulary

_TOP = 12
# Positions whose scores exist at once: 256 of a vocabulary of 256k are 256 MiB.
_TILE_TOKENS = 256


def load(folder: Path, store: str) -> Student:
    """A Hugging Face folder, as `retort train` and `retort export` write it.

    Raises CheckpointError for another model and ManifestMismatchError for too small a vocabulary.
    """
    config, params = checkpoint.load(folder)
    vocab_size = TokensReader(store).manifest.tokenizer.vocab_size
    check_vocabulary(config, vocab_size, store)
    name = folder.name if folder.name != "export" else f"{folder.parent.name}/{folder.name}"
    return Student(name, partial(predict, config, jax.device_put(params), vocab_size))


def predict(config: ModelConfig, params: Params, vocab_size: int, row: Row) -> Predictions:
    """What the student says of each position of a row, in float32.

    Entries are of its own most probable ids, of those that the row's targets have, and one for all
    others, so that the two can be compared id by id.
    """
    length = len(row.tokens)
    asked = _padded_ids(row.predictions, length)
    labels = np.roll(row.tokens, -1)
    hidden = _hidden(params, row.tokens[None], row.segment_ids[None], config=config)[0]
    parts = []
    for start in range(0, length, _TILE_TOKENS):
        some = slice(start, min(start + _TILE_TOKENS, length))
        tile = _tile(
            params, hidden[some], asked[some], labels[some], config=config, vocab_size=vocab_size
        )
        parts.append(jax.tree.map(np.asarray, tile))
    entropy, surprise, ids, weights = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Predictions(entropy, surprise, _entries(ids, weights, row, vocab_size), vocab_size)


def _padded_ids(predictions: Predictions | None, length: int) -> np.ndarray:
    """The ids of each position, int32 [L, M], filled with -1; M is a power of two."""
    if predictions is None:
        return np.full((length, 1), -1, np.int32)
    found = predictions.entries
    counts = np.diff(found.ends)
    width = 1 << max(int(counts.max(initial=1)) - 1, 0).bit_length()
    padded = np.full((length, width), -1, np.int32)
    position = np.repeat(np.arange(length), counts)
    padded[position, np.arange(len(position)) - found.ends[position]] = found.id
    return padded


@partial(jax.jit, static_argnames="config")
def _hidden(params: Params, tokens: Array, segment_ids: Array, *, config: ModelConfig) -> Array:
    return hidden_states(params, config, tokens, segment_ids, dtype=jnp.float32)


@partial(jax.jit, static_argnames=("config", "vocab_size"))
def _tile(
    params: Params,
    hidden: Array,
    asked: Array,
    labels: Array,
    *,
    config: ModelConfig,
    vocab_size: int,
) -> tuple[Array, Array, Array, Array]:
    """Of P positions entropy and surprise [P], ids int32 and probabilities [P, _TOP + M]."""
    scores = logits(params, config, hidden)
    is_id = jnp.arange(scores.shape[1]) < vocab_size
    logprobs = jax.nn.log_softmax(jnp.where(is_id[None], scores, -jnp.inf), axis=-1)
    probabilities = jnp.exp(logprobs)
    entropy = -jnp.sum(jnp.where(probabilities > 0, probabilities * logprobs, 0.0), axis=-1)
    surprise = -jnp.take_along_axis(logprobs, labels[:, None], axis=-1)[:, 0]
    top, top_ids = jax.lax.top_k(probabilities, min(_TOP, vocab_size))
    is_asked = (asked >= 0) & (asked < vocab_size)
    given = jnp.take_along_axis(probabilities, jnp.where(is_asked, asked, 0), axis=-1)
    ids = jnp.concatenate([top_ids, jnp.where(is_asked, asked, -1)], axis=1)
    return entropy, surprise, ids, jnp.concatenate([top, given], axis=1)


def _entries(ids: np.ndarray, weights: np.ndarray, row: Row, vocab_size: int) -> Entries:
    """Each id once, and the rest, at positions that have a next token; the heaviest first."""
    position = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    is_used = (ids >= 0) & row.predicted[:, None]
    keys = position[is_used].astype(np.int64) * (vocab_size + 1) + ids[is_used]
    keys, first = np.unique(keys, return_index=True)
    position, weight = keys // (vocab_size + 1), weights[is_used][first]
    rest = 1 - np.bincount(position, weight, len(ids))
    has_rest = np.flatnonzero(row.predicted & (rest > 1e-7))
    position = np.concatenate([position, has_rest])
    found = np.concatenate([keys % (vocab_size + 1), np.full(len(has_rest), vocab_size)])
    weight = np.concatenate([weight, rest[has_rest]])
    order = np.lexsort((found, -weight, position))
    ends = np.concatenate([[0], np.cumsum(np.bincount(position, minlength=len(ids)))])
    return Entries(ends, found[order].astype(np.int32), weight[order].astype(np.float32))
