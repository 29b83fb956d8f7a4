"""Held-out quality: nats per token and bits per byte over every row of a store, in order."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma2 import checkpoint as gemma2_checkpoint
from schemas.base import Document
from schemas.errors import ConfigError, ManifestMismatchError
from schemas.model import ModelConfig
from schemas.runs import EvalConfig, MeshConfig
from student_train import mesh as meshes
from student_train.data import StoreSource, place, prefetch
from student_train.step import make_eval_step, make_head

# Tokens whose logits exist at once: evaluation has no gradients, so this only bounds memory.
EVAL_CHUNK_TOKENS = 1024


class Evaluation(Document):
    """What a model scores on held-out rows."""

    nats_per_token: float
    bits_per_byte: float | None
    """None if the byte lengths of the ids were not given."""
    tokens: int
    """Predicted tokens, those that follow another of their document."""
    text_bytes: int | None
    """UTF-8 bytes of the predicted tokens."""


class Evaluator:
    """Evaluates parameters of one model on one store; compiled once."""

    def __init__(
        self,
        store: str,
        model: ModelConfig,
        mesh: Mesh,
        *,
        batch_sequences: int,
        dtype: str,
        piece_bytes: np.ndarray | None = None,
    ):
        """`piece_bytes` int32 [V]: UTF-8 bytes that each id stands for, 0 for control ids."""
        self._source = StoreSource(store, None)
        self._mesh = mesh
        self._batch_sequences = batch_sequences
        vocab_size = self._source.tokens_manifest.tokenizer.vocab_size
        check_vocabulary(model, vocab_size, store)
        meshes.check_batch(mesh, batch_sequences)
        if piece_bytes is not None and len(piece_bytes) != vocab_size:
            raise ManifestMismatchError(
                f"Bits per byte need the tokenizer of the store, but {store} was made with "
                f"{vocab_size} pieces and the one given has {len(piece_bytes)}; give the "
                "tokenizer that made the store."
            )
        self._has_bytes = piece_bytes is not None
        self._bytes_of_ids = np.zeros(vocab_size, np.int32) if piece_bytes is None else piece_bytes
        head = make_head(model, vocab_size, None, EVAL_CHUNK_TOKENS)
        self._step = make_eval_step(model, dtype, head, mesh)

    def __call__(
        self, params: Any, on_rows: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Evaluate every row; `on_rows` is told (rows done, rows in all)."""
        total, size = self._source.tokens_manifest.num_sequences, self._batch_sequences
        steps = -(-total // size)
        where = meshes.rows_sharding(self._mesh)

        def read(step: int) -> Any:
            # The last batch is filled with its last row, which is then not counted.
            rows = np.minimum(np.arange(step * size, (step + 1) * size), total - 1)
            return place(rows, self._source.read, where)

        nats, tokens, text_bytes = 0.0, 0, 0
        for step, batch in prefetch(read, 0, steps):
            real = min(size, total - step * size)
            scores = jax.tree.map(np.asarray, self._step(params, self._bytes_of_ids, batch))
            nats += float(scores.nats[:real].sum(dtype=np.float64))
            tokens += int(scores.labels[:real].sum(dtype=np.int64))
            text_bytes += int(scores.label_bytes[:real].sum(dtype=np.int64))
            if on_rows is not None:
                on_rows(step * size + real, total)
        if tokens == 0:
            raise ConfigError("An evaluation store must hold a token that follows another.")
        return Evaluation(
            nats_per_token=nats / tokens,
            bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else None,
            tokens=tokens,
            text_bytes=text_bytes if self._has_bytes else None,
        )


def check_vocabulary(model: ModelConfig, vocab_size: int, store: str) -> None:
    """Raise ManifestMismatchError unless the model has a row for every id of the store."""
    if model.vocab_size < vocab_size:
        raise ManifestMismatchError(
            f"A model must have a row for every id of its store, but it has {model.vocab_size} and "
            f"the tokenizer of {store} has {vocab_size} ids; give a model of at least as many."
        )


def evaluate(
    config: EvalConfig,
    *,
    piece_bytes: np.ndarray | None = None,
    on_rows: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a Hugging Face folder on a store, on all devices that divide the batch."""
    model, params = gemma2_checkpoint.load(config.model, dtype=np.float32)
    count = max(n for n in range(1, jax.device_count() + 1) if config.batch_sequences % n == 0)
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:count])
    evaluator = Evaluator(
        config.store,
        model,
        mesh,
        batch_sequences=config.batch_sequences,
        dtype=config.dtype,
        piece_bytes=piece_bytes,
    )
    params = jax.device_put(params, meshes.state_shardings(params, mesh))
    return evaluator(params, on_rows)
