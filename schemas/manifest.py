"""The store's own documents: manifests (written before data) and ledger records (written after).

A store has one tokens manifest and, per set of targets, one targets manifest. Both are kept in the
`retort` attribute of their Zarr group's `zarr.json`. `docs/format.md` is the specification.
"""

import hashlib
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.base import Document

FORMAT_VERSION = 1
SEGMENT_SHARDS = 1024
"""Shards whose records one ledger segment holds."""
MOST_POINTS = 65_535
"""Points of a position at most: they are counted in uint16."""
SamplerName = Literal["systematic", "multinomial", "top_k", "full"]
Backend = Literal["jax", "transformers"]
TeacherDtype = Literal["float32", "bfloat16", "float8"]


class SamplerSpec(Document):
    """How a next-token distribution becomes a few entries: `points` points, each on an id.

    Shape-giving, and stored in the manifest.
    """

    name: SamplerName = Field(
        description="systematic: evenly spaced points over the cumulated probabilities; "
        "multinomial: independent draws (random-sampling KD); top_k: the most probable ids and "
        "the rest as one; full: all of a small vocabulary.",
    )
    points: int = Field(
        ge=1,
        le=MOST_POINTS,
        description="Points per token: a weight is a whole number of them, over their number.",
    )
    entries_per_token: int | None = Field(
        None,
        ge=1,
        description="What `points` was chosen to give on average; null if points were given.",
    )
    slots_per_token: int = Field(
        ge=1, description="A block has this many entry slots for each of its tokens."
    )
    block_tokens: int = Field(ge=1, description="Tokens that share slots; divides L.")
    temperature: float = Field(
        1.0, gt=0, description="Divides the soft-capped logits before anything is sampled."
    )

    @property
    def slots_per_block(self) -> int:
        """Entry slots of one block of `block_tokens` tokens."""
        return self.slots_per_token * self.block_tokens


class _Sparse(Document):
    """A document whose absent fields are left out of its JSON, so that older ones stay as they are.

    Only fields that default to None may be absent.
    """

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class SourceFile(_Sparse):
    """One input file of the corpus, or a part of one, as it was when it was tokenized."""

    path: str
    size_bytes: int = Field(
        ge=0, description="Of the file; of a part, of the lines or row groups it consists of."
    )
    sha256: str = Field(
        description="Of the file's bytes; of a part of a file of lines, of its lines; of Parquet, "
        "Arrow and Zarr, of the values that were read."
    )
    documents: int = Field(ge=0, description="That are in the store, each as often as it is.")
    text_bytes: int = Field(ge=0, description="UTF-8 bytes of these documents.")
    part: tuple[int, int] | None = Field(
        None,
        description="First (inclusive) and last (exclusive) byte whose lines, row group, or place "
        "along a Zarr array's first axis, was read; absent if the file was read whole.",
    )
    group: int | None = Field(None, description="Of the mixture, from 0; absent without one.")


class Split(_Sparse):
    """A run of source files that is tokenized and packed as one piece, on whole sequences."""

    first_file: int = Field(ge=0)
    stop_file: int = Field(gt=0, description="Exclusive.")
    first_row: int = Field(ge=0)
    stop_row: int = Field(ge=0, description="Exclusive.")
    tokens: int = Field(ge=0, description="Tokens that are not padding.")
    documents_sha256: str | None = Field(
        None, description="Of documents/NNNNNNNN.bin; absent in stores made without it."
    )
    dead_letters_sha256: str | None = Field(
        None, description="Of dead_letters/NNNNNNNN.jsonl; absent if there is none."
    )


class Corpus(_Sparse):
    """The source files of a store's tokens and how they were split: `corpus/SHA256.json`.

    Apart from the manifest, so that opening a store costs the same however many files it has.
    """

    sources: tuple[SourceFile, ...]
    splits: tuple[Split, ...]
    recipe: dict[str, Any] | None = Field(
        None,
        description="What of the corpus's settings is not the default, but for paths; with SHA-256 "
        "of the files that filters read.",
    )
    report_sha256: str | None = Field(None, description="Of the report in corpus_report.json.")

    def summary(self) -> "CorpusSummary":
        return CorpusSummary(
            sha256=self.fingerprint(),
            files=len({source.path for source in self.sources}),
            file_bytes=sum(source.size_bytes for source in self.sources),
            documents=sum(source.documents for source in self.sources),
            text_bytes=sum(source.text_bytes for source in self.sources),
        )


