"""What each verb of the command line does: arguments in, something printed, an exit status out.

A verb imports what it runs when it runs: Beam, JAX and the trainer take seconds, which `inspect`,
`--help` and a mistake in a flag need not wait for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, Group, RenderableType

from pipelines.arguments import (
    CompileArguments,
    DiffArguments,
    DumpArguments,
    Engine,
    ExportArguments,
    InspectArguments,
    OutputArguments,
    PlanArguments,
    RepairArguments,
    ServeArguments,
    ShowArguments,
    StatsArguments,
    TokenizeArguments,
    TrainArguments,
    VerifyArguments,
)
from schemas.base import Document
from schemas.errors import ConfigError, CorruptStoreError, StoreNotFoundError
from schemas.model import TOKENIZER_FILE
from schemas.runs import (
    DumpConfig,
    EvalConfig,
    ExportConfig,
    QuickstartConfig,
    TokenizeConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from student_train.evaluate import Evaluation
    from teacher_dump.tokenizer import Tokenizer

EXIT_PROBLEMS = 1


def quickstart(config: QuickstartConfig, console: Console) -> int:
    from pipelines import quickstart as run

    run.quickstart(config, console)
    return 0


Part = TypeVar("Part", bound=Document)


def _part(arguments: Document, kind: type[Part]) -> Part:
    """Of a verb's arguments those of one document."""
    return kind(**{name: getattr(arguments, name) for name in kind.model_fields})


def tokenize(arguments: TokenizeArguments, console: Console, beam_options: list[str] | None) -> int:
    from pipelines import runner
    from pipelines import tokenize as run

    options = runner.options_of(_part(arguments, Engine), beam_options)
    console.print(run.tokenize(_part(arguments, TokenizeConfig), console, options))
    return 0


def dump(arguments: DumpArguments, console: Console, beam_options: list[str] | None) -> int:
    from pipelines import dump as run
    from pipelines import runner

    options = runner.options_of(_part(arguments, Engine), beam_options)
    console.print(run.dump(_part(arguments, DumpConfig), console, options))
    return 0


def train(arguments: TrainArguments, console: Console) -> int:
    from pipelines import train_view, training

    config = _part(arguments, TrainConfig)
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
    from pipelines import training

    console.print(_quality(training.evaluate(config, console)))
    return 0


def export(arguments: ExportArguments, console: Console) -> int:
    config = _part(arguments, ExportConfig)
    if config.store is None:
        from pipelines import training

        step = training.export(config)
        data = {"run": str(config.run), "step": step, "out": str(config.out)}
        return _output(console, arguments, data, lambda: f"model of step {step}: {config.out}")
    return _export_targets(arguments, config, config.store, console)


def _export_targets(
    arguments: ExportArguments, config: ExportConfig, store: str, console: Console
) -> int:
    from logit_store import chosen_rows, manifests, parquet
    from pipelines import progress

    if config.rows is not None or config.to != "parquet":
        with progress.bar(Console(stderr=True), "export", None, "sequences") as advance:
            rows = chosen_rows.export(
                store, config.targets, config.rows, config.out, config.to, advance
            )
        files, where = 1, ""
    else:
        total = manifests.read_manifest(store, config.targets).num_shards
        with progress.bar(Console(stderr=True), "export", total, "shards") as advance:
            files, rows = parquet.export(store, config.targets, config.out, advance)
        where = f" in {files} files"
    data = {"store": store, "targets": config.targets, "sequences": rows, "files": files}
    text = f"targets '{config.targets}': {rows:,} sequences{where}, {config.out}"
    return _output(console, arguments, data | {"out": str(config.out)}, lambda: text)


def plan(arguments: PlanArguments, console: Console) -> int:
    from pipelines import plan as run
    from pipelines import plan_view

    found = run.plan(arguments)
    return _output(console, arguments, found.as_dict(), lambda: plan_view.view(found))


def compile_step(arguments: CompileArguments, console: Console) -> int:
    from pipelines import compile as run
    from pipelines import compile_view

    found = run.compile_step(arguments)
    _output(console, arguments, found.as_dict(), lambda: compile_view.view(found))
    return 0 if found.memory.fits else EXIT_PROBLEMS


def inspect(arguments: InspectArguments, console: Console) -> int:
    from logit_store.inspect import terminal

    data = terminal.inspect_data(arguments.store)
    return _output(console, arguments, data, lambda: terminal.inspect_view(data))


