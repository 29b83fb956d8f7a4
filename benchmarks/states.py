"""The small teacher as the other benchmarks use it, and stores of its targets.

`benchmarks.small_teacher` leaves final hidden states of held-out tokens and the embedding table;
their product is a teacher whose exact distributions, over a full-size vocabulary, can be had on any
machine, and which writes stores through the package's own samplers, codec and writer.
"""

import json
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from logit_store import codec, layout, storage, writer
from logit_store.ledger import Ledger
from schemas.manifest import (
    Corpus,
    SamplerSpec,
    TargetsManifest,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    identity,
)
from schemas.model import ModelConfig
from teacher_dump import teacher as teachers
from teacher_dump.targets import begin_rows
from teacher_dump.teacher import Teacher
from teacher_dump.vocabulary import similarity_order

ROW_TOKENS = 8192


class States:
    """Hidden states float32 [N, L, D], table float32 [V, D], tokens and segment ids [N, L]."""

    def __init__(self, folder: Path, rows: int | None = None):
        def load(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy")

        self.table = load("table") * load("table_scale")[:, None]
        hidden = load("hidden") * load("hidden_scale")[:, None]
        self.hidden = hidden.reshape(-1, ROW_TOKENS, hidden.shape[-1])[:rows]
        self.tokens = load("tokens").reshape(-1, ROW_TOKENS)[:rows]
        # Rows of the teacher are shorter than those of the store: segments are counted on.
        pieces = load("segment_ids").astype(np.int64)
        per_row = ROW_TOKENS // pieces.shape[1]
        last = pieces.max(axis=1).reshape(-1, per_row)
        before = np.cumsum(last, axis=1) - last
        segments = pieces.reshape(-1, per_row, pieces.shape[1]) + before[:, :, None]
        self.segment_ids = segments.reshape(-1, ROW_TOKENS)[:rows].astype(np.uint16)
        if (load("segment_ids") == 0).any():
            raise ValueError("held-out rows must be full; ask small_teacher for fewer tokens")
        self.counts = load("counts").astype(np.int64)
        self.final_cap = json.loads((folder / "about.json").read_text())["final_cap"]

    @cached_property
    def similar(self) -> np.ndarray:
        """Ids in the order of similarity of their embeddings."""
        return similarity_order(self.table)

    @property
    def predicted(self) -> np.ndarray:
        return layout.predicted_mask(self.segment_ids)

    def tokens_manifest(self, shard_sequences: int) -> TokensManifest:
        return TokensManifest(
            tokenizer=TokenizerInfo(
                sha256="0" * 64, vocab_size=len(self.table), bos_id=2, eos_id=1, pad_id=0
            ),
            num_sequences=len(self.tokens),
            sequence_tokens=ROW_TOKENS,
            shard_sequences=shard_sequences,
            corpus=Corpus(sources=(), splits=()).summary(),
            software={},
        )


class StatesTeacher:
    """The Teacher protocol over `States`: rows are looked up, nothing is run but the head."""

    def __init__(self, states: States, order: np.ndarray | None = None):
        vocab_size = len(states.table)
        self._states = states
        self._order = np.arange(vocab_size) if order is None else order
        self._ids = np.append(self._order, vocab_size).astype(np.int32)
        self._place = np.empty(vocab_size, np.int32)
        self._place[self._order] = np.arange(vocab_size, dtype=np.int32)
        pad = -vocab_size % teachers.CHUNK
        table = np.pad(states.table[self._order], ((0, pad), (0, 0)))
        self.params = {"embedding": jnp.asarray(table)}
        self.config = ModelConfig(
            vocab_size=vocab_size,
            d_model=states.table.shape[1],
            num_layers=2,
            mlp_width=1,
            num_heads=1,
            num_kv_heads=1,
            head_size=2,
            query_scalar=1,
            final_cap=states.final_cap,
        )
        self.info = TeacherInfo(
            name="small", config_sha256="0" * 64, weights_sha256="0" * 64, vocab_size=vocab_size
        )

    def candidates(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        rows: np.ndarray,
        spec: SamplerSpec,
        seed: int,
    ) -> teachers.RowCandidates:
        sample = partial(teachers.sample_rows, spec=spec, vocab_size=self.info.vocab_size)
        run = jax.jit(partial(sample, self.params, self.config))
        found, entropy, label = run(
            jnp.asarray(self._states.hidden[rows]),
            jnp.asarray(self._place[tokens]),
            jnp.asarray(layout.predicted_mask(segment_ids)),
            jnp.asarray(rows, jnp.int32),
            jax.random.key(seed),
        )
        position, column, points = (np.asarray(x) for x in found)
        return teachers.RowCandidates(
            position, self._ids[column], points, np.asarray(entropy), np.asarray(label)
        )


def write_store(
    url: str,
    states: States,
    specs: dict[str, SamplerSpec],
    seed: int = 0,
    shard_sequences: int = 4,
    teacher: Teacher | None = None,
) -> None:
    """A store of the states' tokens with a set of targets for each of `specs`, by name.

    Their teacher is the states', or the one given.
    """
    tokens = states.tokens_manifest(shard_sequences)
    writer.create_tokens(url, tokens, Corpus(sources=(), splits=()))
    token_writer = writer.TokensWriter(url)
    ledger = Ledger(url, None, tokens)
    for shard in ledger.pending():
        rows = slice(shard.first_row, shard.stop_row)
        token_writer.write(shard, states.tokens[rows], states.segment_ids[rows])
    ledger.compact()
    for name, spec in specs.items():
        systematic = spec.name == "systematic"
        order = states.similar if systematic else np.arange(len(states.table), dtype=np.uint32)
        tables = writer.Tables(codec.make_vocabulary(states.counts, spec.slots_per_token), order)
        by = teacher or StatesTeacher(states, order)
        manifest = TargetsManifest(
            tokens_fingerprint=identity(tokens),
            num_sequences=tokens.num_sequences,
            sequence_tokens=tokens.sequence_tokens,
            shard_sequences=tokens.shard_sequences,
            teacher=by.info,
            sampler=spec,
            vocabulary=tables.info(),
            seed=seed,
            dtype="float32",
            batch_sequences=1,
            software={},
        )
        writer.create_targets(url, name, manifest, tables)
        target_writer = writer.TargetsWriter(url, name)
        ledger = Ledger(url, name, manifest)
        for shard in ledger.pending():
            rows = np.arange(shard.first_row, shard.stop_row)
            found = begin_rows(
                by,
                tables.vocabulary,
                states.tokens[rows],
                states.segment_ids[rows],
                rows,
                spec=spec,
                seed=seed,
                batch_sequences=1,
            )()
            target_writer.write(shard, states.tokens[rows], states.segment_ids[rows], found)
        ledger.compact()
        storage.sweep_locks(url)
