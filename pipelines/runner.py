"""Which Beam runner runs, named explicitly, and the one shape in which work is handed to it.

Every pipeline here is `Create(specs) | Reshuffle | ParDo(work)`: one chain, one leaf, whose
elements are names of work and never data. That shape gives the same bytes on every runner that was
tried; others lose elements on some. Results go to the store, not through Beam.
"""

import logging
import re
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
)
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from schemas import errors
from schemas.base import Document

# Beam logs each failed bundle with its traceback; the same text comes back as the exception.
logging.getLogger("apache_beam").setLevel(logging.CRITICAL)

_REFUSED_RUNNERS = {
    "DirectRunner": "it may download and start another runner; leave --runner out for FnApiRunner",
    "SwitchingDirectRunner": "it may download and start another runner; leave --runner out",
    "PrismRunner": "it downloads a binary at run time; leave --runner out for FnApiRunner",
}


def parse_options(arguments: Sequence[str]) -> PipelineOptions:
    """Ordinary Beam options, checked. Raises ConfigError for a runner or mode that loses data."""
    options = PipelineOptions(list(arguments))
    runner = options.view_as(StandardOptions).runner
    if runner in _REFUSED_RUNNERS:
        raise errors.ConfigError(
            f"The Beam runner must be one that is named exactly; {runner} is refused because "
            f"{_REFUSED_RUNNERS[runner]}."
        )
    mode = options.view_as(DirectOptions).direct_running_mode
    if mode == "multi_threading":
        raise errors.ConfigError(
            "direct_running_mode must be in_memory or multi_processing; multi_threading is refused "
            "because it returned corrupted data in every measured run."
        )
    return options


def run(
    specs: Sequence[Document], work: beam.DoFn, label: str, options: PipelineOptions | None = None
) -> None:
    """Hand every spec to `work` once or more; return when all are done.

    Without options the runner is FnApiRunner in this process. A foreseeable error (a RetortError)
    of a worker is raised again here as itself, whatever the runner wrapped it in.
    """
    if not specs:
        return
    options = options or PipelineOptions([])
    # DoFns live in installed modules, so nothing of __main__ has to travel.
    options.view_as(SetupOptions).save_main_session = False
    named = options.view_as(StandardOptions).runner
    runner = FnApiRunner() if named in (None, "FnApiRunner") else named
    try:
        with beam.Pipeline(runner=runner, options=options) as pipeline:
            _ = (
                pipeline
                | "Specs" >> beam.Create([spec.canonical_json() for spec in specs])
                | "Spread" >> beam.Reshuffle()
                | label >> beam.ParDo(work)
            )
    except errors.RetortError:
        raise
    except Exception as error:
        if "KeyboardInterrupt" in str(error).strip().rsplit("\n", 1)[-1]:
            raise KeyboardInterrupt from error
        foreseen = _foreseen(str(error))
        if foreseen is None:
            raise
        raise foreseen from error


def _foreseen(text: str) -> errors.RetortError | None:
    """The RetortError inside a runner's traceback text, or None if the failure was another."""
    found = re.search(r"schemas\.errors\.(\w+): (.*?)(?: \[while running|\n|$)", text)
    if found is None:
        return None
    kind = getattr(errors, found[1], None)
    if not (isinstance(kind, type) and issubclass(kind, errors.RetortError)):
        return None
    return kind(found[2].strip().strip("'\""))