class DeadLetter(_Sparse):
    """A document, or a file, that could not be read and was left out: a line of dead_letters/."""

    path: str
    line: int | None = Field(None, description="From 1; absent in a part of a file.")
    row: int | None = Field(None, description="From 0, of the file.")
    byte: int | None = Field(None, description="Where its line begins, uncompressed.")
    reason: str
    detail: str
    excerpt: str | None = Field(None, description="How it begins, escaped, at most 80 characters.")


class GroupReport(Document):
    """One group of a mixture."""

    weight: float
    tokens_read: int = Field(description="Of its documents that passed the filters.")
    tokens: int = Field(description="That are in the store.")
    epochs: float = Field(description="How often each of its documents is taken, on average.")


class CorpusReport(_Sparse):
    """What became of a corpus: `corpus_report.json`. Nothing in it depends on how it was run."""

    files: int
    parts: int = Field(description="Of files; a file that was not cut is one.")
    splits: int
    file_bytes: int
    documents_read: int = Field(description="Good or not; a file that cannot be read has none.")
    documents_kept: int = Field(description="That are in the store, however often.")
    dropped: dict[str, int] = Field(description="By the filters, for each reason.")
    dead_letters: dict[str, int] = Field(description="Documents and files, for each reason.")
    unlisted_dead_letters: int = Field(description="Beyond 10,000 of a split: counted only.")
    dead_letter_bytes: int | None = Field(
        None,
        description="Of dead_letters/; absent if there are none, and in stores of before it was "
        "counted.",
    )
    masked: dict[str, int] = Field(description="Pieces of personal data, of each kind.")
    documents: int = Field(description="In the store; one that is taken twice counts twice.")
    text_bytes: int
    tokens: int
    rows: int
    padding_share: float = Field(description="Of all positions.")
    mixture: tuple[GroupReport, ...] | None = None


class CorpusSummary(Document):
    """What the tokens manifest says of its corpus."""

    sha256: str = Field(description="Fingerprint of the Corpus document.")
    files: int = Field(ge=0)
    file_bytes: int = Field(ge=0)
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0)


class TokenizerInfo(Document):
    """Identity of a SentencePiece model: the file's SHA-256 and what its ids mean."""

    sha256: str
    vocab_size: int = Field(gt=0)
    bos_id: int
    eos_id: int
    pad_id: int


