"""Several processes as one run: how they find each other, agree on a step, and end together.

Arrays are JAX's business; here only words travel, through the coordination service that every
run over several processes has. With one process nothing here does or costs anything.
"""

import atexit
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
from jax._src import distributed  # the coordination service's client has no public name

from schemas.errors import ConfigError, HostError, RetortError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")

# The others may be compiling, restoring or writing a checkpoint: only a run that hangs waits this.
PATIENCE_SECONDS = 3600
# After this the process that failed leaves, whether or not the others have heard of it.
_FAREWELL_SECONDS = 10
_LISTEN_SECONDS = 0.5
# Assumed: a network file system shows a new file sooner than this.
_SHARED_SECONDS = 10
_EXIT_FAILED = 2
_meetings = itertools.count()
_MEETING, _FAILED, _HEARD = "retort/meeting", "retort/failed", "retort/heard"


def wants_several(environment: Mapping[str, str]) -> bool:
    """Whether this process was started as one of several. Raises ConfigError if half is said.

    That is: the three variables EXPLICIT are set, or a Slurm step has several tasks, or a
    Kubernetes pod has an index in its job, or it is a TPU machine.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if len(given) == len(EXPLICIT):
        return True
    if given and given != [EXPLICIT[0]]:
        missing = ", ".join(name for name in EXPLICIT if name not in given)
        raise ConfigError(
            f"A run over several processes needs {', '.join(EXPLICIT)}, but {missing} is not set; "
            "set all three, or none for one process."
        )
    if all(name in environment for name in _SLURM):
        return int(environment.get("SLURM_NTASKS", "1")) > 1
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return True
    # The library alone is no TPU: it also compiles for one that is elsewhere.
    has_tpu = "TPU_WORKER_ID" in environment or any(map(os.path.exists, _TPU_DEVICES))
    return (
        has_tpu
        and find_spec("libtpu") is not None
        and environment.get("JAX_PLATFORMS", "tpu") != "cpu"
    )


def join() -> None:
    """Become one of the run's processes, if this is one of several; before JAX is used.

    Raises ConfigError for variables that make no sense, and HostError if the others are not found.
    """
    environment = os.environ
    if jax.distributed.is_initialized() or not wants_several(environment):
        return
    # JAX's own handler of SIGTERM would take the place of the trainer's.
    jax.config.update("jax_enable_preemption_service", False)
    arguments: dict[str, Any] = {}
    if all(environment.get(name) for name in EXPLICIT):
        address, count, index = (environment[name] for name in EXPLICIT)
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise ConfigError(
                f"{EXPLICIT[2]} must be a number from 0 to {EXPLICIT[1]} - 1, but they are "
                f"'{index}' and '{count}'; number the processes from 0."
            )
        if ":" not in address:
            raise ConfigError(
                f"{EXPLICIT[0]} must be HOST:PORT of process 0, but it is '{address}'; add a port."
            )
        arguments = {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(index),
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
        raise HostError(
            f"The processes of a run must find each other, but this one did not find the others "
            f"({first_line(error)}); check that all were started and reach process 0."
        ) from error


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, result, export."""
    return jax.process_index() == 0


def agree(word: str | None = None) -> dict[int, str]:
    """What each process says, by its index; those that say None are absent.

    All processes must come here, each in its main thread and in the same order; all return the
    same. One round trip to process 0, half a millisecond on one machine. Raises HostError if
    another never comes.
    """
    if jax.process_count() == 1:
        return {} if word is None else {0: word}
    client = _client()
    # Each meeting has words of its own: someone may be at the next one before all have read them.
    words = f"{_MEETING}/{next(_meetings)}/"
    try:
        if word is not None:
            client.key_value_set(f"{words}{jax.process_index()}", word)
        client.wait_at_barrier(_MEETING, PATIENCE_SECONDS * 1000)
        said = {
            int(key.rsplit("/", 1)[1]): str(value) for key, value in client.key_value_dir_get(words)
        }
    except jax.errors.JaxRuntimeError as error:
        raise _lost(error) from error
    return dict(sorted(said.items()))


