"""The command `retort`: one verb for each thing that a person wants.

Each verb is a typed document (its flags, its `--help`, its YAML file) and a function. A foreseeable
error is printed as one sentence and exits with 2; Ctrl-C exits with 130 and loses nothing.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from rich.console import Console

from pipelines import arguments, verbs
from schemas.base import Document, load_yaml
from schemas.errors import ConfigError, RetortError
from schemas.runs import EvalConfig, QuickstartConfig

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_CONTINUES = "interrupted; what was committed is kept, and the same command continues."
_ONLY_READS = "interrupted; nothing was changed."
_SERVED = "ended; the stores are as they were."


@dataclass(frozen=True)
class Verb:
    """One subcommand: its flags, what it runs, and whether Beam options may follow `--`.

    `on_interrupt` is what is said after Ctrl-C.
    """

    arguments: type[Document]
    run: Callable[..., int]
    beam_options: bool = False
    on_interrupt: str = _CONTINUES


VERBS: dict[str, Verb] = {
    "quickstart": Verb(QuickstartConfig, verbs.quickstart),
    "tokenize": Verb(arguments.TokenizeArguments, verbs.tokenize, beam_options=True),
    "dump": Verb(arguments.DumpArguments, verbs.dump, beam_options=True),
    "inspect": Verb(arguments.InspectArguments, verbs.inspect, on_interrupt=_ONLY_READS),
    "show": Verb(arguments.ShowArguments, verbs.show, on_interrupt=_ONLY_READS),
    "verify": Verb(arguments.VerifyArguments, verbs.verify, on_interrupt=_ONLY_READS),
    "repair": Verb(arguments.RepairArguments, verbs.repair),
    "diff": Verb(arguments.DiffArguments, verbs.diff, on_interrupt=_ONLY_READS),
    "serve": Verb(arguments.ServeArguments, verbs.serve, on_interrupt=_SERVED),
    "stats": Verb(arguments.StatsArguments, verbs.stats, on_interrupt=_ONLY_READS),
    "train": Verb(arguments.TrainArguments, verbs.train),
    "eval": Verb(EvalConfig, verbs.evaluate, on_interrupt=_ONLY_READS),
    "export": Verb(arguments.ExportArguments, verbs.export),
    "compile": Verb(arguments.CompileArguments, verbs.compile_step, on_interrupt=_ONLY_READS),
    "plan": Verb(arguments.PlanArguments, verbs.plan, on_interrupt=_ONLY_READS),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else EXIT_ERROR
    name, *rest = words
    if name not in VERBS:
        print(
            f"retort: the verb must be one of {', '.join(VERBS)}, but it is '{name}'; "
            "see `retort --help`.",
            file=sys.stderr,
        )
        return EXIT_ERROR
    verb = VERBS[name]
    try:
        rest, beam_options = _split_beam_options(name, verb, rest)
        config = parse(name, verb.arguments, rest)
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        extra = {"beam_options": beam_options} if verb.beam_options else {}
        return verb.run(config, console, **extra)
    except RetortError as error:
        print(f"retort {name}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"\nretort {name}: {verb.on_interrupt}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away: nothing is wrong with the run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def parse(name: str, kind: type[Document], flags: Sequence[str]) -> Any:
    """Defaults, then the YAML file of `--config`, then flags; checked as one document.

    Raises ConfigError for a broken rule; exits through argparse on an unknown flag or `--help`.
    """
    flags, file = _take_config_file(list(flags))
    settings = type(
        kind.__name__,
        (BaseSettings, kind),
        {
            "__doc__": f"{kind.__doc__} `--config FILE` reads fields from YAML first.",
            "model_config": SettingsConfigDict(
                cli_prog_name=f"retort {name}",
                cli_enforce_required=False,
                cli_avoid_json=True,
                cli_hide_none_type=True,
                cli_parse_none_str="none",
                cli_implicit_flags=True,
            ),
        },
    )
    given = CliSettingsSource(settings, cli_parse_args=flags)()
    merged = _merge(load_yaml(file) if file else {}, given)
    return kind.parse(merged, file or "command line")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _take_config_file(flags: list[str]) -> tuple[list[str], str | None]:
    file = None
    rest = []
    items = iter(flags)
    for flag in items:
        if flag == "--config":
            file = next(items, None)
            if file is None:
                raise ConfigError("--config must be followed by a YAML file; name one.")
        elif flag.startswith("--config="):
            file = flag.removeprefix("--config=")
        else:
            rest.append(flag)
    return rest, file


def _split_beam_options(
    name: str, verb: Verb, flags: list[str]
) -> tuple[list[str], list[str] | None]:
    if "--" not in flags:
        return flags, None
    if not verb.beam_options:
        raise ConfigError(
            f"Options after `--` go to Beam, but `retort {name}` runs no pipeline of its own; "
            "leave them out."
        )
    at = flags.index("--")
    return flags[:at], flags[at + 1 :]


def _usage() -> str:
    lines = [
        "usage: retort VERB [flags]",
        "",
        "Distil language models from teacher targets that are computed once and stored.",
        "",
    ]
    for name, verb in VERBS.items():
        summary = (verb.arguments.__doc__ or "").strip().split("\n")[0].split(": `retort")[0]
        lines.append(f"  {name:<12}{summary.rstrip('.')}")
    lines += [
        "",
        "`retort VERB --help` lists every flag. `--config FILE` takes any of them from YAML;",
        "flags override the file. tokenize and dump pass what follows `--` to Beam.",
    ]
    return "\n".join(lines)


def entry() -> None:
    """The console command: `main`, and its status to the shell."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == EXIT_INTERRUPTED:
        # Threads of Beam and XLA that were cut off crash the interpreter's own way out. Nothing is
        # lost: all that is on disk was written whole.
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    entry()
