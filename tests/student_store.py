"""A small store with the exact targets of a Markov chain, for the trainer's tests."""

import json
from pathlib import Path

import numpy as np

from logit_store import codec, writer
from logit_store.codec import RowEntries
from logit_store.layout import predicted_mask
from logit_store.ledger import Ledger
from logit_store.rows import TargetRows
from schemas.manifest import (
    Corpus,
    SamplerSpec,
    TargetsManifest,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    identity,
)
from schemas.runs import OptimizerConfig, RateSchedule, TrainConfig
from student_train.batch import Batch

MODEL = {
    "vocab_size": 64,
    "d_model": 32,
    "num_layers": 2,
    "mlp_width": 64,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_size": 16,
    "query_scalar": 16,
    "window_tokens": 8,
}
VOCAB = 61
SUCCESSORS = 4
BLOCK = 8
ENTRIES = 5
POINTS = 10_000
CORPUS = Corpus(sources=(), splits=())


def chain(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(successors int [V, 4] ascending, probabilities [V, 4]); no token follows itself.

    Probabilities are whole points, so that what is stored is exact.
    """
    random = np.random.default_rng(seed)
    successors = np.stack(
        [
            np.sort(random.choice(np.delete(np.arange(VOCAB), token), SUCCESSORS, replace=False))
            for token in range(VOCAB)
        ]
    )
    points = np.maximum(np.floor(random.dirichlet(np.ones(SUCCESSORS), VOCAB) * POINTS), 1)
    points[np.arange(VOCAB), points.argmax(axis=1)] += POINTS - points.sum(axis=1)
    return successors, points / POINTS


def make_rows(rows: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 and segment ids uint16 [R, L]: two documents a row, then padding in some."""
    random = np.random.default_rng(seed)
    successors, probabilities = chain()
    tokens = np.zeros((rows, length), np.int32)
    segments = np.zeros((rows, length), np.uint16)
    for row in range(rows):
        cut, end = random.integers(3, length - 3), length - (row % 3)
        for number, (start, stop) in enumerate([(0, cut), (cut, end)], 1):
            token = random.integers(VOCAB)
            for position in range(start, stop):
                tokens[row, position] = token
                token = random.choice(successors[token], p=probabilities[token])
            segments[row, start:stop] = number
    return tokens, segments


def tables() -> writer.Tables:
    """Every id alike, and cumulated as numbered."""
    counts = np.ones(VOCAB, np.int64)
    return writer.Tables(codec.make_vocabulary(counts, ENTRIES), np.arange(VOCAB, dtype=np.uint32))


def make_targets(tokens: np.ndarray, segments: np.ndarray, roll: int = 0) -> TargetRows:
    """Exact targets of the chain; `roll` stores those of position t - roll at position t."""
    successors, probabilities = chain()
    rows, length = tokens.shape
    mask = predicted_mask(segments)
    source = np.roll(tokens, roll, axis=1)
    vocabulary = tables().vocabulary
    encoded = []
    for row in range(rows):
        at = np.flatnonzero(mask[row])
        chosen = source[row, at]
        points = np.round(probabilities[chosen] * POINTS).astype(np.int64)
        entries = RowEntries(
            at.repeat(SUCCESSORS), successors[chosen].reshape(-1), points.reshape(-1)
        )
        encoded.append(codec.encode_row(vocabulary, entries, length, length * ENTRIES, POINTS))
    log_probability = np.log(probabilities)
    entropy = -(probabilities * log_probability).sum(axis=1)
    hit = successors[tokens] == np.roll(tokens, -1, axis=1)[..., None]
    label = np.where(hit, log_probability[tokens], 0).sum(axis=2)
    nats = np.stack([np.where(mask, entropy[tokens], 0), np.where(mask, -label, 0)], axis=1)
    return TargetRows(
        **{name: np.stack([row[name] for row in encoded]) for name in encoded[0]},
        block_points=np.full((rows, length // BLOCK), POINTS, np.uint16),
        teacher_nats=codec.encode_nats(nats, np.full(nats.shape, 0.5)),
    )


def make_store(
    url: Path,
    *,
    rows: int = 20,
    length: int = 32,
    seed: int = 1,
    roll: int = 0,
    targets: bool = True,
    shard_sequences: int = 8,
) -> Path:
    """A complete store at `url`, with targets `default` unless told otherwise."""
    manifest = TokensManifest(
        tokenizer=TokenizerInfo(sha256="0" * 64, vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0),
        num_sequences=rows,
        sequence_tokens=length,
        shard_sequences=shard_sequences,
        corpus=CORPUS.summary(),
        software={"seed": str(seed)},
    )
    # Sources are empty here, so the tokenizer's digest stands for the content.
    info = manifest.tokenizer.model_copy(update={"sha256": f"{seed:064d}"})
    manifest = manifest.model_copy(update={"tokenizer": info})
    writer.create_tokens(str(url), manifest, CORPUS)
    tokens, segments = make_rows(rows, length, seed)
    tokens_writer = writer.TokensWriter(str(url))
    for spec in writer.plan_shards(manifest):
        part = slice(spec.first_row, spec.stop_row)
        tokens_writer.write(spec, tokens[part], segments[part])
    Ledger(str(url), None, manifest).compact()
    if targets:
        add_targets(url, "default", tokens, segments, roll)
    return url


def add_targets(
    url: Path, name: str, tokens: np.ndarray, segments: np.ndarray, roll: int = 0, shards: int = 99
) -> None:
    """Targets of the first `shards` shards."""
    tokens_manifest = writer.TokensWriter(str(url)).manifest
    manifest = TargetsManifest(
        tokens_fingerprint=identity(tokens_manifest),
        num_sequences=tokens_manifest.num_sequences,
        sequence_tokens=tokens_manifest.sequence_tokens,
        shard_sequences=tokens_manifest.shard_sequences,
        teacher=TeacherInfo(
            name="chain", config_sha256="1" * 64, weights_sha256="2" * 64, vocab_size=VOCAB
        ),
        sampler=SamplerSpec(
            name="systematic", points=POINTS, slots_per_token=ENTRIES, block_tokens=BLOCK
        ),
        vocabulary=tables().info(),
        seed=0,
        dtype="float32",
        batch_sequences=1,
        software={},
    )
    writer.create_targets(str(url), name, manifest, tables())
    targets_writer = writer.TargetsWriter(str(url), name)
    encoded = make_targets(tokens, segments, roll)
    for spec in writer.plan_shards(manifest)[:shards]:
        part = slice(spec.first_row, spec.stop_row)
        targets_writer.write(spec, tokens[part], segments[part], encoded.part(part))
    Ledger(str(url), name, manifest).compact()


def small_config(folder: Path, out: Path, **changes: object) -> TrainConfig:
    """A run on `folder`/store, evaluated on `folder`/held-out if that is there."""
    model = folder / "model.json"
    model.write_text(json.dumps(MODEL))
    held_out = folder / "held-out"
    fields = {
        "store": str(folder / "store"),
        "out": out,
        "model": str(model),
        "batch_sequences": 8,
        "dtype": "float32",
        "loss_chunk_tokens": 64,
        "remat": "none",
        "optimizer": OptimizerConfig(learning_rate=5e-3, schedule=RateSchedule(warmup_steps=5)),
        "eval_store": str(held_out) if held_out.exists() else None,
        "checkpoint_every": 10,
        "log_every": 1,
    }
    return TrainConfig.model_validate(fields | changes)


def dense_targets(batch: Batch) -> np.ndarray:
    """float32 [B, L, VOCAB]: the stored weights of a batch, all other ids 0."""
    ids, weights = np.asarray(batch.entry_id), np.asarray(batch.entry_weight)
    dense = np.zeros((*batch.tokens.shape, VOCAB), np.float32)
    row = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    position = codec.entry_positions(
        np.asarray(batch.head_count), np.asarray(batch.tail_count), BLOCK, BLOCK * ENTRIES
    )
    used = ids >= 0
    np.add.at(dense, (row[used], position[used], ids[used]), weights[used])
    return dense
