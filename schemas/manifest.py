"""The store's own documents: manifests (written before data) and ledger records (written after).

A store has one tokens manifest and, per set of targets, one targets manifest. Both are kept in the
`retort` attribute of their Zarr group's `zarr.json`. `docs/format.md` is the specification.
"""

import hashlib
from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.base import Document

FORMAT_VERSION = 1
SamplerName = Literal["threshold", "top_k", "multinomial", "full"]
WeightCode = Literal["log_uint8", "log_uint16"]


class SamplerSpec(Document):
    """How a next-token distribution becomes a few entries. Shape-giving: stored in the manifest."""

    name: SamplerName = Field(
        "threshold",
        description="threshold: exact head, systematically sampled tail, one threshold per block; "
        "top_k; multinomial: draws with replacement (random-sampling KD); full: all of a small "
        "vocabulary.",
    )
    entries_per_token: int = Field(
        12, ge=1, description="Mean entries per token; a block holds this many times its tokens."
    )
    block_tokens: int = Field(
        256, ge=1, description="Tokens that share one budget, and one threshold; divides L."
    )
    draws: int | None = Field(
        None, ge=1, description="Draws per token; for multinomial, and for it alone."
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides the soft-capped logits before anything is sampled."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.name == "multinomial") != (self.draws is not None):
            raise ValueError(
                "draws must be given for the multinomial sampler and for no other, but the "
                f"sampler is {self.name} with draws={self.draws}"
            )
        return self

    @property
    def entries_per_block(self) -> int:
        """Entry slots of one block of `block_tokens` tokens."""
        return self.entries_per_token * self.block_tokens


class SourceFile(Document):
    """One input file of the corpus as it was when it was tokenized."""

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0, description="UTF-8 bytes of the documents that were kept.")


class Split(Document):
    """A run of source files that is tokenized and packed as one piece, on whole sequences."""

    first_file: int = Field(ge=0)
    stop_file: int = Field(gt=0, description="Exclusive.")
    first_row: int = Field(ge=0)
    stop_row: int = Field(ge=0, description="Exclusive.")
    tokens: int = Field(ge=0, description="Tokens that are not padding.")


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
    sources: tuple[SourceFile, ...]
    splits: tuple[Split, ...]
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
    weight_code: WeightCode
    seed: int = Field(ge=0, lt=2**64)
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
    def entries_per_sequence(self) -> int:
        """E, entry slots of one row."""
        return self.sequence_tokens * self.sampler.entries_per_token


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


class LedgerRecord(Document):
    """Proof that a shard is whole; written once, after its data, and never changed."""

    spec: ShardSpec
    tokens_sha256: str = Field(description="Of the rows' token ids, int32 little-endian, C order.")
    files: tuple[ShardFile, ...]
    statistics: ShardStatistics
    checksum: str = Field("", description="SHA-256 of this record with an empty checksum.")

    def sealed(self) -> "LedgerRecord":
        """The record with its checksum filled in."""
        return self.model_copy(update={"checksum": self._digest()})

    def is_intact(self) -> bool:
        return self.checksum == self._digest()

    def _digest(self) -> str:
        bare = self.model_copy(update={"checksum": ""})
        return hashlib.sha256(bare.canonical_json().encode()).hexdigest()


Manifest = TokensManifest | TargetsManifest


def identity(manifest: Manifest) -> str:
    """Fingerprint of what a manifest promises: all of it but the versions of the software."""
    return manifest.model_copy(update={"software": {}}).fingerprint()
