"""What a user configures: one document per verb that runs something long.

Every field can be set in a YAML file (`--config`) and overridden by a flag of the same name.
"""

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from schemas.accelerators import ACCELERATORS
from schemas.base import Document
from schemas.corpus import CorpusConfig
from schemas.manifest import MOST_POINTS, SamplerName, SamplerSpec, TeacherDtype
from schemas.model import Remat

DEFAULT_SEQUENCE_TOKENS = 8192
DEFAULT_SHARD_SEQUENCES = 256
MAX_TOKENS = 10**18
_BLOCK_TOKENS = 1024


class TokenizeConfig(Document):
    """Corpus to packed sequences: `retort tokenize`."""

    store: str = Field(description="Store to create: a folder, gs://… or s3://….")
    corpus: CorpusConfig
    tokenizer: Path = Field(description="SentencePiece model file.")
    sequence_tokens: int = Field(
        DEFAULT_SEQUENCE_TOKENS, ge=2, description="L, tokens per packed sequence."
    )
    shard_sequences: int = Field(DEFAULT_SHARD_SEQUENCES, ge=1, description="Sequences per shard.")
    split_bytes: int = Field(
        64 * 2**20,
        ge=1,
        description="Input is read in splits of about this size: many small files, or a part of a "
        "large one.",
    )


