"""A trained student as a Hugging Face folder."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from gemma2 import checkpoint as gemma2_checkpoint
from gemma2 import model as gemma2
from schemas.errors import CheckpointError
from schemas.model import ModelConfig
from student_train import mesh as meshes
from student_train.checkpoint import Checkpoints

EXPORT_FOLDER = "export"


def export(
    run: Path, out: Path, step: int | None, tokenizer: Path | None = None, averaged: bool = True
) -> int:
    """Write a checkpointed step (None: the newest) of a run as float32 safetensors; returns it.

    Of a run with `ema_decay` the average is written, unless told otherwise. Raises
    CheckpointError if the run has no such checkpoint.
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
        identity = checkpoints.identity(step)
        model = identity.model
        averaged = averaged and identity.settings.get("ema_decay") is not None
        shapes = jax.eval_shape(partial(gemma2.init_params, model), jax.random.key(0))
        host = SingleDeviceSharding(jax.local_devices()[0])
        abstract = meshes.abstract(shapes, jax.tree.map(lambda _: host, shapes))
        write(out, model, checkpoints.restore_params(step, abstract, averaged), tokenizer)
        return step


def write(folder: Path, model: ModelConfig, params: Any, tokenizer: Path | None) -> None:
    """Gather the parameters to the first host, which writes them, atomically."""
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        gemma2_checkpoint.save(folder, model, jax.device_get(params), tokenizer)
