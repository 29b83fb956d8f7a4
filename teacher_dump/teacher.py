"""What a teacher is, and ours in JAX: a Gemma 2 that turns packed rows into sampled targets.

`teacher_dump.transformers_teacher` has the other. Hidden states are computed once for a batch of
rows; scores exist for one tile of positions at a time. The rows of the embedding lie in the store's
sampling order, so that what the sampler takes for neighbours are ids of similar meaning.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType

from gemma2 import checkpoint
from gemma2.attention import resolve
from gemma2.float8 import quantize_layers
from gemma2.model import Execution, Params, embedding, head_products, hidden_states
from gemma2.placement import ALONE, AXES, Placement, check_model
from logit_store.layout import predicted_mask
from schemas.errors import ConfigError
from schemas.manifest import SamplerName, SamplerSpec, TeacherInfo
from schemas.model import ModelConfig
from teacher_dump import samplers
from teacher_dump.compiled import step
from teacher_dump.samplers import CHUNK, Candidates, Draft, Scoring, Tile

_TILE_TOKENS = 1024


class RowCandidates(NamedTuple):
    """What the sampler proposes for b rows of L tokens, as NumPy arrays.

    position, id int32 [b, M], the position in the row and the vocabulary's id (V for the rest);
    points [b, M], 0 where there is nothing; teacher_entropy and label_logprob float32 [b, L] in
    nats over the whole vocabulary, of the distribution that was sampled; 0 where the next token is
    not of the same document.
    """

    position: np.ndarray
    id: np.ndarray
    points: np.ndarray
    teacher_entropy: np.ndarray
    label_logprob: np.ndarray


class Teacher(Protocol):
    """What a dump, its pilot and an audit need of a teacher, whatever computes it.

    Tokens and segment ids are int32 [b, L]; documents of a row do not see each other.
    """

    info: TeacherInfo

    def arrange(self, order: np.ndarray) -> None:
        """Cumulate ids in this order [V] from now on."""
        ...

    def begin(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        rows: np.ndarray,
        spec: SamplerSpec,
        seed: int,
    ) -> Callable[[], RowCandidates]:
        """Hand the device tokens and segment ids int32 [b, L] that are the store's rows int32 [b].

        What is returned waits for their candidates, in any thread. Meanwhile the device may be
        handed more rows, by one thread at a time; it may take them only when it is almost done. A
        row's randomness is of the row and the seed alone; last bits of sums may be of its batch.
        """
        ...

    def expected_entries(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        name: SamplerName,
        temperature: float,
        points: np.ndarray,
    ) -> np.ndarray:
        """float64 [P]: expected entries of all rows together for each of `points` int32 [P]."""
        ...

    def log_probabilities(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        position: np.ndarray,
        ids: np.ndarray,
        temperature: float,
    ) -> np.ndarray:
        """float32 [b, M] in nats, of ids int32 [b, M] < V after positions int32 [b, M]."""
        ...


class Gemma2Teacher:
    """A Gemma 2 checkpoint in Hugging Face's form, on one device of this process or on several.

    Several share the layers (tensor parallelism): each has its heads and its part of the MLP's
    width. Each has the whole embedding, and samples its own tiles, so that nothing of the
    vocabulary's size ever moves.
    """

    def __init__(
        self, info: TeacherInfo, config: ModelConfig, params: Params, placement: Placement = ALONE
    ):
        """Of parameters where the placement has them, in the dtype of the arithmetic.

        Ids from `info.vocab_size` up are never given probability.
        """
        self.info = info
        self._config = config
        self._dtype = embedding(params).dtype
        device = jax.local_devices()[0]
        kernel = resolve("auto", config, device, dtype=self._dtype, backward=False)
        self._execution = Execution(kernel, placement)
        self._params = _rows(params, _padded(np.arange(info.vocab_size)))
        # The rest, which a sampler may name, is the id behind the last.
        self._ids = np.arange(info.vocab_size + 1, dtype=np.int32)
        self._place = np.arange(info.vocab_size, dtype=np.int32)

    @classmethod
    def load(cls, folder: str | Path, dtype: str, vocab_size: int, devices: int = 1) -> Self:
        """The checkpoint in a folder, in `dtype`, shared by so many of this process's devices.

        float8 is of the layers' products alone; the rest is bfloat16 then.

        Raises ConfigError if the checkpoint has fewer ids than the tokenizer, or cannot be shared
        by so many devices.
        """
        config = checkpoint.load_config(folder)
        check_ids(folder, config.vocab_size, vocab_size)
        config_sha256, weights_sha256 = checkpoint.fingerprint(folder)
        placement = share(config, devices)
        held = "bfloat16" if dtype == "float8" else dtype
        config, params = checkpoint.load(folder, jnp.dtype(held), placement)
        if dtype == "float8":
            params["pairs"] = quantize_layers(params["pairs"])
        info = TeacherInfo(
            name=Path(folder).resolve().name,
            config_sha256=config_sha256,
            weights_sha256=weights_sha256,
            vocab_size=vocab_size,
        )
        return cls(info, config, params, placement)

    def arrange(self, order: np.ndarray) -> None:
        """Cumulate ids in this order [V] from now on."""
        if np.array_equal(order, self._ids[:-1]):
            return
        self._params = _rows(self._params, _padded(self._place[order]))
        self._ids = np.append(order, len(order)).astype(np.int32)
        self._place[order] = np.arange(len(order), dtype=np.int32)

    def begin(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        rows: np.ndarray,
        spec: SamplerSpec,
        seed: int,
    ) -> Callable[[], RowCandidates]:
        """As the protocol says; compiled once for each batch shape and spec."""
        found, entropy, label = candidates_step(
            self._params,
            *self._arrays(tokens, segment_ids),
            np.asarray(rows, np.int32),
            seed_key(seed),
            config=self._config,
            dtype=self._dtype,
            spec=spec,
            vocab_size=self.info.vocab_size,
            execution=self._execution,
        )
        # Those that the columns stand for now: another order may be asked for while this waits.
        ids = self._ids

        def wait() -> RowCandidates:
            position, column, points = (np.asarray(x) for x in found)
            return RowCandidates(
                position, ids[column], points, np.asarray(entropy), np.asarray(label)
            )

        return wait

    def expected_entries(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        name: SamplerName,
        temperature: float,
        points: np.ndarray,
    ) -> np.ndarray:
        """As the protocol says."""
        found = _expected_entries(
            self._params,
            *self._arrays(tokens, segment_ids),
            jnp.asarray(points, jnp.int32),
            config=self._config,
            dtype=self._dtype,
            name=name,
            temperature=temperature,
            vocab_size=self.info.vocab_size,
            execution=self._execution,
        )
        return np.asarray(found, np.float64).sum(axis=0)

    def log_probabilities(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        position: np.ndarray,
        ids: np.ndarray,
        temperature: float,
    ) -> np.ndarray:
        """As the protocol says."""
        found = _log_probabilities(
            self._params,
            *self._arrays(tokens, segment_ids),
            jnp.asarray(position, jnp.int32),
            jnp.asarray(self._place[ids]),
            config=self._config,
            dtype=self._dtype,
            temperature=temperature,
            vocab_size=self.info.vocab_size,
            execution=self._execution,
        )
        return np.asarray(found)

    def _arrays(self, tokens: np.ndarray, segment_ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tokens as rows of the reordered embedding, segment ids, and what is predicted."""
        segment_ids = np.asarray(segment_ids, np.int32)
        return self._place[tokens], segment_ids, predicted_mask(segment_ids)


