"""Which engine runs a job, named explicitly, and the one shape in which work is handed to it.

Every pipeline here is `Create(specs) | Reshuffle | ParDo(work)`: one chain, one leaf, whose
elements are names of work and never data. That shape gives the same bytes on every runner that was
tried; others lose elements on some. Results go to the store, not through Beam.
"""

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
from apache_beam.runners.portability.fn_api_runner.worker_handlers import (
    SubprocessSdkWorkerHandler,
    WorkerHandler,
)

from pipelines.arguments import Engine
from schemas import errors
from schemas.base import Document

# Beam logs each failed bundle with its traceback; the same text comes back as the exception.
logging.getLogger("apache_beam").setLevel(logging.CRITICAL)


def options_of(engine: Engine, beam_options: Sequence[str] | None = None) -> PipelineOptions:
    """Beam's options for an engine. Raises ConfigError for flags that do not go together."""
    wanted = engine.runner
    if beam_options:
        if engine != Engine():
            raise errors.ConfigError(
                "The engine must be named once, but there are --runner, --workers or "
                "--scheduler and also options after `--`; leave out either."
            )
        return parse_options(beam_options)
    for flag, value, runner in (
        ("workers", engine.workers, "processes"),
        ("scheduler", engine.scheduler, "dask"),
    ):
        if value is not None and wanted != runner:
            raise errors.ConfigError(
                f"--{flag} is for --runner {runner}, but the runner is '{wanted}'; name that "
                "runner or leave the flag out."
            )
    if wanted == "memory":
        return parse_options([])
    if wanted == "processes":
        return parse_options(
            [
                "--direct_running_mode=multi_processing",
                f"--direct_num_workers={engine.workers or 0}",
            ]
        )
    if engine.scheduler is None:
        raise errors.ConfigError(
            "--runner dask needs the address of a scheduler; start `dask scheduler` and "
            "`dask worker` and pass --scheduler tcp://HOST:8786."
        )
    return parse_options(["--runner=DaskRunner", f"--dask_client_address={engine.scheduler}"])


# Beam knows it by its full name alone.
_DASK_RUNNER = "apache_beam.runners.dask.dask_runner.DaskRunner"

# Beam puts it, and a step's name, behind the sentence of an error.
_BEAMS_NOTE = " [while running"

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
    if runner in ("DaskRunner", _DASK_RUNNER):
        options = _for_dask(arguments)
    mode = options.view_as(DirectOptions).direct_running_mode
    if mode == "multi_threading":
        raise errors.ConfigError(
            "direct_running_mode must be in_memory or multi_processing; multi_threading is refused "
            "because it returned corrupted data in every measured run."
        )
    return options


def _for_dask(arguments: Sequence[str]) -> PipelineOptions:
    """One spec to a task: left to itself the runner lets one task have many, or all."""
    if find_spec("distributed") is None:
        raise errors.ConfigError(
            "The Dask engine needs Dask, which is not installed; pip install 'retort[dask]'."
        )
    if any(a.startswith(("--dask_partition_size", "--dask_npartitions")) for a in arguments):
        raise errors.ConfigError(
            "The size of Dask's partitions must be one spec, which is a shard; leave out "
            "--dask_partition_size and --dask_npartitions."
        )
    return PipelineOptions([*arguments, f"--runner={_DASK_RUNNER}", "--dask_partition_size=1"])


