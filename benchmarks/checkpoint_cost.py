"""How long a save of the 2.6B student holds up training, and how long it then takes to be on disk.

`python -m benchmarks.checkpoint_cost --out DIR` makes the state on one GPU and saves it three
times, in a process that reserved the memory for it first, as training does while it compiles, and
in one that did not. It wants 45 GB of GPU memory and 80 GB of disk.
"""

import argparse
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax

from gemma2 import presets
from schemas.runs import MeshConfig, TrainConfig
from student_train.checkpoint import Checkpoints, RunIdentity
from student_train.mesh import make_mesh
from student_train.step import abstract_state, make_state


def measure(model_name: str, out: Path, is_reserved: bool) -> None:
    config = TrainConfig(store="", out=out, model=model_name)
    model = presets.resolve(model_name)
    abstract = abstract_state(model, config, make_mesh(MeshConfig(), jax.devices()[:1]))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    run = RunIdentity(tokens="", targets=None, rows=1, model=model, settings={})
    shutil.rmtree(out, ignore_errors=True)
    with Checkpoints(out, keep=1) as checkpoints:
        start = time.perf_counter()
        if is_reserved:
            checkpoints.reserve(abstract)
            checkpoints._thread.submit(lambda: None).result()
            print(f"memory reserved in {time.perf_counter() - start:.2f} s", flush=True)
        make = jax.jit(partial(make_state, model, config), out_shardings=shardings)
        state = jax.block_until_ready(make(jax.random.key(0)))
        gigabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
        for step in range(1, 3):
            state = state._replace(step=jax.device_put(jax.numpy.int32(step), shardings.step))
            start = time.perf_counter()
            checkpoints.save(state, run)
            held_up = time.perf_counter() - start
            checkpoints.wait()
            print(
                f"{'reserved' if is_reserved else 'not reserved'}: save {step} of {gigabytes:.1f} "
                f"GB held up training {held_up:.2f} s, and was whole on disk after "
                f"{time.perf_counter() - start:.1f} s",
                flush=True,
            )
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="gemma2-2.6b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reserved", choices=("yes", "no"), help="Only so, in this process.")
    options = parser.parse_args()
    if options.reserved is not None:
        measure(options.model, options.out, options.reserved == "yes")
        return
    for reserved in ("yes", "no"):
        command = [sys.executable, "-m", "benchmarks.checkpoint_cost", *sys.argv[1:]]
        subprocess.run([*command, "--reserved", reserved], check=True)


if __name__ == "__main__":
    main()
