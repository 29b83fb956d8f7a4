"""How large a store will be, before there is one: measured bytes, and what follows from the layout.

The only place with measured bytes. Nothing here reads or writes a store.
"""

from dataclasses import dataclass

from logit_store import layout
from schemas.manifest import (
    SEGMENT_SHARDS,
    CorpusSummary,
    Manifest,
    SamplerSpec,
    TargetsManifest,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    VocabularyInfo,
)

READS_PER_CHUNK = 2
"""The index of its shard, then the chunk itself: TensorStore's, where it caches no index."""
_INDEX_BYTES_PER_CHUNK = 16
_INDEX_CHECKSUM_BYTES = 4
_BLANK = "0" * 64
# Of a vocabulary of 256k: its tables' chunks, each stored twice.
_VOCABULARY = 256_000
_BUCKETS = 400


@dataclass(frozen=True)
class StoredBytes:
    """Mean stored bytes, compressed, with checksums and shard indices."""

    tokens_bytes_per_token: float
    """`tokens` and `segment_ids`."""
    statistics_bytes_per_token: float
    """`teacher_nats`."""
    head_bytes_per_entry: float
    """`head_count`, `head_points` and `block_points`."""
    id_bytes_per_entry: float
    """`entry_bucket` and `entry_offset`."""
    ledger_bytes_per_shard: float
    """The records of one shard: that of its tokens and that of its targets."""
    entries_per_token: float
    """Of the store that was measured; another number is taken in proportion."""
    source: str

    def per_token(self, entries_per_token: float) -> dict[tuple[str, ...], float]:
        """Bytes of one token by the arrays they lie in; ledger and metadata are not among them."""
        return {
            ("tokens", "segment_ids"): self.tokens_bytes_per_token,
            ("head_count", "head_points", "block_points"): self.head_bytes_per_entry
            * entries_per_token,
            ("entry_bucket", "entry_offset"): self.id_bytes_per_entry * entries_per_token,
            ("teacher_nats",): self.statistics_bytes_per_token,
        }


MEASURED = StoredBytes(
    tokens_bytes_per_token=1.27,
    statistics_bytes_per_token=1.68,
    head_bytes_per_entry=1.32 / 12.02,
    id_bytes_per_entry=15.72 / 12.02,
    ledger_bytes_per_shard=735 + 1323,
    entries_per_token=12.02,
    source="98,304 tokens of English and code, vocabulary 256,000, entropy 3.46 nats, 2026-11-25",
)


def planned_manifests(
    *, num_sequences: int, sequence_tokens: int, shard_sequences: int, slots_per_token: int
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
        corpus=CorpusSummary(sha256=_BLANK, files=0, file_bytes=0, documents=0, text_bytes=0),
        software={},
    )
    targets = TargetsManifest(
        **shapes,
        tokens_fingerprint=_BLANK,
        teacher=TeacherInfo(
            name="", config_sha256=_BLANK, weights_sha256=_BLANK, vocab_size=_VOCABULARY
        ),
        # One block a row divides every row; the number of blocks changes no number of files.
        sampler=SamplerSpec(
            name="systematic",
            points=1,
            slots_per_token=slots_per_token,
            block_tokens=sequence_tokens,
        ),
        vocabulary=VocabularyInfo(
            num_buckets=_BUCKETS,
            order_sha256=_BLANK,
            buckets_sha256=_BLANK,
            sampling_sha256=_BLANK,
        ),
        seed=0,
        dtype="bfloat16",
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
    ledger_objects: int
    """What replaces the records: segments, and a summary for each group."""
    metadata: int

    @property
    def while_written(self) -> int:
        return self.shard_files + self.ledger_records + self.metadata

    @property
    def complete(self) -> int:
        return self.shard_files + self.ledger_objects + self.metadata


def count_objects(tokens: TokensManifest, targets: TargetsManifest) -> Objects:
    """The objects that the manifests imply."""
    groups: tuple[Manifest, ...] = (tokens, targets)
    arrays = [spec for group in groups for spec in layout.row_arrays(group).values()]
    tables = layout.table_arrays(targets)
    groups_of_sets = 1  # `targets/` itself
    corpus = 1
    return Objects(
        sequences=tokens.num_sequences,
        shards=tokens.num_shards,
        arrays=len(arrays),
        shard_files=sum(len(layout.row_arrays(group)) * group.num_shards for group in groups),
        ledger_records=sum(group.num_shards for group in groups),
        ledger_objects=sum(1 + -(-group.num_shards // SEGMENT_SHARDS) for group in groups),
        # A manifest is stored twice, and so is a table, which has metadata besides.
        metadata=2 * len(groups) + groups_of_sets + corpus + len(arrays) + 3 * len(tables),
    )


def shard_index_bytes(shard_sequences: int) -> int:
    """Bytes of one shard's index: offset and length of each inner chunk (one row), and crc32c."""
    return _INDEX_BYTES_PER_CHUNK * shard_sequences + _INDEX_CHECKSUM_BYTES