def run(
    specs: Sequence[Document], work: beam.DoFn, label: str, options: PipelineOptions | None = None
) -> None:
    """Hand every spec to `work` once or more; return when all are done.

    Without options the runner is FnApiRunner in this process. A foreseeable error (a RetortError)
    of a worker is raised again here as itself, whatever the runner wrapped it in or put behind it.
    """
    if not specs:
        return
    options = options or PipelineOptions([])
    # DoFns live in installed modules, so nothing of __main__ has to travel.
    options.view_as(SetupOptions).save_main_session = False
    named = options.view_as(StandardOptions).runner
    runner = _on_this_machine(options) if named in (None, "FnApiRunner") else named
    try:
        pipeline = beam.Pipeline(runner=runner, options=options)
        _ = (
            pipeline
            | "Specs" >> beam.Create([spec.canonical_json() for spec in specs])
            | "Spread" >> beam.Reshuffle()
            | label >> beam.ParDo(work)
        )
        result = pipeline.run()
        try:
            result.wait_until_finish()
        finally:
            # Of Dask: Beam leaves it open, and its tasks running if this process is interrupted.
            client = getattr(result, "client", None)
            if client is not None:
                client.close()
    except errors.RetortError as error:
        raise type(error)(str(error).partition(_BEAMS_NOTE)[0]) from error
    except Exception as error:
        if "KeyboardInterrupt" in str(error).strip().rsplit("\n", 1)[-1]:
            raise KeyboardInterrupt from error
        foreseen = _foreseen(str(error))
        if foreseen is None and named == _DASK_RUNNER and isinstance(error, OSError):
            raise errors.ConfigError(
                f"The Dask scheduler must answer, but: {error}; start it or mend --scheduler."
            ) from error
        if foreseen is None:
            raise
        raise foreseen from error


def _on_this_machine(options: PipelineOptions) -> FnApiRunner:
    """Beam's own, whose worker processes log to this terminal no more than the options say.

    By itself it tells them no options; their errors come back as exceptions.
    """
    _WorkerProcess.was_interrupted = False
    threading.excepthook = _say_no_more
    level = options.view_as(WorkerOptions).default_sdk_harness_log_level or "CRITICAL"
    told = beam_provision_api_pb2.ProvisionInfo(retrieval_token="unused")
    told.pipeline_options.update({"beam:option:default_sdk_harness_log_level:v1": level})
    return FnApiRunner(provision_info=ExtendedProvisionInfo(told))


@WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class _WorkerProcess(SubprocessSdkWorkerHandler):
    """Beam's, but Ctrl-C is the driver's alone, which then ends its worker processes.

    By itself Beam never tells a process to end that has not called it yet, and waits for it. And
    where a terminal sends the signal to all, each says in a traceback that it was interrupted.
    """

    was_interrupted = False

    def __init__(self, command: bytes, *others: Any):
        super().__init__(b"trap '' INT; exec " + command, *others)

    def stop_worker(self) -> None:
        if isinstance(sys.exception(), KeyboardInterrupt):
            _WorkerProcess.was_interrupted = True
            for process in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if any("sdk_worker_main" in word for word in process.cmdline()):
                        # What they wrote is whole or not there, as after any end of a process.
                        process.kill()
        super().stop_worker()


_say = threading.excepthook
# Those that talk with worker processes, or wait for one.
_BEAMS_THREADS = ("run_worker", "read_grpc_client_inputs", "beam_control_read")


def _say_no_more(args: threading.ExceptHookArgs) -> None:
    """What Beam's own threads miss of an interrupted job is no news; all else is said as ever."""
    is_beams = args.thread is not None and args.thread.name in _BEAMS_THREADS
    if not (is_beams and _WorkerProcess.was_interrupted):
        _say(args)


def name_of(options: PipelineOptions | None) -> str:
    """The runner that options name, with its mode where it has one."""
    if options is None:
        return "FnApiRunner in_memory"
    named = options.view_as(StandardOptions).runner
    if named in (None, "FnApiRunner"):
        return f"FnApiRunner {options.view_as(DirectOptions).direct_running_mode or 'in_memory'}"
    return str(named).rsplit(".", 1)[-1]


def _foreseen(text: str) -> errors.RetortError | None:
    """The RetortError inside a runner's traceback text, or None if the failure was another."""
    found = re.search(rf"schemas\.errors\.(\w+): (.*?)(?:{re.escape(_BEAMS_NOTE)}|\n|$)", text)
    if found is None:
        return None
    kind = getattr(errors, found[1], None)
    if not (isinstance(kind, type) and issubclass(kind, errors.RetortError)):
        return None
    return kind(found[2].strip().strip("'\""))