def show(arguments: ShowArguments, console: Console) -> int:
    from logit_store.inspect import terminal

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
    from logit_store.inspect import terminal

    data = terminal.stats_data(arguments.store, arguments.targets, arguments.max_sequences)
    return _output(console, arguments, data, lambda: terminal.stats_view(data))


def diff(arguments: DiffArguments, console: Console) -> int:
    from logit_store.inspect import terminal_compare

    left, right = arguments.stores[0], arguments.stores[-1]
    data = terminal_compare.diff_data(
        (left, arguments.targets), (right, arguments.other_targets), arguments.max_sequences
    )
    return _output(console, arguments, data, lambda: terminal_compare.diff_view(data))


def serve(arguments: ServeArguments, console: Console) -> int:
    from logit_store.inspect.web import server
    from pipelines import serving

    model = None
    if arguments.student is not None:
        from pipelines import student

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
    from logit_store.inspect import terminal
    from logit_store.verify import verify as run
    from pipelines import progress

    total = _total_shards(arguments.store)
    # The bar goes to stderr, so that --json and pipes get the result alone.
    with progress.bar(Console(stderr=True), "verify", total, "shards") as advance:
        report = run(arguments.store, advance, arguments.workers)
    data = terminal.verify_data(arguments.store, report)
    view = terminal.verify_view(arguments.store, report)
    if arguments.teacher is None or not report.ok:
        # What is damaged is to be mended before a teacher can be asked about it.
        _output(console, arguments, data, lambda: view)
        return 0 if report.ok else EXIT_PROBLEMS
    from pipelines import audit_view
    from pipelines.dump import audit_targets

    found = audit_targets(
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
    from logit_store.inspect import terminal
    from logit_store.repair import repair as run
    from logit_store.verify import verify
    from pipelines import progress

    url, errors = arguments.store, Console(stderr=True)
    with progress.bar(errors, "verify", _total_shards(url), "shards") as advance:
        report, outcome = run(url, arguments.apply, advance)
    written = [] if arguments.teacher is None else _dump_missing(url, arguments.teacher, errors)
    after = None
    if arguments.apply and (written or not report.ok):
        # That a store is whole again is not promised but looked at.
        with progress.bar(errors, "verify again", _total_shards(url), "shards") as advance:
            after = verify(url, advance)
    data = terminal.repair_data(url, report, outcome, after, written)
    _output(console, arguments, data, lambda: terminal.repair_view(data, report))
    return 0 if data["ok"] else EXIT_PROBLEMS


def _dump_missing(url: str, teacher: Path, console: Console) -> list[str]:
    """Compute what is missing of the store's targets; the names of the sets that were."""
    from logit_store import manifests
    from logit_store.ledger import Ledger
    from pipelines.dump import dump_missing

    tokens = manifests.read_manifest(url, None)
    if Ledger(url, None, tokens).pending():
        # Targets are of tokens; what is to be done about those is printed.
        return []
    found = []
    for name in manifests.list_targets(url):
        if Ledger(url, name, manifests.read_manifest(url, name)).pending():
            console.print(dump_missing(url, name, teacher, console))
            found.append(name)
    return found


def _total_shards(url: str) -> int | None:
    """How many shards a verification goes through, or None if a manifest and its copy are damaged.

    Raises StoreNotFoundError if there is nothing, and FormatVersionError for another version.
    """
    from logit_store import manifests, storage
    from logit_store.verify import sound_manifests

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


def _output(
    console: Console,
    arguments: OutputArguments,
    data: dict[str, Any],
    view: Callable[[], RenderableType],
) -> int:
    if arguments.json_output:
        print(json.dumps(data))
        return 0
    console.print(view())
    return 0


def _tokenizer(arguments: ShowArguments) -> "Tokenizer":
    """The tokenizer that made the store. Raises ConfigError if it is another or not found."""
    from pipelines import serving

    tokenizer = serving.find_tokenizer(arguments.store, arguments.tokenizer)
    if tokenizer is None:
        where = "remote stores are not searched for it"
        if "://" not in arguments.store:
            where = f"there is no {TOKENIZER_FILE} beside {arguments.store}"
        raise ConfigError(
            f"To show text, the store's tokenizer is needed, but {where}; give --tokenizer FILE."
        )
    return tokenizer


def _quality(evaluation: "Evaluation") -> str:
    text = f"held out: {evaluation.nats_per_token:.4f} nats per token"
    if evaluation.bits_per_byte is not None:
        text += f", {evaluation.bits_per_byte:.4f} bits per byte"
    return f"{text} over {evaluation.tokens:,} tokens"
