"""A small store of made-up rows, with two shards of two rows and one of a single row."""

import numpy as np

from logit_store import writer
from logit_store.codec import encode_weights
from logit_store.decode import TargetRows
from logit_store.layout import UNUSED_ID, predicted_mask
from schemas.manifest import (
    SamplerSpec,
    ShardSpec,
    TargetsManifest,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    identity,
)

ROWS, LENGTH, BLOCK, PER_TOKEN, VOCAB = 5, 16, 8, 3, 300
SLOTS = BLOCK * PER_TOKEN


def tokens_manifest(**changes: object) -> TokensManifest:
    return TokensManifest(
        tokenizer=TokenizerInfo(sha256="ab" * 32, vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0),
        num_sequences=ROWS,
        sequence_tokens=LENGTH,
        shard_sequences=2,
        sources=(),
        splits=(),
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
        sampler=SamplerSpec(entries_per_token=PER_TOKEN, block_tokens=BLOCK),
        weight_code="log_uint8",
        seed=0,
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


def target_rows(seed: int = 11) -> tuple[TargetRows, dict[tuple[int, int], dict[int, float]]]:
    """Encoded targets, and the weights by (row, position) and id that went into them."""
    rng = np.random.default_rng(seed)
    _, segments = token_rows()
    predicted = predicted_mask(segments)
    counts = np.zeros((ROWS, LENGTH), np.uint16)
    ids = np.full((ROWS, LENGTH // BLOCK, SLOTS), UNUSED_ID, np.uint32)
    floor = rng.uniform(0.01, 0.1, (ROWS, LENGTH // BLOCK)).astype(np.float32)
    weights = np.broadcast_to(floor[..., None], ids.shape).copy()
    expected: dict[tuple[int, int], dict[int, float]] = {}
    for row in range(ROWS):
        for block in range(LENGTH // BLOCK):
            slot = 0
            for position in range(block * BLOCK, (block + 1) * BLOCK):
                if not predicted[row, position]:
                    continue
                count = int(rng.integers(0, 4))
                chosen = np.sort(rng.choice(VOCAB, count, replace=False))
                values = rng.uniform(floor[row, block], 1.0, count)
                ids[row, block, slot : slot + count] = chosen
                weights[row, block, slot : slot + count] = values
                counts[row, position] = count
                expected[row, position] = dict(zip(chosen.tolist(), values, strict=True))
                slot += count
    codes = encode_weights(weights, floor[..., None], rng.random(weights.shape), "log_uint8")
    entropy = np.where(predicted, rng.uniform(0, 5, predicted.shape), 0)
    label = np.where(predicted, -rng.uniform(0, 8, predicted.shape), 0)
    rows = TargetRows(
        entry_count=counts,
        entry_id=ids.reshape(ROWS, -1),
        entry_weight=codes.reshape(ROWS, -1),
        weight_floor=floor,
        teacher_entropy=entropy.astype(np.float16),
        label_logprob=label.astype(np.float16),
    )
    return rows, expected


def part(rows: TargetRows, spec: ShardSpec) -> TargetRows:
    """The rows of one shard."""
    return TargetRows(
        **{
            name: getattr(rows, name)[spec.first_row : spec.stop_row]
            for name in TargetRows.__dataclass_fields__
        }
    )


def write_tokens(url: str) -> None:
    tokens, segments = token_rows()
    writer.create_tokens(url, tokens_manifest())
    for spec in writer.pending(url, None):
        rows = slice(spec.first_row, spec.stop_row)
        writer.TokensWriter(url).write(spec, tokens[rows], segments[rows])


def write_targets(url: str, name: str = "default", **changes: object) -> None:
    tokens, segments = token_rows()
    writer.create_targets(url, name, targets_manifest(**changes))
    for spec in writer.pending(url, name):
        rows = slice(spec.first_row, spec.stop_row)
        writer.TargetsWriter(url, name).write(
            spec, tokens[rows], segments[rows], part(target_rows()[0], spec)
        )


def write_store(url: str) -> None:
    write_tokens(url)
    write_targets(url)
