"""A teacher that transformers computes: any causal language model in a local folder.

PyTorch runs the model's own body and, for a tile of positions at a time, its own head, whatever
that does to the scores. A tile's scores go to the sampler in JAX as they lie in memory, so that the
same randomness draws the same points as of a teacher in JAX.

Needs the extra `[torch]`. Nothing is downloaded, no code of a model's folder is run, and weights
are read from safetensors alone.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from logit_store.layout import predicted_mask
from schemas.errors import CheckpointError, ConfigError, MissingDependencyError
from schemas.manifest import SamplerName, SamplerSpec, TeacherInfo
from teacher_dump import samplers
from teacher_dump.compiled import step
from teacher_dump.samplers import CHUNK, Draft, Scoring, Tile
from teacher_dump.teacher import (
    RowCandidates,
    check_ids,
    label_log_probability,
    seed_key,
    tile_keys,
    tile_tokens,
)

try:
    import torch
    import transformers
except ImportError as error:
    raise MissingDependencyError(
        "The transformers backend needs PyTorch and transformers, which are not installed; pip "
        "install 'retort[torch]'."
    ) from error

# Rows of the head that are float32 at once, where the device cannot add up in float32 by itself.
_HEAD_ROWS = 16_384
# Of what documents would do to each other, so much of a difference is taken for rounding.
_MOST_MIXING = 0.2


class TransformersTeacher:
    """A model of transformers on this process's GPU, or on its CPU if there is none."""

    def __init__(self, info: TeacherInfo, model: Any):
        """Of a model in evaluation mode, which is taken apart. Raises CheckpointError."""
        self.info = info
        self._device = next(model.parameters()).device
        self._table = model.get_output_embeddings().weight.detach()
        self._body, self._model = _take_apart(model), model
        self._takes_places = "position_ids" in inspect.signature(self._body.forward).parameters
        self._is_packing = self._takes_places and self._keeps_documents_apart()
        self.arrange(np.arange(info.vocab_size))

    @classmethod
    def load(cls, info: TeacherInfo, folder: str | Path, dtype: str, devices: int = 1) -> Self:
        """The model in a folder, in `dtype`.

        Raises CheckpointError if transformers cannot read it so, and ConfigError for more devices
        than one or fewer ids than the tokenizer has.
        """
        if devices != 1:
            raise ConfigError(
                f"The transformers backend runs on one device, but model_devices is {devices}; "
                "leave it out, or use the jax backend, which Gemma 2 has."
            )
        # JAX would take most of the GPU for itself, which here holds the model beside it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        transformers.utils.logging.disable_progress_bar()
        with _explained(folder):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        head = model.get_output_embeddings()
        # A folder's config need not say how many.
        check_ids(folder, 0 if head is None else head.weight.shape[0], info.vocab_size)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(info, model.to(device).eval().requires_grad_(False))

    @property
    def is_packing(self) -> bool:
        """Whether rows go through the model whole; else each of their documents alone."""
        return self._is_packing

    def arrange(self, order: np.ndarray) -> None:
        """As the protocol says."""
        # Up to a multiple of CHUNK; what is added is masked, so any column will do.
        padded = np.concatenate([order, np.zeros(-len(order) % CHUNK, order.dtype)])
        self._columns = jnp.asarray(padded, jnp.int32)
        self._sampled = _sampled_rows(_to_jax(self._table), self._columns)
        self._ids = np.append(order, len(order)).astype(np.int32)
        self._place = np.argsort(order).astype(np.int32)

    def begin(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        rows: np.ndarray,
        spec: SamplerSpec,
        seed: int,
    ) -> Callable[[], RowCandidates]:
        """As the protocol says; the sampler is compiled once for each tile shape and spec."""
        batch, length = tokens.shape
        size = tile_tokens(length)
        count = length // size
        keys = tile_keys(seed_key(seed), jnp.asarray(rows, jnp.int32), count).reshape(-1)
        labels = np.pad(self._place[tokens][:, 1:], ((0, 0), (0, 1))).reshape(-1, size)
        predicted = predicted_mask(np.asarray(segment_ids)).reshape(-1, size)
        found = [
            _sample(
                scores,
                self._columns,
                jnp.asarray(predicted[tile]),
                jnp.asarray(labels[tile]),
                self._sampled,
                keys[tile],
                spec=spec,
                vocab_size=self.info.vocab_size,
            )
            for tile, scores in enumerate(self._tiles(tokens, segment_ids))
        ]
        settled, entropy, label = _settle(found)
        ids = self._ids

        def wait() -> RowCandidates:
            firsts = np.tile(np.arange(count) * size, batch)[:, None]
            return RowCandidates(
                (np.asarray(settled.position) + firsts).reshape(batch, -1).astype(np.int32),
                ids[np.asarray(settled.id)].reshape(batch, -1),
                np.asarray(settled.points).reshape(batch, -1),
                np.asarray(entropy).reshape(batch, length),
                np.asarray(label).reshape(batch, length),
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
        size = tile_tokens(tokens.shape[1])
        predicted = predicted_mask(np.asarray(segment_ids)).reshape(-1, size)
        found = [
            _expected_entries(
                scores,
                self._columns,
                jnp.asarray(predicted[tile]),
                jnp.asarray(points, jnp.int32),
                name=name,
                temperature=temperature,
                vocab_size=self.info.vocab_size,
            )
            for tile, scores in enumerate(self._tiles(tokens, segment_ids))
        ]
        return np.sum([np.asarray(x, np.float64) for x in found], axis=0)

    def log_probabilities(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        position: np.ndarray,
        ids: np.ndarray,
        temperature: float,
    ) -> np.ndarray:
        """As the protocol says."""
        size = tile_tokens(tokens.shape[1])
        count = tokens.shape[1] // size
        found = np.zeros(position.shape, np.float32)
        for tile, scores in enumerate(self._tiles(tokens, segment_ids)):
            row, first = tile // count, tile % count * size
            mine = np.flatnonzero((position[row] >= first) & (position[row] < first + size))
            values = _look_up(
                scores,
                self._columns,
                # Of one length for all tiles, so that one program is compiled.
                jnp.asarray(np.clip(position[row] - first, 0, size - 1), jnp.int32),
                jnp.asarray(self._place[ids[row]]),
                temperature=temperature,
                vocab_size=self.info.vocab_size,
            )
            found[row, mine] = np.asarray(values)[mine]
        return found

    def _tiles(self, tokens: np.ndarray, segment_ids: np.ndarray) -> Iterator[Array]:
        """Scores float32 [size, V] of each tile of each row, made when they are asked for."""
        size = tile_tokens(tokens.shape[1])
        hidden = self._hidden(np.asarray(tokens), np.asarray(segment_ids))
        for part in hidden.reshape(-1, size, hidden.shape[-1]):
            yield _to_jax(self._scores(part))

    @torch.no_grad()
    def _scores(self, hidden: Any) -> Any:
        """float32 [n, V] of final hidden states [n, D], by the model's own head."""
        self._model.states = hidden[None]
        # Its body is a stand-in that answers with these states, whatever the ids.
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self._device)
        return self._model(input_ids=ids).logits[0].float()

    @torch.no_grad()
    def _hidden(self, tokens: np.ndarray, segment_ids: np.ndarray) -> Any:
        """Final hidden states [b, L, D]."""
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self._device)
        if self._is_packing:
            # transformers takes a position that does not follow the one before for a new document.
            places = torch.as_tensor(_places(segment_ids), device=self._device)
            return self._run(input_ids=ids, position_ids=places)
        hidden = None
        for row, start, stop in _documents(segment_ids):
            states = self._run(input_ids=ids[row : row + 1, start:stop])[0]
            if hidden is None:
                hidden = states.new_zeros(*tokens.shape, states.shape[-1])
            hidden[row, start:stop] = states
        if hidden is None:
            states = self._run(input_ids=ids[:1, :1])
            hidden = states.new_zeros(*tokens.shape, states.shape[-1])
        return hidden

    def _run(self, **inputs: Any) -> Any:
        """The body's final hidden states."""
        if "use_cache" in inspect.signature(self._body.forward).parameters:
            inputs["use_cache"] = False
        return self._body(**inputs)[0]

    @torch.no_grad()
    def _keeps_documents_apart(self) -> bool:
        """Whether positions that start again are enough for this model, by trying it.

        Two documents behind each other are compared with the second alone: in one row with
        positions that start again, and as one document, which shows what mixing would do.
        """
        ids = torch.arange(3, 3 + 24, device=self._device) % self.info.vocab_size
        first, second = ids[:11], ids[11:]
        places = torch.as_tensor(_places(np.repeat([[1, 2]], [11, 13], axis=1)))
        alone = self._run(input_ids=second[None])[0]
        mixed = self._run(input_ids=ids[None])[0, len(first) :]
        packed = self._run(input_ids=ids[None], position_ids=places.to(self._device))
        effect = (mixed - alone).float().norm()
        return bool((packed[0, len(first) :] - alone).float().norm() <= _MOST_MIXING * effect)


