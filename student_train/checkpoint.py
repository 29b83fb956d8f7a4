"""Checkpoints of a run: every field of its state, with what it was made from.

Orbax writes the arrays in the background. A checkpoint gets its name, its step, only once all its
files are synced and listed with their SHA-256 in SHA256SUMS, so that what has a name is whole or
was damaged since. Beside the arrays lies a `RunIdentity`: a run is continued only on the rows, the
targets, the model and the settings that it began with.
"""

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from pydantic import ValidationError

from schemas.base import Document
from schemas.errors import CheckpointError, SaveError
from schemas.manifest import identity
from schemas.model import ModelConfig
from schemas.runs import TrainConfig
from student_train import hosts
from student_train.data import Source
from student_train.step import State

CHECKPOINT_FOLDER = "checkpoints"
SUMS_FILE = "SHA256SUMS"
_SAVING, _REMOVING, _DAMAGED = "saving-", "removing-", "damaged-"
_READERS = 8

# Orbax logs each error of its threads with a traceback, and raises it in ours too, where it becomes
# one sentence.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

# What may change between the parts of one run: none of it changes which numbers are computed, but
# for the last digits where devices, micro-batches or chunks differ. Paths may move; identities are
# compared.
FREE_SETTINGS = frozenset(
    {
        "store",
        "out",
        "tokenizer",
        "model",
        "targets",
        "mesh",
        "remat",
        "unroll_layers",
        "accumulate",
        "loss_chunk_tokens",
        "eval_store",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "on_failed_save",
        "partial_store",
        "log_every",
        "max_bad_steps",
        "trackers",
    }
)