class TokensManifest(Document):
    """What the tokens of a store are and where they came from."""

    format_version: Literal[1] = 1
    kind: Literal["tokens"] = "tokens"
    tokenizer: TokenizerInfo
    num_sequences: int = Field(ge=1, description="N, rows of every array.")
    sequence_tokens: int = Field(ge=2, description="L, tokens of one row.")
    shard_sequences: int = Field(ge=1, description="Rows of one shard; the last may hold fewer.")
    corpus: CorpusSummary
    software: dict[str, str]

    @property
    def num_shards(self) -> int:
        return -(-self.num_sequences // self.shard_sequences)


class TeacherInfo(Document):
    """Identity of a teacher: a readable name and SHA-256 of its config and of its weights."""

    name: str
    config_sha256: str
    weights_sha256: str
    vocab_size: int = Field(
        gt=0, description="Ids that can be sampled; padded embedding rows beyond are masked."
    )
    # Left out where it is JAX, so that manifests of before there was another keep their checksums.
    backend: Backend = Field(
        "jax",
        description="What computed it: jax (also where it is absent) or transformers.",
        exclude_if=lambda backend: backend == "jax",
    )


class VocabularyInfo(Document):
    """The tables by which entries are coded, which lie beside the shards."""

    num_buckets: int = Field(ge=1, le=2**16)
    order_sha256: str = Field(description="Of `vocabulary_order`, uint32 little-endian.")
    buckets_sha256: str = Field(description="Of `bucket_bits`, uint8.")
    sampling_sha256: str = Field(description="Of `sampling_order`, uint32 little-endian.")


class TargetsManifest(Document):
    """What one set of targets is: which teacher, over which tokens, sampled how."""

    format_version: Literal[1] = 1
    kind: Literal["targets"] = "targets"
    tokens_fingerprint: str = Field(description="Fingerprint of the tokens manifest.")
    num_sequences: int = Field(ge=1)
    sequence_tokens: int = Field(ge=2)
    shard_sequences: int = Field(ge=1)
    teacher: TeacherInfo
    sampler: SamplerSpec
    vocabulary: VocabularyInfo
    seed: int = Field(ge=0, lt=2**64)
    dtype: TeacherDtype = Field(description="The teacher's arithmetic.")
    batch_sequences: int = Field(
        ge=1, description="The teacher's fixed batch: equal bytes are promised for an equal shape."
    )
    software: dict[str, str]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence_tokens % self.sampler.block_tokens:
            raise ValueError(
                f"sampler.block_tokens must divide the sequence length {self.sequence_tokens}"
            )
        return self

    @property
    def num_shards(self) -> int:
        return -(-self.num_sequences // self.shard_sequences)

    @property
    def blocks_per_sequence(self) -> int:
        return self.sequence_tokens // self.sampler.block_tokens

    @property
    def slots_per_sequence(self) -> int:
        """E, entry slots of one row."""
        return self.sequence_tokens * self.sampler.slots_per_token


class ShardSpec(Document):
    """The name of one piece of work: all that a Beam element carries (well under 1 KiB)."""

    manifest_fingerprint: str
    index: int = Field(ge=0)
    first_row: int = Field(ge=0)
    stop_row: int = Field(gt=0, description="Exclusive.")


class ShardFile(Document):
    """One object that a committed shard consists of."""

    key: str = Field(description="Relative to the manifest's group, for instance tokens/c/3/0.")
    size_bytes: int = Field(ge=0)
    sha256: str


class ShardStatistics(Document):
    """Sums over a shard's rows, so that a store's means come from its ledger alone."""

    tokens: int = Field(ge=0, description="Positions that are not padding.")
    predicted_tokens: int = Field(0, ge=0, description="Positions whose next token is a label.")
    entries: int = Field(0, ge=0)
    max_entries: int = Field(0, ge=0, description="Largest entry count of one position.")
    mass_sum: float = Field(0.0, description="Sum over predicted positions of the stored mass.")
    entropy_sum_nats: float = 0.0
    label_logprob_sum_nats: float = 0.0

    def plus(self, other: "ShardStatistics") -> "ShardStatistics":
        """The sums over both."""
        sums = {name: value + getattr(other, name) for name, value in self}
        sums["max_entries"] = max(self.max_entries, other.max_entries)
        return ShardStatistics(**sums)


class _Sealed(Document):
    """A document that carries the SHA-256 of itself with an empty checksum."""

    checksum: str = Field("", description="SHA-256 of this document with an empty checksum.")

    def sealed(self) -> Self:
        """The document with its checksum filled in."""
        return self.model_copy(update={"checksum": self._digest()})

    def is_intact(self) -> bool:
        return self.checksum == self._digest()

    def _digest(self) -> str:
        bare = self.model_copy(update={"checksum": ""})
        return hashlib.sha256(bare.canonical_json().encode()).hexdigest()


class LedgerRecord(_Sealed):
    """Proof that a shard is whole; written once, after its data, and never changed."""

    spec: ShardSpec
    tokens_sha256: str = Field(description="Of the rows' token ids, int32 little-endian, C order.")
    files: tuple[ShardFile, ...]
    statistics: ShardStatistics


class LedgerSummary(_Sealed):
    """Proof that every shard is committed, with their sums; written once, by the driver."""

    manifest_fingerprint: str
    num_shards: int = Field(ge=1)
    segments_sha256: tuple[str, ...] = Field(description="Of each ledger segment, in order.")
    statistics: ShardStatistics
    array_bytes: dict[str, int] = Field(description="Stored bytes of each array's shards.")
    record_bytes: int = Field(ge=0)


Manifest = TokensManifest | TargetsManifest


def identity(manifest: Manifest) -> str:
    """Fingerprint of what a manifest promises: all of it but the versions of the software."""
    return manifest.model_copy(update={"software": {}}).fingerprint()
