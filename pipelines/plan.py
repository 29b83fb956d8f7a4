"""What a store, its teacher and its reader will cost: arithmetic alone, nothing is run or read.

`docs/scale.md` has the formulas. Every figure that goes in is listed beside the result, with where
it comes from; what comes out is predicted.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gemma2 import flops, presets
from logit_store import sizes
from schemas.accelerators import ACCELERATORS
from schemas.errors import ConfigError
from schemas.model import ModelConfig
from schemas.runs import DEFAULT_SEQUENCE_TOKENS, PlanConfig

Kind = Literal["given", "measured", "datasheet", "assumed"]

SECONDS_PER_HOUR = 3600
_BFLOAT16_BYTES = 2
_GB = 10**9
_SHARD_FACTORS = (1, 4, 16)


@dataclass(frozen=True)
class MeasuredRate:
    """Model FLOP/s that one accelerator reached with one model at the default length, and how."""

    model: str
    accelerator: str
    flops_per_second: float
    how: str

    @property
    def peak_flops_per_second(self) -> float:
        return ACCELERATORS[self.accelerator].peak_flops_per_second

    @property
    def share_of_peak(self) -> float:
        return self.flops_per_second / self.peak_flops_per_second

    @property
    def source(self) -> str:
        return (
            f"{self.flops_per_second / 1e12:.0f} model TFLOP/s of "
            f"{self.peak_flops_per_second / 1e12:.1f}: {self.model} on one {self.accelerator}, "
            f"L = {DEFAULT_SEQUENCE_TOKENS}, bfloat16, {self.how}"
        )


_PEER = (
    "November 2026, not with this package but with transformers, FlashAttention-4, torch.compile"
)
TEACHER_FORWARD = MeasuredRate(
    "gemma2-27b",
    "h200",
    576e12,
    f"{_PEER}; with head and log-softmax, without sampling; matrix products alone reached 785",
)
STUDENT_STEP = MeasuredRate(
    "gemma2-2.6b", "h200", 486e12, f"{_PEER}; nothing recomputed, the fastest step seen"
)


@dataclass(frozen=True)
class Assumption:
    """One figure that goes in; `flag` overrides it, directly or by naming something else."""

    name: str
    value: float
    unit: str
    kind: Kind
    source: str
    flag: str | None


@dataclass(frozen=True)
class Part:
    """Arrays whose bytes were measured together."""

    arrays: tuple[str, ...]
    bytes_per_token: float
    bytes: float


@dataclass(frozen=True)
class Store:
    """Sizes; `bytes_per_token` is that of the arrays, `bytes` has the ledger too."""

    bytes_per_token: float
    parts: tuple[Part, ...]
    ledger_bytes: float
    bytes: float


@dataclass(frozen=True)
class ShardChoice:
    """What one number of sequences per shard leads to.

    `index_share` is how many bytes of shard indices are read with a row, over the row's own;
    `teacher_seconds` is what one chip takes for a shard.
    """

    shard_sequences: int
    shards: int
    objects: int
    shard_bytes: float
    id_bytes: float
    index_bytes: int
    index_share: float
    teacher_seconds: float


@dataclass(frozen=True)
class Teacher:
    """The teacher's work. `chips_for_weights` hold its weights, and say nothing of activations."""

    flops_per_token: flops.FlopsPerToken
    flops: float
    flops_per_second_per_chip: float
    chip_hours: float
    price: float | None
    weight_bytes: int
    chips_for_weights: int


@dataclass(frozen=True)
class Reader:
    """What a training run asks of the store; no shard index is cached."""

    tokens_per_second: float
    student_flops_per_token: float | None
    """Of a training step; None where the rate of the run is given."""
    sequences_per_second: float
    bytes_per_second: float
    index_bytes_per_second: float
    requests_per_second: float
    requests_per_pass: int
    seconds_per_pass: float