def check_ids(folder: str | Path, ids: int, vocab_size: int) -> None:
    """Raise ConfigError if the teacher in a folder has fewer ids than the store's tokenizer."""
    if ids < vocab_size:
        raise ConfigError(
            f"A teacher must know every id of the store's tokenizer, but {folder} has {ids} and "
            f"the tokenizer {vocab_size}; give the teacher that belongs to the tokenizer."
        )


def share(config: ModelConfig, devices: int) -> Placement:
    """Where a teacher lies that so many of this process's devices share. Raises ConfigError."""
    if devices == 1:
        return ALONE
    if devices > jax.local_device_count():
        raise ConfigError(
            f"model_devices must be devices of the worker, but it is {devices} and the worker has "
            f"{jax.local_device_count()}; use fewer or other workers."
        )
    mesh = jax.make_mesh(
        (1, 1, devices),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=jax.local_devices()[:devices],
    )
    check_model(config, mesh)
    return Placement(mesh, is_table_whole=True)


def _padded(index: np.ndarray) -> np.ndarray:
    """Row numbers up to a multiple of CHUNK; what is added is masked, so any row will do."""
    return np.concatenate([index, np.zeros(-len(index) % CHUNK, index.dtype)])


def _rows(params: Params, index: np.ndarray) -> Params:
    """The parameters with these rows of the embedding."""
    return {**params, "embedding": embedding(params)[jnp.asarray(index, jnp.int32)]}


