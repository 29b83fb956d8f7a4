"""What each verb of the command line does: arguments in, something printed, an exit status out."""

import json
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg
from rich.console import Console, Group, RenderableType

from logit_store import chosen_rows, manifests, parquet, storage
from logit_store.inspect import terminal, terminal_compare
from logit_store.inspect.web import server
from logit_store.ledger import Ledger
from logit_store.repair import repair as repair_store
from logit_store.verify import sound_manifests
from logit_store.verify import verify as verify_store
from pipelines import (
    audit_view,
    compile_view,
    plan_view,
    progress,
    runner,
    serving,
    student,
    train_view,
    training,
)
from pipelines import compile as compiling
from pipelines import dump as dump_pipeline
from pipelines import plan as planning
from pipelines import quickstart as quickstart_run
from pipelines import tokenize as tokenize_pipeline
from schemas.base import Document
from schemas.errors import ConfigError, CorruptStoreError, StoreNotFoundError
from schemas.runs import (
    CompileConfig,
    DumpConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    QuickstartConfig,
    TokenizeConfig,
    TrainConfig,
)
from teacher_dump.tokenizer import Tokenizer

EXIT_PROBLEMS = 1


class _OutputArguments(Document):
    json_output: bool = Field(False, alias="json", description="Print JSON.")


class _StoreArguments(_OutputArguments):
    store: CliPositionalArg[str] = Field(description="Store: a folder, gs://… or s3://….")


class PlanArguments(PlanConfig, _OutputArguments):
    """What a store and its teacher will cost, before anything is run: `retort plan`."""


class TrainArguments(TrainConfig, _OutputArguments):
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

    def config(self) -> TrainConfig:
        """The run, without how it was asked for."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})


class CompileArguments(CompileConfig, _OutputArguments):
    """Compile the training step for a TPU pod, on any machine: `retort compile`."""


class InspectArguments(_StoreArguments):
    """What a store is, how complete, and what it costs: `retort inspect STORE`."""


class VerifyArguments(_StoreArguments):
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


class RepairArguments(_StoreArguments):
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


class StatsArguments(_StoreArguments):
    """Distributions of a set of targets: `retort stats STORE`."""

    targets: str = Field("default", description="Name of the set of targets.")
    max_sequences: int = Field(1024, ge=1, description="Rows that are read, evenly spread.")


class ShowArguments(_StoreArguments):
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


class ExportArguments(ExportConfig, _OutputArguments):
    """A student as a Hugging Face folder, or a store's targets as files: `retort export`."""


class DiffArguments(_OutputArguments):
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


def quickstart(config: QuickstartConfig, console: Console) -> int:
    quickstart_run.quickstart(config, console)
    return 0


class TokenizeArguments(TokenizeConfig, runner.Engine):
    """Corpus to packed sequences: `retort tokenize`."""


class DumpArguments(DumpConfig, runner.Engine):
    """Teacher targets for a store's tokens: `retort dump`."""


Part = TypeVar("Part", bound=Document)


def _part(arguments: Document, kind: type[Part]) -> Part:
    """Of a verb's arguments those of one document."""
    return kind(**{name: getattr(arguments, name) for name in kind.model_fields})


def tokenize(arguments: TokenizeArguments, console: Console, beam_options: list[str] | None) -> int:
    options = _part(arguments, runner.Engine).options(beam_options)
    config = _part(arguments, TokenizeConfig)
    console.print(tokenize_pipeline.tokenize(config, console, options))
    return 0


def dump(arguments: DumpArguments, console: Console, beam_options: list[str] | None) -> int:
    options = _part(arguments, runner.Engine).options(beam_options)
    console.print(dump_pipeline.dump(_part(arguments, DumpConfig), console, options))
    return 0


