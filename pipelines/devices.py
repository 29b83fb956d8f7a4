"""Gives each worker process of a machine GPUs of its own, before anything looks for them.

A process holds a lock file for each of its GPUs. The kernel lets go of the locks when the process
ends, however it ends, so that a worker that takes a killed one's place finds its GPUs free.
"""

import fcntl
import glob
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from schemas.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# A killed process may take some seconds to give its memory back.
_WAIT_SECONDS = 30.0
_POLL_SECONDS = 0.5

_held: list[int] = []


def claim(count: int, folder: Path | None = None, wait_seconds: float = _WAIT_SECONDS) -> list[str]:
    """Take `count` GPUs that no other process has taken, and let this one see no others.

    Returns their names: none if the machine has no GPU, if JAX is to use none, or if it has already
    taken what it sees. Raises ConfigError if too few are free.
    """
    names = visible()
    platforms = os.environ.get("JAX_PLATFORMS", "")
    is_for_others = platforms and not {"cuda", "gpu"} & set(platforms.split(","))
    if _held or not names or is_for_others or _has_begun():
        return []
    folder = folder or Path(tempfile.gettempdir()) / f"retort-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    until = time.monotonic() + wait_seconds
    while True:
        taken = _take(names, count, folder)
        if taken:
            os.environ[VISIBLE] = ",".join(taken)
            return taken
        if time.monotonic() >= until:
            raise ConfigError(
                f"Each worker process needs {count} of the machine's GPUs to itself, but of "
                f"{', '.join(names)} too few are free of other workers; use fewer workers."
            )
        time.sleep(_POLL_SECONDS)


def visible() -> list[str]:
    """The GPUs that this process may use, by the environment or else by what the driver shows."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    count = sum(bool(re.fullmatch(r"/dev/nvidia\d+", path)) for path in glob.glob("/dev/nvidia*"))
    return [str(index) for index in range(count)]


def _take(names: list[str], count: int, folder: Path) -> list[str]:
    """Locks of the first `count` that are free, or none at all."""
    taken: list[str] = []
    locks: list[int] = []
    for name in names:
        path = folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', name)}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        taken.append(name)
        locks.append(lock)
        if len(taken) == count:
            _held.extend(locks)
            return taken
    # All or none: two processes that each hold a part would wait for each other.
    for lock in locks:
        os.close(lock)
    return []


def _has_begun() -> bool:
    """Whether JAX has looked for devices, after which the environment says nothing to it."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()
