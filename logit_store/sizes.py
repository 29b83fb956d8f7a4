"""How large a store will be, before there is one: measured bytes, and what follows from the layout.

The only place with measured bytes. Nothing here reads or writes a store.
"""

from dataclasses import dataclass

from logit_store import layout
from schemas.manifest import (
    Manifest,
    SamplerSpec,
    TargetsManifest,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    WeightCode,
)

LEDGER_SEGMENT_RECORDS = 1024
"""Records in one object of a ledger that is complete; until then each is an object of its own."""
READS_PER_CHUNK = 2
"""The index of its shard, then the chunk itself: TensorStore's, where it caches no index."""
_INDEX_BYTES_PER_CHUNK = 16
_INDEX_CHECKSUM_BYTES = 4
_BLANK = "0" * 64


@dataclass(frozen=True)
class StoredBytes:
    """Mean stored bytes, compressed, with checksums and shard indices."""

    tokens_bytes_per_token: float
    """`tokens` and `segment_ids`."""
    count_bytes_per_token: float
    floor_bytes_per_token: float
    statistics_bytes_per_token: float
    """`teacher_entropy` and `label_logprob`."""
    id_bytes_per_entry: float
    weight_bytes_per_entry: dict[WeightCode, float]
    ledger_bytes_per_shard: float
    """The records of one shard: that of its tokens and that of its targets."""
    entries_per_token: int
    """Of the store that was measured; another number is taken in proportion."""
    source: str

    def per_token(
        self, entries_per_token: float, weight_code: WeightCode
    ) -> dict[tuple[str, ...], float]:
        """Bytes of one token by the arrays they lie in; ledger and metadata are not among them."""
        return {
            ("tokens", "segment_ids"): self.tokens_bytes_per_token,
            ("entry_count",): self.count_bytes_per_token,
            ("entry_id",): self.id_bytes_per_entry * entries_per_token,
            ("entry_weight",): self.weight_bytes_per_entry[weight_code] * entries_per_token,
            ("weight_floor",): self.floor_bytes_per_token,
            ("teacher_entropy", "label_logprob"): self.statistics_bytes_per_token,
        }


_ENTRIES = 12
MEASURED = StoredBytes(
    tokens_bytes_per_token=1.27,
    count_bytes_per_token=0.58,
    floor_bytes_per_token=0.02,
    statistics_bytes_per_token=1.73 + 1.83,
    # What is left of 27.1 bytes, the whole as it lay on disk.
    id_bytes_per_entry=(27.1 - (1.27 + 0.58 + 0.02 + 1.73 + 1.83 + 3.5)) / _ENTRIES,
    weight_bytes_per_entry={"log_uint8": 3.5 / _ENTRIES, "log_uint16": 5.9 / _ENTRIES},
    ledger_bytes_per_shard=735 + 1323,
    entries_per_token=_ENTRIES,
    source="November 2026, 131,072 tokens of documentation and Python code, vocabulary 262,144, "
    "12 entries per token, rows of 8,192, blosc zstd 5, without segment_ids, in another layout "
    "than format 1: heads before tails, ids as byte planes of differences",
)


def planned_manifests(
    *,
    num_sequences: int,
    sequence_tokens: int,
    shard_sequences: int,
    entries_per_token: int,
    weight_code: WeightCode,
) -> tuple[TokensManifest, TargetsManifest]:
    """Manifests of a store that is only planned: its shapes, with blanks for what identifies it."""
    shapes = {
        "num_sequences": num_sequences,
        "sequence_tokens": sequence_tokens,
        "shard_sequences": shard_sequences,
    }
    tokens = TokensManifest(
        **shapes,
        tokenizer=TokenizerInfo(sha256=_BLANK, vocab_size=1, bos_id=0, eos_id=0, pad_id=0),
        sources=(),
        splits=(),
        software={},
    )
    targets = TargetsManifest(
        **shapes,
        tokens_fingerprint=_BLANK,
        teacher=TeacherInfo(name="", config_sha256=_BLANK, weights_sha256=_BLANK, vocab_size=1),
        # One block a row divides every row; the number of blocks changes no number of files.
        sampler=SamplerSpec(entries_per_token=entries_per_token, block_tokens=sequence_tokens),
        weight_code=weight_code,
        seed=0,
        batch_sequences=1,
        software={},
    )
    return tokens, targets


@dataclass(frozen=True)
class Objects:
    """Objects of a store with one set of targets."""

    sequences: int
    shards: int
    arrays: int
    shard_files: int
    ledger_records: int
    """One for each shard of tokens and of targets, each an object until the ledger is complete."""
    ledger_segments: int
    metadata: int

    @property
    def while_written(self) -> int:
        return self.shard_files + self.ledger_records + self.metadata

    @property
    def complete(self) -> int:
        return self.shard_files + self.ledger_segments + self.metadata


def count_objects(tokens: TokensManifest, targets: TargetsManifest) -> Objects:
    """The objects that the manifests imply."""
    groups: tuple[Manifest, ...] = (tokens, targets)
    arrays = len(layout.tokens_arrays(tokens)) + len(layout.targets_arrays(targets))
    groups_of_sets = 1  # `targets/` itself
    return Objects(
        sequences=tokens.num_sequences,
        shards=tokens.num_shards,
        arrays=arrays,
        shard_files=len(layout.tokens_arrays(tokens)) * tokens.num_shards
        + len(layout.targets_arrays(targets)) * targets.num_shards,
        ledger_records=sum(group.num_shards for group in groups),
        ledger_segments=sum(-(-group.num_shards // LEDGER_SEGMENT_RECORDS) for group in groups),
        metadata=len(groups) + groups_of_sets + arrays,
    )


def shard_index_bytes(shard_sequences: int) -> int:
    """Bytes of one shard's index: offset and length of each inner chunk (one row), and crc32c."""
    return _INDEX_BYTES_PER_CHUNK * shard_sequences + _INDEX_CHECKSUM_BYTES