@cache
def seed_key(seed: int) -> Array:
    """A PRNG key of all bits of the seed; jax.random.key alone drops those above 32.

    Kept, since what makes it would wait on a device that has a batch in hand.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return jax.random.fold_in(jax.random.key(low), np.uint32(high))


def tile_tokens(length: int) -> int:
    """Positions of a tile: as many as divide a row, up to a bound on the memory of their scores."""
    return max(size for size in range(1, _TILE_TOKENS + 1) if length % size == 0)


def tile_keys(key: Array, rows: Array, count: int) -> Array:
    """Keys [b, count] of the tiles of rows int32 [b]."""
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.vmap(
        lambda row_key: jax.vmap(lambda i: jax.random.fold_in(row_key, i))(jnp.arange(count))
    )(row_keys)


def label_log_probability(tile: Tile, labels: Array) -> Array:
    """float32 [B] of labels int32 [B], columns of the tile's; 0 if not predicted."""
    label = tile.log_probabilities(jnp.arange(len(labels)), labels)
    return jnp.where(tile.predicted, jnp.minimum(label, 0.0), 0.0)


def score_tile(
    params: Params,
    config: ModelConfig,
    hidden: Array,
    predicted: Array,
    temperature: float,
    vocab_size: int,
) -> tuple[Tile, Array]:
    """A tile of hidden states [B, D] and its entropies [B]."""
    scoring = Scoring(vocab_size, temperature, config.final_cap)
    return samplers.make_tile(head_products(params, hidden), predicted, scoring)


@step("config", "dtype", "spec", "vocab_size", "execution")
def candidates_step(
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
    execution: Execution,
) -> tuple[Candidates, Array, Array]:
    """The teacher's step: of packed rows, as `sample_rows` says."""
    hidden = hidden_states(params, config, tokens, segment_ids, dtype=dtype, execution=execution)
    placement = execution.placement
    return sample_rows(
        params, config, hidden, tokens, predicted, rows, key, spec, vocab_size, placement
    )