def train(arguments: TrainArguments, console: Console) -> int:
    config = arguments.config()
    if arguments.dry_run:
        found = training.dry_run(config)
        data = found.model_dump(mode="json")
        return _output(console, arguments, data, lambda: train_view.view(found, config))
    result = training.train(config, console)
    if result.evaluation is not None:
        console.print(_quality(result.evaluation))
    console.print(f"model: {result.export}")
    return 0


def evaluate(config: EvalConfig, console: Console) -> int:
    console.print(_quality(training.evaluate(config, console)))
    return 0


def export(arguments: ExportArguments, console: Console) -> int:
    config = _part(arguments, ExportConfig)
    if config.store is not None and (config.rows is not None or config.to != "parquet"):
        with progress.bar(Console(stderr=True), "export", None, "sequences") as advance:
            rows = chosen_rows.export(
                config.store, config.targets, config.rows, config.out, config.to, advance
            )
        data = {"store": config.store, "targets": config.targets, "sequences": rows, "files": 1}
        text = f"targets '{config.targets}': {rows:,} sequences, {config.out}"
        return _output(console, arguments, data | {"out": str(config.out)}, lambda: text)
    if config.store is not None:
        total = manifests.read_manifest(config.store, config.targets).num_shards
        with progress.bar(Console(stderr=True), "export", total, "shards") as advance:
            files, rows = parquet.export(config.store, config.targets, config.out, advance)
        data = {"store": config.store, "targets": config.targets, "sequences": rows, "files": files}
        text = f"targets '{config.targets}': {rows:,} sequences in {files} files, {config.out}"
        return _output(console, arguments, data | {"out": str(config.out)}, lambda: text)
    step = training.export(config)
    data = {"run": str(config.run), "step": step, "out": str(config.out)}
    return _output(console, arguments, data, lambda: f"model of step {step}: {config.out}")


def plan(arguments: PlanArguments, console: Console) -> int:
    found = planning.plan(arguments)
    return _output(console, arguments, found.as_dict(), lambda: plan_view.view(found))


def compile_step(arguments: CompileArguments, console: Console) -> int:
    found = compiling.compile_step(arguments)
    _output(console, arguments, found.as_dict(), lambda: compile_view.view(found))
    return 0 if found.memory.fits else EXIT_PROBLEMS


def inspect(arguments: InspectArguments, console: Console) -> int:
    data = terminal.inspect_data(arguments.store)
    return _output(console, arguments, data, lambda: terminal.inspect_view(data))


def show(arguments: ShowArguments, console: Console) -> int:
    data = terminal.show_data(
        arguments.store,
        arguments.targets,
        arguments.sequence,
        arguments.position,
        arguments.count,
        _tokenizer(arguments).piece_text,
    )
    return _output(console, arguments, data, lambda: terminal.show_view(data))


def stats(arguments: StatsArguments, console: Console) -> int:
    data = terminal.stats_data(arguments.store, arguments.targets, arguments.max_sequences)
    return _output(console, arguments, data, lambda: terminal.stats_view(data))


def diff(arguments: DiffArguments, console: Console) -> int:
    left, right = arguments.stores[0], arguments.stores[-1]
    data = terminal_compare.diff_data(
        (left, arguments.targets), (right, arguments.other_targets), arguments.max_sequences
    )
    return _output(console, arguments, data, lambda: terminal_compare.diff_view(data))


def serve(arguments: ServeArguments, console: Console) -> int:
    model = None
    if arguments.student is not None:
        model = student.load(arguments.student, arguments.stores[0])
    stores = serving.open_stores(arguments.stores, arguments.tokenizer, model)
    server.serve(
        stores,
        arguments.host,
        arguments.port,
        arguments.token,
        arguments.names,
        lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True),
    )
    return 0