class SamplerConfig(Document):
    """How the teacher's distributions are sampled, as a user says it; `spec` makes it definite."""

    name: SamplerName = Field(
        "systematic",
        description="systematic: evenly spaced points over the cumulated probabilities, unbiased; "
        "multinomial: independent draws (random-sampling KD), unbiased; top_k: the most probable "
        "ids and the rest as one, biased; full: all of a small vocabulary.",
    )
    entries_per_token: int = Field(
        12, ge=1, description="Mean entries per token; for top_k, that of every token."
    )
    points: int | None = Field(
        None,
        ge=1,
        le=MOST_POINTS,
        description="Points (draws) per token, of systematic and multinomial: the more, the finer. "
        "Default: as many as give entries_per_token on a sample of the rows.",
    )
    slots_per_token: int | None = Field(
        None,
        ge=1,
        description="Most entries per token over a block; a harder block gets fewer points. "
        "Default: half as many again as entries_per_token.",
    )
    block_tokens: int | None = Field(
        None, ge=1, description="Tokens that share slots; divides L. Default: 1024, or all of L."
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides the soft-capped logits before anything is sampled."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.points is not None and not self.has_points:
            raise ValueError(
                f"points must be given for systematic or multinomial alone, but the sampler is "
                f"{self.name}; leave them out"
            )
        return self

    @property
    def has_points(self) -> bool:
        """Whether the number of points is a choice; else weights are as exact as can be stored."""
        return self.name in ("systematic", "multinomial")

    def spec(self, points: int | None, sequence_tokens: int, vocab_size: int) -> SamplerSpec:
        """The definite form for rows of L tokens; `points` is used where the config has none."""
        slots = {
            "systematic": -(-3 * self.entries_per_token // 2),
            "multinomial": -(-3 * self.entries_per_token // 2),
            # The rest takes a slot too.
            "top_k": self.entries_per_token + 1,
            "full": vocab_size,
        }[self.name]
        block = _BLOCK_TOKENS if sequence_tokens % _BLOCK_TOKENS == 0 else sequence_tokens
        return SamplerSpec(
            name=self.name,
            points=(self.points or points) if self.has_points else MOST_POINTS,
            slots_per_token=self.slots_per_token or slots,
            block_tokens=self.block_tokens or block,
            temperature=self.temperature,
        )


class DumpConfig(Document):
    """Teacher targets for a store's tokens: `retort dump`."""

    store: str = Field(description="Store whose tokens are read and that receives the targets.")
    teacher: Path = Field(
        description="Hugging Face folder: Gemma 2, or with [torch] any causal model; safetensors."
    )
    backend: Literal["auto", "jax", "transformers"] = Field(
        "auto",
        description="What computes the teacher; auto: jax for Gemma 2, transformers for others.",
    )
    name: str = Field(
        "default", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of this set of targets."
    )
    sampler: SamplerConfig = SamplerConfig()
    seed: int = Field(0, ge=0, lt=2**64)
    batch_sequences: int = Field(1, ge=1, description="Fixed batch shape of the teacher.")
    dtype: TeacherDtype = Field(
        "bfloat16",
        description="Teacher's arithmetic; float8: of the layers' products, with scales for each "
        "token and each column of a weight, and bfloat16 for the rest.",
    )
    model_devices: int = Field(
        1,
        ge=1,
        description="Devices of a worker that share the teacher's layers; the same for all "
        "workers, as sums differ in their last bits.",
    )


class Schedule(Document):
    """A factor for each step: it warms up to 1, stays there, and decays until the last step.

    With warmup_steps and decay_steps it is the WSD schedule (warm-up, stable, decay); with
    decay_steps none it decays from the warm-up on; with neither it is 1 throughout.
    """

    warmup_steps: int = Field(0, ge=0, description="Steps of the warm-up, a straight line.")
    initial_fraction: float = Field(0.0, ge=0, le=1, description="Where the warm-up begins.")
    decay_steps: int | None = Field(
        0, ge=0, description="Last steps, which decay; none: all that follow the warm-up."
    )
    decay: Literal["linear", "cosine", "sqrt"] = Field(
        "linear", description="After a share x of the decay: 1-x, (1+cos(pi x))/2 or 1-sqrt(x)."
    )
    final_fraction: float = Field(0.0, ge=0, le=1, description="Where the decay ends.")

    def check(self, name: str, steps: int) -> None:
        """Raise ValueError unless warm-up and decay fit into `steps`."""
        taken = self.warmup_steps + (self.decay_steps or 0)
        if self.decay_steps and taken > steps:
            raise ValueError(
                f"{name}.warmup_steps and {name}.decay_steps must fit into steps, but they are "
                f"{taken} of {steps} together; shorten one of them"
            )


class RateSchedule(Schedule):
    """The learning rate's: a warm-up, then a cosine to a tenth, unless told otherwise."""

    warmup_steps: int = Field(100, ge=0, description="Steps of the warm-up, a straight line.")
    decay_steps: int | None = Field(
        None, ge=0, description="Last steps, which decay; none: all that follow the warm-up."
    )
    decay: Literal["linear", "cosine", "sqrt"] = Field(
        "cosine", description="After a share x of the decay: 1-x, (1+cos(pi x))/2 or 1-sqrt(x)."
    )
    final_fraction: float = Field(0.1, ge=0, le=1, description="Where the decay ends.")


class OptimizerConfig(Document):
    """AdamW with a global-norm clip."""

    learning_rate: float = Field(1e-3, gt=0, description="The schedule's peak.")
    schedule: RateSchedule = RateSchedule()
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")


class RoutingConfig(Document):
    """Which positions learn from their label alone, because the teacher is sure of them."""

    drop_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of positions, those of lowest teacher entropy; arXiv 2509.01649 has "
        "0.15. What it means in nats is found on a sample of the store.",
    )
    below_nats: float | None = Field(
        None, ge=0, description="In place of a share: positions of lower teacher entropy."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.drop_share and self.below_nats is not None:
            raise ValueError("drop_share and below_nats say the same; leave one of them out")
        return self

    @property
    def is_on(self) -> bool:
        return self.drop_share > 0 or self.below_nats is not None


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
    init: Path | None = Field(
        None,
        description="What to start from: a Hugging Face folder, or the `out` folder of another "
        "run, whose newest checkpoint it is.",
    )
    tokenizer: Path | None = Field(
        None,
        description="The store's SentencePiece file: goes into the export, counts bits per byte.",
    )
    targets: str | None = Field(
        "default", description="Name of the stored targets; none trains on labels alone."
    )
    partial_store: bool = Field(
        False,
        description="Train on a store that is still being written: on its shards before the first "
        "missing one, and on just these until the run ends.",
    )
    alpha: float = Field(
        1.0, ge=0, le=1, description="Weight of the stored targets; labels get the rest."
    )
    alpha_schedule: Schedule = Field(Schedule(), description="Of alpha, which is its peak.")
    routing: RoutingConfig = RoutingConfig()
    steps: int = Field(1000, ge=1)
    batch_sequences: int = Field(8, ge=1, description="Sequences per step over all devices.")
    accumulate: int = Field(
        1, ge=1, description="Micro-batches that a step is computed in, one after the other."
    )
    seed: int = Field(
        0, ge=0, lt=2**64, description="Of the initialisation and of the order of rows."
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute dtype.")
    attention: str = Field(
        "auto", description="Kernel: auto takes the fastest that suits model and device; reference."
    )
    loss_chunk_tokens: int = Field(
        1024, ge=1, description="Tokens whose logits exist at once in the loss."
    )
    remat: Remat = Field(
        "full",
        description="What of a pair of layers the backward computes again: none; all but the "
        "linear layers' and the attention's outputs (dots); all but the attention's (attention); "
        "full.",
    )
    unroll_layers: bool | None = Field(
        None,
        description="Layer after layer instead of a loop over them: faster steps, slower to "
        "compile. None: on a GPU.",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Of an average of the parameters, which is then what is evaluated and "
        "exported; less in the first steps.",
    )
    spike_factor: float | None = Field(
        10.0,
        gt=1,
        description="A step whose gradient norm exceeds the running median by this is skipped; "
        "none skips only what is not finite.",
    )
    max_bad_steps: int = Field(
        5, ge=1, description="So many skipped steps in a row end the run with an error."
    )
    mesh: MeshConfig = MeshConfig()
    eval_store: str | None = Field(None, description="Store with held-out tokens.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0 for the end only.")
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    on_failed_save: Literal["continue", "stop"] = Field(
        "continue",
        description="What follows when a checkpoint cannot be written, as on a full disk: continue "
        "says so and tries again at the next, stop ends the run. Older ones stay.",
    )
    log_every: int = Field(10, ge=1)
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (), description="Where records go besides JSON lines and TensorBoard."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_sequences % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_sequences, but {self.accumulate} does not divide "
                f"{self.batch_sequences}; choose another of either"
            )
        if self.targets is None and self.routing.is_on:
            raise ValueError(
                "routing chooses between stored targets and labels, but targets is none; name the "
                "targets or leave routing out"
            )
        self.optimizer.schedule.check("optimizer.schedule", self.steps)
        self.alpha_schedule.check("alpha_schedule", self.steps)
        return self


class CompileConfig(Document):
    """Compile the training step for a TPU pod, on any machine: `retort compile`."""

    model: str = Field(
        "gemma2-2.6b", description="Preset name, or a YAML or JSON file of a ModelConfig."
    )
    topology: str = Field(
        "v5e:16x16",
        description="A slice's generation and shape: v5e:16x16, v4:8x16x32, v5p:8x24x32, …",
    )
    slices: int = Field(1, ge=1, description="Slices, joined by the data centre's network.")
    mesh: MeshConfig = MeshConfig()
    teacher: bool = Field(
        False,
        description="The teacher's step instead, on one chip, or on the mesh.model that share it.",
    )
    sequences_per_group: int = Field(
        1, ge=1, description="Sequences of each chip, or of each group of mesh.model chips."
    )
    sequence_tokens: int = Field(
        DEFAULT_SEQUENCE_TOKENS, ge=2, description="L, tokens per packed sequence."
    )
    slots_per_token: int = Field(18, ge=1, description="Entry slots of the stored targets.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute dtype.")
    remat: Remat = Field("full", description="What the backward recomputes, as in `retort train`.")
    attention: str = Field("auto", description="Kernel, as in `retort train`.")
    loss_chunk_tokens: int = Field(
        1024, ge=1, description="Tokens whose logits exist at once in the loss."
    )


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
    """A student as a Hugging Face folder, or a store's targets as Parquet: `retort export`."""

    run: Path | None = Field(
        None, description="The `out` folder of a training run, whose student is exported."
    )
    store: str | None = Field(None, description="A store, whose targets are exported.")
    out: Path = Field(
        description="Folder to create: for transformers, or of Parquet files; or one file."
    )
    step: int | None = Field(
        None, ge=0, description="Of a run: the checkpointed step; default: the newest."
    )
    averaged: bool = Field(
        True, description="Of a run with ema_decay: the average, not the last parameters."
    )
    targets: str = Field("default", description="Of a store: the name of the set of targets.")
    rows: str | None = Field(
        None,
        description="Of a store: sequences such as 0:16 or 3,7,100: into one file, which `out` "
        "then is; they may be of a store that is still being written.",
    )
    to: Literal["parquet", "jsonl"] = Field(
        "parquet", description="Of a store: the kind of file; jsonl is one file of all rows."
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.store is None and (self.rows is not None or self.to != "parquet"):
            raise ValueError("rows and to are of a store, and a run has none")
        if (self.run is None) == (self.store is None):
            raise ValueError("exactly one of run and store must be given")
        if self.run is None and self.step is not None:
            raise ValueError("step is of a run, and a store has none")
        return self


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


def _count(value: Any) -> int:
    """A whole number that may be written 2e12: YAML and flags give that as text or as a float."""
    try:
        exact = Decimal(str(value))
        is_count = 1 <= exact <= MAX_TOKENS and exact == int(exact)
    except InvalidOperation:
        is_count = False
    if not is_count:
        raise ValueError(
            f"must be a whole number from 1 to {MAX_TOKENS:.0e}; write for instance 2e12 or 500e9"
        )
    return int(exact)


def _not_negative(value: Any) -> Any:
    if isinstance(value, int | float | str):
        try:
            negative = float(value) < 0
        except ValueError:
            return value  # no number at all: the field's own type says so
        if negative:
            raise ValueError("must be at least 0; give an amount without a sign")
    return value


Count = Annotated[int, BeforeValidator(_count)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_not_negative)]


class PlanConfig(Document):
    """What a store and its teacher will cost, before anything is run: `retort plan`."""

    tokens: Count = Field(
        ge=1, le=MAX_TOKENS, description="Tokens of the corpus, for instance 2e12 or 500e9."
    )
    entries: int = Field(
        SamplerConfig().entries_per_token, ge=1, description="Mean entries per token."
    )
    teacher: str = Field(
        "gemma2-27b", description="Preset name, or a YAML or JSON file of a ModelConfig."
    )
    sequence_tokens: int = Field(
        DEFAULT_SEQUENCE_TOKENS, ge=2, description="L, tokens per packed sequence."
    )
    shard_sequences: int = Field(DEFAULT_SHARD_SEQUENCES, ge=1, description="Sequences per shard.")
    bytes_per_token: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Stored bytes of one token, such as `retort inspect` gives for a first part "
        "of the store; default: measured on a small study.",
    )
    accelerator: str = Field("h200", description=f"The teacher's: {', '.join(ACCELERATORS)}.")
    share_of_peak: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Model FLOP/s of the teacher over the accelerator's peak; default: measured on "
        "an H200.",
    )
    price_per_chip_hour: Price | None = Field(None, description="Dollars.")
    student: str = Field(
        "gemma2-2.6b", description="The model that reads the store in training: preset or file."
    )
    student_accelerator: str = Field("v5e", description="The student's.")
    student_chips: int = Field(512, ge=1)
    student_share_of_peak: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Model FLOP/s of the training step over peak; default: measured on an H200.",
    )
    train_tokens_per_second: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Rate of the training run, in place of a student and its chips.",
    )
    price_per_gb_month: Price = Field(
        0.02, description="Dollars for keeping 10^9 bytes for a month."
    )

    @field_validator("accelerator", "student_accelerator")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ACCELERATORS:
            raise ValueError(
                f"must be one of {', '.join(ACCELERATORS)}; for another chip name one of these and "
                "the share of its peak that yours reaches"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        student = sorted(name for name in self.model_fields_set if name.startswith("student"))
        if self.train_tokens_per_second is not None and student:
            raise ValueError(
                "train_tokens_per_second stands in place of a student and its chips, but "
                f"{', '.join(student)} is given too; leave out one or the other"
            )
        return self
