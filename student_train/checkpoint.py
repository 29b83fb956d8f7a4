"""Checkpoints of a run: parameters, optimizer state and step, with what they were made from.

Orbax writes each step as one folder that appears whole or not at all, in the background; a save is
awaited before the next one and before the run ends. Beside the arrays lies a `RunIdentity`: a run
is continued only on the rows, the targets, the model and the settings that it began with.
"""

from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from pydantic import ValidationError

from schemas.base import Document
from schemas.errors import CheckpointError
from schemas.manifest import identity
from schemas.model import ModelConfig
from schemas.runs import TrainConfig
from student_train.data import Source
from student_train.step import State

CHECKPOINT_FOLDER = "checkpoints"

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
        "accumulate",
        "loss_chunk_tokens",
        "eval_store",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
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
            model=model,
            settings=settings,
        )

    def check(self, found: Self, where: Path) -> None:
        """Raise CheckpointError naming each field in which the stored run differs from this."""
        ours, theirs = _flat(self.model_dump(mode="json")), _flat(found.model_dump(mode="json"))
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
    """The checkpoints under a run's `out` folder; use as a context manager."""

    def __init__(self, out: Path, keep: int | None):
        """`keep` newest steps stay; None keeps all."""
        self.folder = (out / CHECKPOINT_FOLDER).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
            item_names=("params", "opt_state", "guard", "ema", "run"),
        )

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, run: RunIdentity) -> None:
        """Begin to save the state under its own step; the state may be donated at once after."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in _arrays(state).items()}
        run_json = ocp.args.JsonSave(run.model_dump(mode="json"))
        self._manager.save(step, args=ocp.args.Composite(**arrays, run=run_json))

    def wait(self) -> None:
        """Return when all is on disk; raises what a background save raised."""
        self._manager.wait_until_finished()

    def identity(self, step: int) -> RunIdentity:
        """The run that a checkpoint belongs to."""
        where = self.folder / str(step)
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
            )["run"]
            return RunIdentity.model_validate(found)
        except (ValueError, OSError, KeyError, ValidationError) as error:
            raise CheckpointError(
                f"A checkpoint must say what it was made from, but {where} cannot be read "
                f"({error}); remove this folder to continue from an older one."
            ) from error

    def restore(self, step: int, abstract: State) -> State:
        """The state at `step`, placed as `abstract` (shapes, dtypes, shardings) says."""
        arrays = {name: ocp.args.StandardRestore(tree) for name, tree in _arrays(abstract).items()}
        found = self._restore(step, **arrays)
        count = jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), abstract.step.sharding)
        return abstract._replace(step=count, **{name: found[name] for name in arrays})

    def restore_params(self, step: int, abstract: Any, averaged: bool) -> Any:
        """The parameters alone, or their average, for an export."""
        name = "ema" if averaged else "params"
        return self._restore(step, **{name: ocp.args.StandardRestore(abstract)})[name]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"A checkpoint must hold this model's arrays, but {self.folder / str(step)} does "
                f"not ({error}); remove this folder to continue from an older one."
            ) from error

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _arrays(state: State) -> dict[str, Any]:
    """The trees of a state that are stored, by item; its step is the checkpoint's own."""
    found = {"params": state.params, "opt_state": state.opt_state, "guard": state.guard}
    return found if state.ema is None else found | {"ema": state.ema}


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
