"""A trained student as a Hugging Face folder."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from gemma2 import checkpoint as gemma2_checkpoint
from gemma2 import model as gemma2
from schemas.model import ModelConfig
from student_train import mesh as meshes
from student_train.checkpoint import load_params

EXPORT_FOLDER = "export"


def export(
    run: Path, out: Path, step: int | None, tokenizer: Path | None = None, averaged: bool = True
) -> int:
    """Write a checkpointed step (None: the newest) of a run as float32 safetensors; returns it.

    Of a run with `ema_decay` the average is written, unless told otherwise. Raises
    CheckpointError if the run has no such checkpoint.
    """

    def on_host(model: ModelConfig) -> Any:
        shapes = jax.eval_shape(partial(gemma2.init_params, model), jax.random.key(0))
        host = SingleDeviceSharding(jax.local_devices()[0])
        return meshes.abstract(shapes, jax.tree.map(lambda _: host, shapes))

    step, model, params = load_params(run, step, on_host, averaged)
    write(out, model, params, tokenizer)
    return step


def write(folder: Path, model: ModelConfig, params: Any, tokenizer: Path | None) -> None:
    """Gather the parameters to the first host, which writes them, atomically."""
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        gemma2_checkpoint.save(folder, model, jax.device_get(params), tokenizer)
