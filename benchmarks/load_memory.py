"""Host memory that loading a teacher takes beyond its parameters.

`python -m benchmarks.load_memory --gigabytes 2 4` writes random bfloat16 checkpoints of Gemma 2's
form in files of half a gigabyte, loads each in a process of its own and prints the peak of its
resident memory (VmHWM: of the process alone). On a CPU the parameters themselves are in it, and are
taken off; on a GPU they are not.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gemma2 import checkpoint, model
from schemas.model import ModelConfig

FILE_BYTES = 2**29
_LOAD = """
import sys, json
import jax, jax.numpy as jnp
from benchmarks.load_memory import peak_bytes
from gemma2 import checkpoint
jnp.zeros(8).block_until_ready()
before = peak_bytes()
_, params = checkpoint.load(sys.argv[1], jnp.bfloat16)
jax.block_until_ready(params)
held = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"platform": jax.devices()[0].platform, "before": before, "held": held,
                  "peak": peak_bytes()}))
"""


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def shape(gigabytes: float) -> ModelConfig:
    """Layers of a fixed width, as many as fill so many gigabytes of bfloat16."""
    config = ModelConfig(
        vocab_size=32_768,
        d_model=2048,
        num_layers=2,
        mlp_width=8192,
        num_heads=8,
        num_kv_heads=4,
        head_size=256,
        query_scalar=256,
    )
    two = config.model_copy(update={"num_layers": 4})
    pair = model.num_parameters(two) - model.num_parameters(config)
    fixed = model.num_parameters(config) - pair
    pairs = max(1, round((gigabytes * 2**30 / 2 - fixed) / pair))
    return config.model_copy(update={"num_layers": 2 * pairs})


def write(folder: Path, config: ModelConfig) -> None:
    """Of random numbers, so that no page is shared or left out."""
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    random = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        bits = random.integers(0, 2**14, leaf.shape, np.uint16)
        return bits.view(jnp.bfloat16)

    checkpoint.save(folder, config, jax.tree.map(fill, shapes), max_shard_bytes=FILE_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2, 4])
    parser.add_argument("--folder", type=Path, help="where checkpoints are written for a while")
    options = parser.parse_args()
    for gigabytes in options.gigabytes:
        config = shape(gigabytes)
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            folder = Path(scratch) / "model"
            write(folder, config)
            files = len(list(folder.glob("*.safetensors")))
            command = [sys.executable, "-c", _LOAD, str(folder)]
            found = json.loads(subprocess.check_output(command, text=True))
        beyond = found["peak"] - found["before"]
        if found["platform"] == "cpu":
            beyond -= found["held"]
        largest = 2 * config.vocab_size * config.d_model
        print(
            f"{found['platform']}: {found['held'] / 2**30:.2f} GiB in {files} files, "
            f"{config.num_layers} layers: {beyond / 2**20:,.0f} MiB beyond the parameters; "
            f"the largest tensor is {largest / 2**20:,.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