class _Body(torch.nn.Module):
    """Stands in for a model's body and answers with given hidden states."""

    def __init__(self, owner: Any):
        super().__init__()
        # Not an attribute, or the two would be each other's children.
        self._owner = [owner]

    def forward(self, *_: Any, **__: Any) -> "_States":
        return _States(self._owner[0].states)


class _States:
    """A body's answer: final hidden states, and None for all else that a head may pass on."""

    def __init__(self, states: Any):
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _Head(torch.nn.Module):
    """A linear head whose sums stay in float32, as the caps and softmax after them want."""

    def __init__(self, linear: Any):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden: Any) -> Any:
        rows = hidden.reshape(-1, hidden.shape[-1])
        weight = self.weight
        if weight.dtype == torch.float32:
            scores = rows @ weight.T
        elif rows.is_cuda:
            scores = torch.mm(rows, weight.T, out_dtype=torch.float32)
        else:
            parts = [rows.float() @ part.float().T for part in weight.split(_HEAD_ROWS)]
            scores = torch.cat(parts, dim=-1)
        if self.bias is not None:
            scores = scores + self.bias.float()
        return scores.reshape(*hidden.shape[:-1], -1)


@torch.no_grad()
def _take_apart(model: Any) -> Any:
    """A model's body, for which the model gets a stand-in. Raises CheckpointError."""
    prefix = model.base_model_prefix
    body = getattr(model, prefix, None)
    if body is not None and body is not model:
        ids = torch.arange(3, 11, device=next(model.parameters()).device)[None]
        head = model.get_output_embeddings()
        whole = model(input_ids=ids).logits.float()
        model.states = body(input_ids=ids)[0]
        setattr(model, prefix, _Body(model))
        parted = model(input_ids=ids).logits.float()
        if torch.allclose(parted, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max())):
            for name, child in list(model.named_children()):
                if child is head and type(head) is torch.nn.Linear:
                    setattr(model, name, _Head(head))
            return body
    raise CheckpointError(
        "A teacher must be a body and a head that turns its final states into scores, but "
        f"{type(model).__name__} is not; use another model."
    )