class RunIdentity(Document):
    """What decides every number of a run."""

    tokens: str
    """Identity of the tokens manifest."""
    targets: str | None
    """Identity of the targets manifest; None trains on labels."""
    rows: int
    """How many rows of the store are drawn from: all, or those that were there at the start."""
    model: ModelConfig
    settings: dict[str, Any]
    """The other fields of the TrainConfig."""

    @classmethod
    def of(cls, config: TrainConfig, model: ModelConfig, source: Source) -> Self:
        targets = source.targets_manifest
        settings = config.model_dump(mode="json", exclude=set(FREE_SETTINGS))
        if targets is None:
            settings["alpha"] = 0.0
        return cls(
            tokens=identity(source.tokens_manifest),
            targets=None if targets is None else identity(targets),
            rows=source.num_rows,
            model=model,
            settings=settings,
        )

    def check(self, found: Self, where: Path) -> None:
        """Raise CheckpointError naming each field in which the stored run differs from this."""
        ours, theirs = _flat(self.model_dump(mode="json")), _flat(found.model_dump(mode="json"))
        # A run from before there was a setting ran as its default does.
        defaults = _flat({"settings": TrainConfig(store="", out=Path()).model_dump(mode="json")})
        theirs |= {name: defaults[name] for name in ours.keys() & defaults.keys() - theirs.keys()}
        # And what was off there and is no more is off here.
        ours |= {name: False for name in theirs.keys() - ours.keys() if theirs[name] is False}
        differing = [
            f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if differing:
            raise CheckpointError(
                f"A run is continued only as it began, but in {where} {'; '.join(differing)}; use "
                "the old settings and store, or another `out`."
            )


class Checkpoints:
    """The checkpoints under a run's `out` folder; use as a context manager.

    Of several processes all must make each call together. The folder must be one that all see.
    """

    def __init__(self, out: Path, keep: int | None):
        """`keep` newest steps stay; None keeps all."""
        self.folder = (out / CHECKPOINT_FOLDER).absolute()
        self._keep = keep
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._reserved: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending; whether one was damaged since is not looked at."""
        return sorted(_numbered(self.folder))

    def folder_of(self, step: int) -> Path:
        return self.folder / str(step)

    # Writing

    def reserve(self, abstract: State) -> None:
        """Take the memory for a state on this host, in the background, while a step is compiled.

        To lock pages takes as long as a dozen steps, and is done once. Of a CPU all memory is one.
        """
        if jax.default_backend() != "cpu":
            self._reserved = self._thread.submit(_reserve, abstract)

    def save(self, state: State, run: RunIdentity) -> None:
        """Begin to save the state under its own step; the state may be donated at once after.

        Raises SaveError, on every process, if it or the save before it cannot be written.
        """
        self.wait()
        step = int(state.step)
        if hosts.from_first("there" if step in self.steps() else "new") == "there":
            return
        work = self.folder / f"{_SAVING}{step}"
        error = None
        try:
            if self._reserved is not None:
                self._reserved.result()
            if hosts.is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
            self._orbax.save(
                work,
                args=ocp.args.Composite(
                    run=ocp.args.JsonSave(run.model_dump(mode="json")),
                    **{
                        name: ocp.args.StandardSave({name: value})
                        for name, value in _on_host(state)._asdict().items()
                        if jax.tree.leaves(value)
                    },
                ),
                force=True,
            )
        except (OSError, ValueError, RuntimeError) as raised:
            error = raised
        if error is None:
            self._saving = step, self._thread.submit(self._complete, step, work)
        self._settle(step, error)

    def wait(self) -> None:
        """Return when all is on disk. Raises SaveError, on every process, if one could not be."""
        if self._saving is None:
            return
        step, saved = self._saving
        self._saving = None
        error = None
        try:
            saved.result()
        except (OSError, ValueError, RuntimeError) as raised:
            error = raised
        self._settle(step, error)

    def _complete(self, step: int, work: Path) -> None:
        """In the background: wait for the arrays, then vouch for them and give them their name."""
        self._orbax.wait_until_finished()
        if not hosts.is_first():
            return
        write_sums(work)
        os.rename(work, self.folder_of(step))
        _sync(self.folder)
        if self._keep is not None:
            # Only now: until the new one is whole, the old ones are all there is.
            for old in self.steps()[: -self._keep]:
                self._remove(self.folder_of(old))

    def _settle(self, step: int, error: Exception | None) -> None:
        said = hosts.agree(None if error is None else hosts.first_line(error))
        if not said:
            return
        if hosts.is_first():
            # Half a checkpoint is of no use, and its room is what the next one needs.
            for half in self.folder.glob(f"{_SAVING}{step}*"):
                shutil.rmtree(half, ignore_errors=True)
        cause = next(iter(said.values()))
        kept = self.steps()
        raise SaveError(
            f"A checkpoint must be written whole, but that of step {step} in {self.folder} could "
            f"not be ({cause}); make room there or mend the disk; the newest one is "
            f"{f'of step {kept[-1]}' if kept else 'still to come'}."
        ) from error

    def sweep(self) -> None:
        """Remove what a killed run left half written or half removed."""
        if hosts.is_first() and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((_SAVING, _REMOVING)):
                    shutil.rmtree(path)
        hosts.agree()

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that its step can be saved again; returns where it is."""
        number = 0
        while (aside := self.folder / f"{_DAMAGED}{step}{f'.{number}' if number else ''}").exists():
            number += 1
        aside = Path(hosts.from_first(str(aside)))
        if hosts.is_first():
            os.rename(self.folder_of(step), aside)
        hosts.agree()
        return aside

    def _remove(self, folder: Path) -> None:
        doomed = folder.with_name(_REMOVING + folder.name)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)

    # Reading

    def fault(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, or None; reads all of them, once.

        Processes share the reading, and say the same.
        """
        mine = check_sums(self.folder_of(step), jax.process_index(), jax.process_count())
        return next(iter(hosts.agree(mine).values()), None)

    def identity(self, step: int) -> RunIdentity:
        """The run that a checkpoint belongs to."""
        where = self.folder_of(step)
        try:
            found = self._orbax.restore(where, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
            return RunIdentity.model_validate(found["run"])
        except (ValueError, OSError, KeyError, ValidationError) as error:
            raise CheckpointError(
                f"A checkpoint must say what it was made from, but {where} cannot be read "
                f"({hosts.first_line(error)}); remove this folder to continue from an older one."
            ) from error

    def rows(self) -> int | None:
        """How many rows the run draws from, as its newest checkpoint says; None without one."""
        for step in reversed(self.steps()):
            try:
                return self.identity(step).rows
            except CheckpointError:
                continue  # a damaged one, which is named when the run looks for a whole one
        return None

    def restore(self, step: int, abstract: State) -> State:
        """The state at `step`, placed as `abstract` (shapes, dtypes, shardings) says."""
        return State(**self._restore(step, abstract._asdict()))

    def restore_params(self, step: int, abstract: Any, averaged: bool) -> Any:
        """The parameters alone, or their average, for an export."""
        name = "ema" if averaged else "params"
        return self._restore(step, {name: abstract})[name]

    def _restore(self, step: int, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields of the state by name; those without arrays are as they were given."""
        where = self.folder_of(step)
        stored = {name: value for name, value in fields.items() if jax.tree.leaves(value)}
        try:
            found = self._orbax.restore(
                where,
                args=ocp.args.Composite(
                    **{
                        name: ocp.args.StandardRestore({name: value})
                        for name, value in stored.items()
                    }
                ),
            )
            return fields | {name: found[name][name] for name in stored}
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"A checkpoint must hold this model's arrays, but {where} does not "
                f"({hosts.first_line(error)}); remove this folder to continue from an older one."
            ) from error

    def close(self) -> None:
        """Wait for what is being written; `wait` tells what became of it."""
        self._thread.shutdown()
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        sys.unraisablehook = self._hook

    def _on_unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """After a failed write TensorStore answers to an event loop that Orbax has closed."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)


def load_params(
    run: Path, step: int | None, place: Callable[[ModelConfig], Any], averaged: bool = True
) -> tuple[int, ModelConfig, Any]:
    """A checkpointed step of a run (None: the newest), its model, and its parameters.

    place: shapes, dtypes and shardings of a model's parameters. Of a run with `ema_decay` it is
    their average, unless told otherwise. Raises CheckpointError if the run has no such checkpoint.
    """
    if not run.is_dir():
        raise CheckpointError(
            f"run must be the `out` folder of a training run, but {run} is no folder; "
            "check the path."
        )
    with Checkpoints(run, keep=None) as checkpoints:
        known = checkpoints.steps()
        if step is None and known:
            step = known[-1]
        if step is None or step not in known:
            raise CheckpointError(
                f"step must be a checkpointed one, but {run} has {known or 'none'} and "
                f"{'none was' if step is None else step} asked for; choose one of them."
            )
        fault = checkpoints.fault(step)
        if fault is not None:
            raise CheckpointError(
                f"A checkpoint must be as it was written, but {checkpoints.folder_of(step)} is not "
                f"({fault}); choose another of {known}."
            )
        found = checkpoints.identity(step)
        averaged = averaged and found.settings.get("ema_decay") is not None
        return (
            step,
            found.model,
            checkpoints.restore_params(step, place(found.model), averaged),
        )


def _on_host(state: State) -> State:
    """A copy in page-locked memory, to which a device writes by itself, at the speed of its bus.

    The memory is kept from save to save; pageable memory took ten times as long, each time.
    """

    def move(x: Any) -> Any:
        where = x.sharding.with_memory_kind("pinned_host") if isinstance(x, jax.Array) else None
        return x if where is None else jax.device_put(x, where)

    moved: State = jax.tree.map(move, state)
    return moved


def _reserve(abstract: State) -> None:
    """What is taken goes back to JAX's pool of page-locked memory, not to the system."""
    held = [
        jax.make_array_from_callback(
            leaf.shape,
            leaf.sharding.with_memory_kind("pinned_host"),
            partial(_zeros_of, leaf.shape, leaf.dtype),
        )
        for leaf in jax.tree.leaves(abstract)
    ]
    jax.block_until_ready(held)