def sample_rows(
    params: Params,
    config: ModelConfig,
    hidden: Array,
    tokens: Array,
    predicted: Array,
    rows: Array,
    key: Array,
    spec: SamplerSpec,
    vocab_size: int,
    placement: Placement = ALONE,
) -> tuple[Candidates, Array, Array]:
    """Candidates [b, M] with columns for ids; entropies and label log-probabilities [b, L].

    Of final hidden states [b, L, D]; of `params` only the embedding is used, whose rows `tokens`
    [b, L] name. predicted bool [b, L]; rows int32 [b], from which with `key` all randomness is.
    """
    batch, length = tokens.shape
    size = tile_tokens(length)
    count = length // size
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    keys = tile_keys(key, rows, count)

    def one_tile(table: Array, item: tuple[Array, ...]) -> tuple[Draft, Array, Array]:
        tile_hidden, tile_predicted, tile_labels, tile_key = item
        tile, entropy = score_tile(
            {"embedding": table}, config, tile_hidden, tile_predicted, spec.temperature, vocab_size
        )
        label = label_log_probability(tile, tile_labels)
        return samplers.propose(spec, vocab_size, tile, table, tile_key), entropy, label

    def all_tiles(table: Array, items: tuple[Array, ...]) -> tuple[Candidates, Array, Array]:
        drafts, entropy, label = jax.lax.map(partial(one_tile, table), items)
        # Of all tiles at once: a loop over pairs of ids is short work for each.
        return samplers.settle(drafts), entropy, label

    tiles = batch * count
    found, entropy, label = placement.spread(
        all_tiles,
        embedding(params).astype(hidden.dtype),
        (
            hidden.reshape(tiles, size, -1),
            predicted.reshape(tiles, size),
            labels.reshape(tiles, size),
            keys.reshape(tiles),
        ),
    )
    firsts = jnp.tile(jnp.arange(count, dtype=jnp.int32) * size, batch)
    found = found._replace(position=found.position + firsts[:, None])
    return (
        jax.tree.map(lambda x: x.reshape(batch, -1), found),
        entropy.reshape(batch, length),
        label.reshape(batch, length),
    )


@step("config", "dtype", "name", "temperature", "vocab_size", "execution")
def _expected_entries(
    params: Params,
    tokens: Array,
    segment_ids: Array,
    predicted: Array,
    points: Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    name: SamplerName,
    temperature: float,
    vocab_size: int,
    execution: Execution,
) -> Array:
    """float32 [tiles, P]."""
    length = tokens.shape[1]
    size = tile_tokens(length)
    hidden = hidden_states(params, config, tokens, segment_ids, dtype=dtype, execution=execution)
    placement = execution.placement

    def one_tile(given: tuple[Array, Array], item: tuple[Array, Array]) -> Array:
        table, numbers = given
        tile, _ = score_tile({"embedding": table}, config, *item, temperature, vocab_size)
        return samplers.expected_entries(name, tile, numbers)

    return placement.spread(
        lambda given, items: jax.lax.map(partial(one_tile, given), items),
        (embedding(params), points),
        (hidden.reshape(-1, size, hidden.shape[-1]), predicted.reshape(-1, size)),
    )


@step("config", "dtype", "temperature", "vocab_size", "execution")
def _log_probabilities(
    params: Params,
    tokens: Array,
    segment_ids: Array,
    predicted: Array,
    position: Array,
    column: Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    temperature: float,
    vocab_size: int,
    execution: Execution,
) -> Array:
    """float32 [b, M] of columns [b, M] of the scores."""
    batch, length = tokens.shape
    size = tile_tokens(length)
    count = length // size
    hidden = hidden_states(params, config, tokens, segment_ids, dtype=dtype, execution=execution)

    def one_tile(given: tuple[Array, Array, Array], item: tuple[Array, ...]) -> Array:
        table, position, column = given
        states, predicted, row, first = item
        tile, _ = score_tile(
            {"embedding": table}, config, states, predicted, temperature, vocab_size
        )
        at = position[row] - first
        is_mine = (at >= 0) & (at < size)
        at = jnp.clip(at, 0, size - 1)
        return jnp.where(is_mine, tile.log_probabilities(at, column[row]), 0.0)

    tiles = jnp.arange(batch * count, dtype=jnp.int32)
    found = execution.placement.spread(
        lambda given, items: jax.lax.map(partial(one_tile, given), items),
        (embedding(params).astype(hidden.dtype), position, column),
        (
            hidden.reshape(-1, size, hidden.shape[-1]),
            predicted.reshape(-1, size),
            tiles // count,
            tiles % count * size,
        ),
    )
    return jnp.sum(found.reshape(batch, count, -1), axis=1)
