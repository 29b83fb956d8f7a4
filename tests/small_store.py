"""A small store of made-up rows, with two shards of two rows and one of a single row."""

from copy import deepcopy
from functools import cache

import numpy as np

from logit_store import codec, writer
from logit_store.codec import RowEntries
from logit_store.layout import predicted_mask
from logit_store.ledger import Ledger
from logit_store.rows import TargetRows
from schemas.manifest import (
    Corpus,
    SamplerSpec,
    ShardSpec,
    TargetsManifest,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    identity,
)

ROWS, LENGTH, BLOCK, PER_TOKEN, VOCAB, POINTS = 5, 16, 8, 3, 300, 10
SLOTS = BLOCK * PER_TOKEN
CORPUS = Corpus(sources=(), splits=())


def tables() -> writer.Tables:
    """Ids from common to rare in an order of their own; buckets of one id to 32."""
    return deepcopy(_tables())


# Made once: most tests ask for them, some many times. Each gets a copy, as some tests change them.
@cache
def _tables() -> writer.Tables:
    random = np.random.default_rng(3)
    counts = random.permutation((1e4 / np.arange(1, VOCAB + 1)).astype(np.int64))
    return writer.Tables(
        codec.make_vocabulary(counts, PER_TOKEN), random.permutation(VOCAB).astype(np.uint32)
    )


def tokens_manifest(corpus: Corpus = CORPUS, **changes: object) -> TokensManifest:
    return TokensManifest(
        tokenizer=TokenizerInfo(sha256="ab" * 32, vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0),
        num_sequences=ROWS,
        sequence_tokens=LENGTH,
        shard_sequences=2,
        corpus=corpus.summary(),
        software={"retort": "0"},
    ).model_copy(update=changes)


def targets_manifest(**changes: object) -> TargetsManifest:
    return TargetsManifest(
        tokens_fingerprint=identity(tokens_manifest()),
        num_sequences=ROWS,
        sequence_tokens=LENGTH,
        shard_sequences=2,
        teacher=TeacherInfo(
            name="made up", config_sha256="0", weights_sha256="1", vocab_size=VOCAB
        ),
        sampler=SamplerSpec(
            name="systematic", points=POINTS, slots_per_token=PER_TOKEN, block_tokens=BLOCK
        ),
        vocabulary=tables().info(),
        seed=0,
        dtype="float32",
        batch_sequences=1,
        software={"retort": "0"},
    ).model_copy(update=changes)


def token_rows() -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 and segment ids uint16 [ROWS, LENGTH]; the last row ends in padding."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(4, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segments = np.ones((ROWS, LENGTH), np.uint16)
    segments[:, 10:] = 2
    segments[-1, 13:] = 0
    tokens[-1, 13:] = 0
    return tokens, segments


def row_entries(seed: int = 11) -> tuple[list[RowEntries], np.ndarray]:
    """Entries of each row, and the points of each block uint16 [ROWS, blocks].

    One to four ids a position, so that some blocks are nearly full; one block has fewer points.
    """
    rng = np.random.default_rng(seed)
    predicted = predicted_mask(token_rows()[1])
    block_points = np.full((ROWS, LENGTH // BLOCK), POINTS, np.uint16)
    block_points[1, 1] = POINTS - 3
    rows = []
    for row in range(ROWS):
        positions, ids, points = [], [], []
        for position in np.flatnonzero(predicted[row]):
            count = int(rng.integers(1, 4))
            total = int(block_points[row, position // BLOCK])
            cuts = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False))
            positions += [position] * count
            ids += rng.choice(VOCAB, count, replace=False).tolist()
            points += np.diff(np.concatenate([[0], cuts, [total]])).tolist()
        rows.append(RowEntries(np.array(positions), np.array(ids), np.array(points)))
    return rows, block_points


def target_rows(seed: int = 11) -> TargetRows:
    """The rows of `row_entries`, encoded."""
    return deepcopy(_target_rows(seed))


@cache
def _target_rows(seed: int) -> TargetRows:
    rng = np.random.default_rng(seed + 1)
    rows, block_points = row_entries(seed)
    predicted = predicted_mask(token_rows()[1])
    nats = np.stack([rng.uniform(0, 5, predicted.shape), rng.uniform(0, 8, predicted.shape)], 1)
    nats[np.broadcast_to(~predicted[:, None], nats.shape)] = 0.0
    vocabulary = tables().vocabulary
    encoded = [
        codec.encode_row(vocabulary, entries, LENGTH, LENGTH * PER_TOKEN, POINTS)
        for entries in rows
    ]
    return TargetRows(
        **{name: np.stack([row[name] for row in encoded]) for name in encoded[0]},
        block_points=block_points,
        teacher_nats=codec.encode_nats(nats, rng.random(nats.shape)),
    )


def part(rows: TargetRows, spec: ShardSpec) -> TargetRows:
    """The rows of one shard."""
    return rows.part(slice(spec.first_row, spec.stop_row))


def write_tokens(url: str) -> None:
    tokens, segments = token_rows()
    manifest = tokens_manifest()
    writer.create_tokens(url, manifest, CORPUS)
    ledger = Ledger(url, None, manifest)
    for spec in ledger.pending():
        rows = slice(spec.first_row, spec.stop_row)
        writer.TokensWriter(url).write(spec, tokens[rows], segments[rows])
    ledger.compact()


def write_targets(url: str, name: str = "default", **changes: object) -> None:
    tokens, segments = token_rows()
    manifest = targets_manifest(**changes)
    writer.create_targets(url, name, manifest, tables())
    ledger = Ledger(url, name, manifest)
    for spec in ledger.pending():
        rows = slice(spec.first_row, spec.stop_row)
        writer.TargetsWriter(url, name).write(
            spec, tokens[rows], segments[rows], part(target_rows(), spec)
        )
    ledger.compact()


def write_store(url: str) -> None:
    write_tokens(url)
    write_targets(url)