@dataclass(frozen=True)
class Plan:
    """Everything that `retort plan` says."""

    config: PlanConfig
    store: Store
    objects: sizes.Objects
    shard_choices: tuple[ShardChoice, ...]
    teacher: Teacher
    reader: Reader
    price_per_month: float
    assumptions: tuple[Assumption, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values; totals stand beside their parts."""
        data = asdict(self)
        data["config"] = self.config.model_dump(mode="json", include=set(PlanConfig.model_fields))
        data["objects"] |= {
            "while_written": self.objects.while_written,
            "complete": self.objects.complete,
        }
        data["teacher"]["flops_per_token"]["total"] = self.teacher.flops_per_token.total
        return data


def plan(config: PlanConfig) -> Plan:
    """Work everything out. Raises ConfigError for an unknown model or too many entries."""
    model = presets.resolve(config.teacher)
    if config.entries > model.vocab_size:
        raise ConfigError(
            f"entries must be at most the teacher's vocabulary, {model.vocab_size}, but it is "
            f"{config.entries}; give a smaller --entries."
        )
    teacher = _teacher(config, model)
    objects = _objects(config, config.shard_sequences)
    store = _store(config, objects)
    return Plan(
        config=config,
        store=store,
        objects=objects,
        shard_choices=tuple(
            _shard_choice(config, config.shard_sequences * factor, teacher)
            for factor in _SHARD_FACTORS
        ),
        teacher=teacher,
        reader=_reader(config, objects),
        price_per_month=store.bytes / _GB * config.price_per_gb_month,
        assumptions=_assumptions(config),
    )


def _bytes_per_token(config: PlanConfig) -> dict[tuple[str, ...], float]:
    """Of each part; a total that is given is split as the measured one."""
    measured = sizes.MEASURED.per_token(config.entries)
    total = sum(measured.values())
    factor = (config.bytes_per_token or total) / total
    return {arrays: size * factor for arrays, size in measured.items()}


def _objects(config: PlanConfig, shard_sequences: int) -> sizes.Objects:
    return sizes.count_objects(
        *sizes.planned_manifests(
            num_sequences=-(-config.tokens // config.sequence_tokens),
            sequence_tokens=config.sequence_tokens,
            shard_sequences=shard_sequences,
            slots_per_token=config.entries,
        )
    )


def _store(config: PlanConfig, objects: sizes.Objects) -> Store:
    parts = _bytes_per_token(config)
    per_token = sum(parts.values())
    ledger = objects.shards * sizes.MEASURED.ledger_bytes_per_shard
    return Store(
        bytes_per_token=per_token,
        parts=tuple(Part(arrays, size, size * config.tokens) for arrays, size in parts.items()),
        ledger_bytes=ledger,
        bytes=per_token * config.tokens + ledger,
    )


def _shard_choice(config: PlanConfig, shard_sequences: int, teacher: Teacher) -> ShardChoice:
    objects = _objects(config, shard_sequences)
    rows = min(shard_sequences, objects.sequences)
    tokens = rows * config.sequence_tokens
    parts = _bytes_per_token(config)
    per_token = sum(parts.values())
    index_bytes = sizes.shard_index_bytes(rows)
    return ShardChoice(
        shard_sequences=shard_sequences,
        shards=objects.shards,
        objects=objects.complete,
        shard_bytes=tokens * per_token,
        id_bytes=tokens * parts[("entry_bucket", "entry_offset")],
        index_bytes=index_bytes,
        index_share=objects.arrays * index_bytes / (config.sequence_tokens * per_token),
        teacher_seconds=tokens * teacher.flops_per_token.total / teacher.flops_per_second_per_chip,
    )


def _teacher(config: PlanConfig, model: ModelConfig) -> Teacher:
    accelerator = ACCELERATORS[config.accelerator]
    per_token = flops.forward_flops_per_token(model, config.sequence_tokens)
    total = config.tokens * per_token.total
    per_second = accelerator.peak_flops_per_second * _teacher_share(config)
    chip_hours = total / per_second / SECONDS_PER_HOUR
    price = config.price_per_chip_hour
    weight_bytes = flops.parameters(model).total * _BFLOAT16_BYTES
    return Teacher(
        flops_per_token=per_token,
        flops=total,
        flops_per_second_per_chip=per_second,
        chip_hours=chip_hours,
        price=None if price is None else chip_hours * price,
        weight_bytes=weight_bytes,
        chips_for_weights=-(-weight_bytes // accelerator.memory_bytes),
    )


def _reader(config: PlanConfig, objects: sizes.Objects) -> Reader:
    per_second, student_flops = _training_rate(config)
    sequences_per_second = per_second / config.sequence_tokens
    chunks_per_second = objects.arrays * sequences_per_second
    index_bytes = sizes.shard_index_bytes(min(config.shard_sequences, objects.sequences))
    return Reader(
        tokens_per_second=per_second,
        student_flops_per_token=student_flops,
        sequences_per_second=sequences_per_second,
        bytes_per_second=per_second * sum(_bytes_per_token(config).values()),
        index_bytes_per_second=chunks_per_second * index_bytes,
        requests_per_second=chunks_per_second * sizes.READS_PER_CHUNK,
        requests_per_pass=objects.sequences * objects.arrays * sizes.READS_PER_CHUNK,
        seconds_per_pass=config.tokens / per_second,
    )


def _training_rate(config: PlanConfig) -> tuple[float, float | None]:
    """Tokens per second of the training run, and FLOPs per token where they decide it."""
    if config.train_tokens_per_second is not None:
        return config.train_tokens_per_second, None
    student = presets.resolve(config.student)
    per_token = flops.training_flops_per_token(student, config.sequence_tokens)
    peak = ACCELERATORS[config.student_accelerator].peak_flops_per_second
    return config.student_chips * peak * _student_share(config) / per_token, per_token


def _teacher_share(config: PlanConfig) -> float:
    return config.share_of_peak or TEACHER_FORWARD.share_of_peak


def _student_share(config: PlanConfig) -> float:
    return config.student_share_of_peak or STUDENT_STEP.share_of_peak


def _assumptions(config: PlanConfig) -> tuple[Assumption, ...]:
    """All that goes in, in the order in which the result uses it."""

    def figure(
        field: str, name: str, value: float, unit: str, kind: Kind, source: str
    ) -> Assumption:
        is_given = field in config.model_fields_set and getattr(config, field) is not None
        return Assumption(
            name, value, unit, "given" if is_given else kind, "" if is_given else source, field
        )

    def share(
        field: str, name: str, value: float, rate: MeasuredRate, model: str, accelerator: str
    ) -> Assumption:
        measured = (rate.model, rate.accelerator, DEFAULT_SEQUENCE_TOKENS)
        if (model, accelerator, config.sequence_tokens) == measured:
            return figure(field, name, value, "", "measured", rate.source)
        return figure(
            field, name, value, "", "assumed", f"as was measured elsewhere: {rate.source}"
        )

    def datasheet(field: str, name: str, figure_name: str, unit: str) -> Assumption:
        chip = ACCELERATORS[getattr(config, field)]
        value = getattr(chip, figure_name)
        return Assumption(name, value, unit, "datasheet", chip.source, field)

    stored = sizes.MEASURED
    is_measured = math.isclose(config.entries, stored.entries_per_token, rel_tol=0.01)
    found = [
        figure(
            "bytes_per_token",
            "bytes per token",
            sum(_bytes_per_token(config).values()),
            "bytes",
            "measured" if is_measured else "assumed",
            stored.source
            if is_measured
            else f"in proportion to what was measured: {stored.source}",
        ),
        Assumption(
            "ledger per shard",
            stored.ledger_bytes_per_shard,
            "bytes",
            "measured",
            "a record of tokens and one of targets, encoded with made-up sums and sizes",
            None,
        ),
        datasheet("accelerator", "peak, teacher", "peak_flops_per_second", "FLOP/s"),
        datasheet("accelerator", "memory, teacher", "memory_bytes", "bytes"),
        share(
            "share_of_peak",
            "share of peak, teacher",
            _teacher_share(config),
            TEACHER_FORWARD,
            config.teacher,
            config.accelerator,
        ),
    ]
    if config.price_per_chip_hour is not None:
        price = config.price_per_chip_hour
        found.append(figure("price_per_chip_hour", "chip-hour", price, "dollars", "given", ""))
    if config.train_tokens_per_second is not None:
        rate = config.train_tokens_per_second
        found.append(
            figure("train_tokens_per_second", "training rate", rate, "tokens/s", "given", "")
        )
    else:
        found += [
            datasheet("student_accelerator", "peak, student", "peak_flops_per_second", "FLOP/s"),
            figure(
                "student_chips",
                "chips, student",
                config.student_chips,
                "",
                "assumed",
                "those that trained gemma2-2.6b (arXiv 2408.00118)",
            ),
            share(
                "student_share_of_peak",
                "share of peak, student",
                _student_share(config),
                STUDENT_STEP,
                config.student,
                config.student_accelerator,
            ),
        ]
    found += [
        Assumption(
            "reads per chunk",
            sizes.READS_PER_CHUNK,
            "",
            "measured",
            "TensorStore reads a shard's index, then the chunk",
            None,
        ),
        figure(
            "price_per_gb_month",
            "10^9 bytes for a month",
            config.price_per_gb_month,
            "dollars",
            "assumed",
            "list price of Google Cloud Storage, Standard, us-central1, noted 2026-11-25",
        ),
    ]
    return tuple(found)