def head_names(folder: str | Path) -> list[str]:
    """Names that the matrix of the head may have among a folder's tensors, likeliest first."""
    with _explained(folder), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names: dict[int, list[str]] = {id(p): [] for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    head = model.get_output_embeddings()
    found = [] if head is None else list(names[id(head.weight)])
    if getattr(config, "tie_word_embeddings", False):
        found += names[id(model.get_input_embeddings().weight)]
    found = list(dict.fromkeys(found))
    prefix = f"{model.base_model_prefix}."
    # Some checkpoints were saved of the body alone.
    return found + [name.removeprefix(prefix) for name in found if name.startswith(prefix)]


class _explained:
    """Turns what transformers says of a folder that it cannot read into a CheckpointError."""

    def __init__(self, folder: str | Path):
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError | KeyError | RuntimeError):
            said = " ".join(str(error).split())[:200]
            raise CheckpointError(
                "A teacher must be a causal model that transformers reads from safetensors, but "
                f"{self._folder} is not ({said}); check the folder."
            ) from error


def _places(segment_ids: np.ndarray) -> np.ndarray:
    """int64 [b, L]: each position's place in its document; padding is a document too."""
    index = np.arange(segment_ids.shape[1])
    starts = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def _documents(segment_ids: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Row, first position and end of each document, padding left out."""
    for row, segments in enumerate(segment_ids):
        edges = np.flatnonzero(np.diff(segments, prepend=-1, append=-1))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if segments[start] != 0:
                yield row, start, stop


def _to_jax(x: Any) -> Array:
    """A tensor as JAX's array, without a copy where JAX has its device."""
    platforms = {device.platform for device in jax.local_devices()}
    if x.is_cuda and not platforms & {"gpu", "cuda"}:
        x = x.cpu()
    return jnp.from_dlpack(x.contiguous())


@step()
def _sampled_rows(table: Array, columns: Array) -> Array:
    return table[columns]


def _tile(
    scores: Array, columns: Array, predicted: Array, temperature: float, vocab_size: int
) -> tuple[Tile, Array]:
    """A tile and its entropies, by `columns` of the model's scores [B, V]."""
    return samplers.make_tile(scores[:, columns], predicted, Scoring(vocab_size, temperature))


@step("spec", "vocab_size")
def _sample(
    scores: Array,
    columns: Array,
    predicted: Array,
    labels: Array,
    table: Array,
    key: Array,
    *,
    spec: SamplerSpec,
    vocab_size: int,
) -> tuple[Draft, Array, Array]:
    """What `propose` drafts of a tile, its entropies and its labels' log-probabilities."""
    tile, entropy = _tile(scores, columns, predicted, spec.temperature, vocab_size)
    draft = samplers.propose(spec, vocab_size, tile, table, key)
    return draft, entropy, label_log_probability(tile, labels)


@step()
def _settle(found: list[tuple[Draft, Array, Array]]) -> tuple[samplers.Candidates, Array, Array]:
    """Of all tiles together, arrays [tiles, ...]."""
    drafts, entropy, label = jax.tree.map(lambda *x: jnp.stack(x), *found)
    return samplers.settle(drafts), entropy, label


@step("name", "temperature", "vocab_size")
def _expected_entries(
    scores: Array,
    columns: Array,
    predicted: Array,
    points: Array,
    *,
    name: SamplerName,
    temperature: float,
    vocab_size: int,
) -> Array:
    tile, _ = _tile(scores, columns, predicted, temperature, vocab_size)
    return samplers.expected_entries(name, tile, points)


@step("temperature", "vocab_size")
def _look_up(
    scores: Array,
    columns: Array,
    position: Array,
    column: Array,
    *,
    temperature: float,
    vocab_size: int,
) -> Array:
    """float32 [M], log-probabilities of columns [M] at positions [M] of a tile."""
    predicted = jnp.ones(len(scores), bool)
    tile, _ = _tile(scores, columns, predicted, temperature, vocab_size)
    return tile.log_probabilities(position, column)