def agree_on(error: RetortError | None) -> None:
    """Raise on every process if one has an error: its own, or a HostError that says whose."""
    said = agree(None if error is None else str(error))
    if error is not None:
        raise _marked(error)
    if said:
        index, sentence = next(iter(said.items()))
        raise _marked(HostError(f"Process {index}: {sentence}"))


def from_first(word: str) -> str:
    """What process 0 says here, whatever the others say."""
    return agree(word if is_first() else None)[0]


def check_shared(folder: Path) -> None:
    """Raise ConfigError, on every process, unless all see the same folder; it is made."""
    if jax.process_count() == 1:
        return
    name = from_first(f".seen-by-all-{uuid4().hex}")
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    agree()
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (is_seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        agree_on(
            None
            if is_seen
            else ConfigError(
                f"`out` must be a folder that all processes of a run share, but {folder} of "
                f"process {jax.process_index()} is not that of process 0; name one on a shared "
                "file system."
            )
        )
    finally:
        if is_first():
            (folder / name).unlink()


@contextmanager
def ending_together() -> Iterator[None]:
    """End all processes when one fails in here, even those that wait for it inside JAX.

    The others print its sentence and exit with status 2, within seconds.
    """
    if jax.process_count() == 1:
        yield
        return
    finished = threading.Event()
    listener = threading.Thread(target=_listen, args=(finished,), daemon=True, name="hosts")
    listener.start()
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if getattr(error, "is_agreed", False):
            raise
        finished.set()
        _tell_and_leave(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise _lost(error) from error
        raise
    finally:
        finished.set()
        # Python ends by force a thread that it finds inside JAX at its own end, and crashes.
        listener.join()


def _listen(finished: threading.Event) -> None:
    client = _client()
    while not finished.wait(_LISTEN_SECONDS):
        try:
            sentence = client.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:
            continue  # nobody said that they failed
        print(f"retort: {sentence}", file=sys.stderr, flush=True)
        client.key_value_set(f"{_HEARD}/{jax.process_index()}", "")
        if is_first():
            # The service is its own, and without it JAX crashes those who have not left yet.
            _wait_until_heard_by(jax.process_count())
            time.sleep(_LISTEN_SECONDS)
        # The main thread may be waiting inside JAX for the process that failed, for ever.
        os._exit(_EXIT_FAILED)


def _tell_and_leave(error: BaseException) -> None:
    """Tell the others, and see to it that this process leaves without waiting for them."""
    sentence = str(error) if isinstance(error, RetortError) else repr(error)
    try:
        _client().key_value_set(_FAILED, f"process {jax.process_index()} failed: {sentence}")
        _wait_until_heard_by(jax.process_count() - 1)
    except jax.errors.JaxRuntimeError:
        pass  # someone else told first, or process 0 is gone and with it all that could hear
    # Registered after JAX's own, so run before it, which would wait for processes that are gone.
    atexit.register(_leave)


def _wait_until_heard_by(count: int) -> None:
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while len(_client().key_value_dir_get(f"{_HEARD}/")) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_HEARD}/{jax.process_index()}", "")
    os._exit(_EXIT_FAILED)


def _marked(error: RetortError) -> RetortError:
    error.is_agreed = True  # type: ignore[attr-defined]
    return error


def _lost(error: Exception) -> HostError:
    return HostError(
        f"A run needs all of its {jax.process_count()} processes, but one does not answer "
        f"({first_line(error)}); see what it printed, and start all of them again: the run "
        "continues from its last checkpoint."
    )


def first_line(error: BaseException) -> str:
    """What an error says, without what some libraries print below it."""
    return (str(error).splitlines() or [repr(error)])[0]


def _client() -> Any:
    return distributed.global_state.client