def verify(arguments: VerifyArguments, console: Console) -> int:
    total = _total_shards(arguments.store)
    # The bar goes to stderr, so that --json and pipes get the result alone.
    with progress.bar(Console(stderr=True), "verify", total, "shards") as advance:
        report = verify_store(arguments.store, advance, arguments.workers)
    data = terminal.verify_data(arguments.store, report)
    view = terminal.verify_view(arguments.store, report)
    if arguments.teacher is None or not report.ok:
        # What is damaged is to be mended before a teacher can be asked about it.
        _output(console, arguments, data, lambda: view)
        return 0 if report.ok else EXIT_PROBLEMS
    found = dump_pipeline.audit_targets(
        arguments.store,
        arguments.targets,
        arguments.teacher,
        rows=arguments.rows,
        seed=arguments.seed,
        model_devices=arguments.model_devices,
    )
    data |= {"ok": found.ok, "audit": found.as_dict()}
    _output(console, arguments, data, lambda: Group(view, audit_view.view(found)))
    return 0 if found.ok else EXIT_PROBLEMS


def repair(arguments: RepairArguments, console: Console) -> int:
    url, errors = arguments.store, Console(stderr=True)
    with progress.bar(errors, "verify", _total_shards(url), "shards") as advance:
        report, outcome = repair_store(url, arguments.apply, advance)
    written = [] if arguments.teacher is None else _dump_missing(url, arguments.teacher, errors)
    after = None
    if arguments.apply and (written or not report.ok):
        # That a store is whole again is not promised but looked at.
        with progress.bar(errors, "verify again", _total_shards(url), "shards") as advance:
            after = verify_store(url, advance)
    data = terminal.repair_data(url, report, outcome, after, written)
    _output(console, arguments, data, lambda: terminal.repair_view(data, report))
    return 0 if data["ok"] else EXIT_PROBLEMS


def _dump_missing(url: str, teacher: Path, console: Console) -> list[str]:
    """Compute what is missing of the store's targets; the names of the sets that were."""
    tokens = manifests.read_manifest(url, None)
    if Ledger(url, None, tokens).pending():
        # Targets are of tokens; what is to be done about those is printed.
        return []
    found = []
    for name in manifests.list_targets(url):
        if Ledger(url, name, manifests.read_manifest(url, name)).pending():
            console.print(dump_pipeline.dump_missing(url, name, teacher, console))
            found.append(name)
    return found


def _total_shards(url: str) -> int | None:
    """How many shards a verification goes through, or None if a manifest and its copy are damaged.

    Raises StoreNotFoundError if there is nothing, and FormatVersionError for another version.
    """
    total = 0
    for name in (None, *manifests.list_targets(url)):
        found, _ = sound_manifests(url, name)
        if found:
            total += next(iter(found.values())).num_shards
            continue
        try:
            manifests.read_manifest(url, name)
        except CorruptStoreError:
            return None
        except StoreNotFoundError:
            if not storage.list_keys(storage.open_kvstore(url)):
                raise
            return None
    return total


def _output(console: Console, arguments: _OutputArguments, data: dict[str, Any], view: Any) -> int:
    if arguments.json_output:
        print(json.dumps(data))
        return 0
    rendered: RenderableType = view()
    console.print(rendered)
    return 0


def _tokenizer(arguments: ShowArguments) -> Tokenizer:
    """The tokenizer that made the store. Raises ConfigError if it is another or not found."""
    tokenizer = serving.find_tokenizer(arguments.store, arguments.tokenizer)
    if tokenizer is None:
        where = "remote stores are not searched for it"
        if "://" not in arguments.store:
            where = f"there is no {training.TOKENIZER_FILE} beside {arguments.store}"
        raise ConfigError(
            f"To show text, the store's tokenizer is needed, but {where}; give --tokenizer FILE."
        )
    return tokenizer


def _quality(evaluation: Any) -> str:
    text = f"held out: {evaluation.nats_per_token:.4f} nats per token"
    if evaluation.bits_per_byte is not None:
        text += f", {evaluation.bits_per_byte:.4f} bits per byte"
    return f"{text} over {evaluation.tokens:,} tokens"