def _zeros_of(shape: tuple[int, ...], dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    part = (len(range(*where.indices(size))) for where, size in zip(index, shape, strict=True))
    return np.zeros(tuple(part), dtype)


def write_sums(folder: Path) -> None:
    """List every file of a folder with its SHA-256, as `sha256sum -c` reads it; all is synced."""
    names = _files(folder)
    with ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(lambda name: _sha256(folder / name, sync=True), names)
        text = "".join(f"{found}  {name}\n" for found, name in zip(sums, names, strict=True))
    with (folder / SUMS_FILE).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def check_sums(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first fault among every `parts`-th file from `part` on, or None.

    A file that is not listed is one: the list was cut short, or the file is a stranger.
    """
    try:
        *lines, rest = (folder / SUMS_FILE).read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError):
        return f"{SUMS_FILE} cannot be read"
    if rest:
        return f"{SUMS_FILE} was cut short"
    sums = {name: found for found, _, name in (line.partition("  ") for line in lines)}
    there = set(_files(folder))
    if not there:
        return "it has no files"
    names = sorted(sums.keys() | there)[part::parts]

    def fault(name: str) -> str | None:
        if name not in there:
            return f"{name} is missing"
        if name not in sums:
            return f"{name} is not in {SUMS_FILE}"
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if found == sums[name] else f"{name} is not what was written"

    with ThreadPoolExecutor(_READERS) as pool:
        return next((found for found in pool.map(fault, names) if found is not None), None)


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path != folder / SUMS_FILE
    )


def _sha256(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """A name is on disk only when its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _numbered(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
