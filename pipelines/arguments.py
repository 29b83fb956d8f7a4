"""What each verb of the command line is told: its flags, its `--help` and its YAML file.

Imports nothing but the configs, so that help, mistakes in flags and small verbs come at once.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from schemas.base import Document
from schemas.runs import (
    CompileConfig,
    DumpConfig,
    ExportConfig,
    PlanConfig,
    TokenizeConfig,
    TrainConfig,
)


class Engine(Document):
    """Where a job's shards are written. The store has the same bytes whichever it is."""

    runner: Literal["memory", "processes", "dask"] = Field(
        "memory",
        description="This process, several of this machine, or a Dask cluster. Beam's own "
        "options after `--` name others.",
    )
    workers: int | None = Field(
        None, ge=1, description="Processes of the runner `processes`; default: one for each core."
    )
    scheduler: str | None = Field(
        None,
        description="Address of the Dask scheduler, as tcp://HOST:8786. Its workers must reach the "
        "store, the corpus and the teacher by the same names, and have this package installed.",
    )


class OutputArguments(Document):
    """Of verbs that can print JSON."""

    json_output: bool = Field(False, alias="json", description="Print JSON.")


class StoreArguments(OutputArguments):
    """Of verbs that look at one store."""

    store: CliPositionalArg[str] = Field(description="Store: a folder, gs://… or s3://….")


class PlanArguments(PlanConfig, OutputArguments):
    """What a store and its teacher will cost, before anything is run: `retort plan`."""


class TrainArguments(TrainConfig, OutputArguments):
    """One student (or a small teacher) on a store: `retort train`."""

    dry_run: bool = Field(
        False,
        alias="dry-run",
        description="Say what the run would be, after a few steps that leave nothing behind.",
    )

    @model_validator(mode="after")
    def _check_output(self) -> Self:
        if self.json_output and not self.dry_run:
            raise ValueError("json is of use with dry-run alone; give --dry-run too")
        return self


class CompileArguments(CompileConfig, OutputArguments):
    """Compile the training step for a TPU pod, on any machine: `retort compile`."""


class InspectArguments(StoreArguments):
    """What a store is, how complete, and what it costs: `retort inspect STORE`."""


class VerifyArguments(StoreArguments):
    """Check every byte of a store; exit status 1 if anything is wrong: `retort verify STORE`."""

    teacher: Path | None = Field(
        None,
        description="Also have this teacher compute a sample of rows again, and hold the stored "
        "targets against it.",
    )
    targets: str = Field("default", description="With teacher: name of the set of targets.")
    rows: int = Field(16, ge=1, description="With teacher: rows that are computed again.")
    seed: int = Field(0, ge=0, description="With teacher: of the choice of rows.")
    model_devices: int = Field(
        1, ge=1, description="With teacher: devices that share it; those of the dump."
    )
    workers: int | None = Field(
        None, ge=1, description="Threads that share the shards; default: one a processor."
    )


class RepairArguments(StoreArguments):
    """Mend a damaged store; exit status 1 if anything is left: `retort repair STORE`."""

    apply: bool = Field(False, description="Mend; without it the store is only read.")
    teacher: Path | None = Field(
        None,
        description="With --apply: the teacher of the targets, a Hugging Face folder, to compute "
        "their missing shards again.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.teacher is not None and not self.apply:
            raise ValueError("teacher is of use with apply alone; give --apply too")
        return self


class StatsArguments(StoreArguments):
    """Distributions of a set of targets: `retort stats STORE`."""

    targets: str = Field("default", description="Name of the set of targets.")
    max_sequences: int = Field(1024, ge=1, description="Rows that are read, evenly spread.")


class ShowArguments(StoreArguments):
    """One sequence's tokens with the teacher's candidates: `retort show STORE --sequence N`."""

    sequence: int = Field(0, ge=0, description="Row of the store.")
    position: int | None = Field(None, ge=0, description="First position to show.")
    count: int = Field(24, ge=1, description="Positions to show.")
    targets: str | None = Field(
        "default", description="Name of the set of targets; none shows tokens alone."
    )
    tokenizer: Path | None = Field(
        None, description="SentencePiece model; default: tokenizer.model beside the store."
    )


class ExportArguments(ExportConfig, OutputArguments):
    """A student as a Hugging Face folder, or a store's targets as files: `retort export`."""


class DiffArguments(OutputArguments):
    """Two sets of targets over the same tokens: `retort diff A [B]`."""

    stores: CliPositionalArg[tuple[str, ...]] = Field(
        min_length=1, max_length=2, description="Two stores, or one with two sets of targets."
    )
    targets: str = Field("default", description="The set of targets of the first store.")
    other_targets: str = Field(
        "default", alias="other-targets", description="The set of the other, or of the same, store."
    )
    max_sequences: int = Field(1024, ge=1, description="Rows that are read, evenly spread.")


class ServeArguments(Document):
    """Stores in a browser: `retort serve STORE…`."""

    stores: CliPositionalArg[tuple[str, ...]] = Field(
        min_length=1, description="Stores: folders, gs://… or s3://…."
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; any but this machine's own (loopback) needs a token.",
    )
    port: int = Field(8787, ge=0, le=65535, description="0 takes any that is free.")
    token: str | None = Field(
        None,
        min_length=8,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="What a browser must know; default: none on loopback, else a new one.",
    )
    names: tuple[str, ...] = Field(
        (), description="Host names, besides addresses, under which others reach this machine."
    )
    tokenizer: Path | None = Field(
        None, description="SentencePiece model; default: tokenizer.model beside each store."
    )
    student: Path | None = Field(
        None, description="An exported model, to compare with the targets of the first store."
    )


class TokenizeArguments(TokenizeConfig, Engine):
    """Corpus to packed sequences: `retort tokenize`."""


class DumpArguments(DumpConfig, Engine):
    """Teacher targets for a store's tokens: `retort dump`."""
