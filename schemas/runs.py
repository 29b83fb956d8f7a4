"""What a user configures: one document per verb that runs something long.

Every field can be set in a YAML file (`--config`) and overridden by a flag of the same name.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from schemas.base import Document
from schemas.manifest import SamplerSpec, WeightCode


class CorpusConfig(Document):
    """Which documents are read."""

    paths: tuple[str, ...] = Field(
        description="Files or folders: .txt .md .rst .py (one document a file), .jsonl(.gz), "
        ".parquet."
    )
    text_field: str = Field("text", description="JSONL key or Parquet column with the text.")
    min_characters: int = Field(1, ge=0, description="Shorter documents are dropped.")
    max_characters: int | None = Field(None, ge=1, description="Longer documents are dropped.")


class TokenizeConfig(Document):
    """Corpus to packed sequences: `retort tokenize`."""

    store: str = Field(description="Store to create: a folder, gs://… or s3://….")
    corpus: CorpusConfig
    tokenizer: Path = Field(description="SentencePiece model file.")
    sequence_tokens: int = Field(8192, ge=2, description="L, tokens per packed sequence.")
    shard_sequences: int = Field(256, ge=1, description="Sequences per shard.")
    split_bytes: int = Field(
        64 * 2**20, ge=1, description="Input files are grouped into splits of about this size."
    )


class DumpConfig(Document):
    """Teacher targets for a store's tokens: `retort dump`."""

    store: str = Field(description="Store whose tokens are read and that receives the targets.")
    teacher: Path = Field(description="Folder of a Hugging Face Gemma 2 checkpoint.")
    name: str = Field(
        "default", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of this set of targets."
    )
    sampler: SamplerSpec = SamplerSpec()
    weight_code: WeightCode = Field(
        "log_uint8", description="Width of a stored weight; log_uint16 for sharp teachers."
    )
    seed: int = Field(0, ge=0, lt=2**64)
    batch_sequences: int = Field(1, ge=1, description="Fixed batch shape of the teacher.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Teacher's arithmetic.")


class OptimizerConfig(Document):
    """AdamW with warm-up and a cosine to a floor."""

    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    final_fraction: float = Field(0.1, ge=0, le=1, description="Of the peak, at the last step.")
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")


class MeshConfig(Document):
    """Devices along each axis; fsdp -1 takes all that the other two leave."""

    replica: int = Field(1, ge=1)
    fsdp: int = Field(-1, ge=-1)
    model: int = Field(1, ge=1)


class TrainConfig(Document):
    """One student (or a small teacher) on a store: `retort train`."""

    store: str
    out: Path = Field(description="Folder for checkpoints, metrics and the exported model.")
    model: str = Field("tiny", description="Preset name, or a YAML or JSON file of a ModelConfig.")
    init: Path | None = Field(None, description="Hugging Face folder to start from.")
    tokenizer: Path | None = Field(
        None,
        description="The store's SentencePiece file: goes into the export, counts bits per byte.",
    )
    targets: str | None = Field(
        "default", description="Name of the stored targets; none trains on labels alone."
    )
    alpha: float = Field(
        1.0, ge=0, le=1, description="Weight of the stored targets; labels get the rest."
    )
    steps: int = Field(1000, ge=1)
    batch_sequences: int = Field(8, ge=1, description="Sequences per step over all devices.")
    seed: int = Field(
        0, ge=0, lt=2**64, description="Of the initialisation and of the order of rows."
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute dtype.")
    loss_chunk_tokens: int = Field(
        1024, ge=1, description="Tokens whose logits exist at once in the loss."
    )
    remat: Literal["none", "full"] = Field("full", description="What the backward recomputes.")
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    eval_store: str | None = Field(None, description="Store with held-out tokens.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0 for the end only.")
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(10, ge=1)


class EvalConfig(Document):
    """Held-out quality of a model: `retort eval`."""

    store: str = Field(description="Store with held-out tokens; targets are not needed.")
    model: Path = Field(description="Folder of a Hugging Face Gemma 2 checkpoint.")
    tokenizer: Path | None = Field(
        None, description="SentencePiece file for bits per byte; default: the model's own."
    )
    batch_sequences: int = Field(8, ge=1)
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute dtype.")


class ExportConfig(Document):
    """A trained student as a Hugging Face folder: `retort export`."""

    run: Path = Field(description="The `out` folder of a training run.")
    out: Path = Field(description="Folder to create; transformers opens it.")
    step: int | None = Field(None, ge=0, description="Checkpointed step; default: the newest.")


QuickstartSize = Literal["tiny", "small"]


class QuickstartConfig(Document):
    """From a corpus to a distilled student on this machine: `retort quickstart`."""

    out: Path = Field(Path("runs/quickstart"), description="Folder for everything that is made.")
    corpus: tuple[str, ...] = Field(
        (), description="Files or folders of text, JSONL or Parquet; default: Python's own library."
    )
    size: QuickstartSize = Field(
        "small", description="small: the ten-minute run; tiny: a one-minute check of the plumbing."
    )
    seed: int = Field(
        0, ge=0, lt=2**64, description="Of the students: initialisation and order of rows."
    )
