"""What `float8_mlp` does to a student: the same runs with and without it, on one store.

`python -m benchmarks.float8_training --store S --heldout H --model M --out DIR` trains each of
`--seeds` twice, in float8 and without, and scores both on the held-out store. A seed decides the
initial weights and the order of rows, so that the difference within a pair is float8's (and that of
what is rounded otherwise), and the spread between seeds is what it has to be held against. Any
machine will do: where there is no float8 arithmetic it is computed in wider numbers.
"""

import argparse
import statistics
from pathlib import Path

from schemas.runs import OptimizerConfig, RateSchedule, TrainConfig
from student_train.loop import train


def heldout_nats(options: argparse.Namespace, seed: int, is_float8: bool) -> float:
    """Nats per held-out token of a student that is trained here, or was before."""
    config = TrainConfig(
        store=options.store,
        out=options.out / f"{seed}-{'float8' if is_float8 else options.dtype}",
        model=options.model,
        targets=options.targets,
        steps=options.steps,
        batch_sequences=options.batch,
        seed=seed,
        dtype=options.dtype,
        float8_mlp=is_float8,
        optimizer=OptimizerConfig(
            learning_rate=options.rate,
            schedule=RateSchedule(warmup_steps=max(options.steps // 20, 1)),
        ),
        eval_store=options.heldout,
    )
    result = train(config)
    assert result.evaluation is not None
    return result.evaluation.nats_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--heldout", required=True, help="store whose tokens are scored")
    parser.add_argument("--targets", default="default")
    parser.add_argument("--model", required=True, help="preset, or a file of a ModelConfig")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtype", default="bfloat16", help="of what is not float8")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print(f"| seed | {options.dtype} | MLP in float8 | difference |\n| --- | --- | --- | --- |")
    plain, differences = [], []
    for seed in options.seeds:
        one, other = (heldout_nats(options, seed, is_float8) for is_float8 in (False, True))
        plain.append(one)
        differences.append(other - one)
        print(f"| {seed} | {one:.4f} | {other:.4f} | {other - one:+.4f} |", flush=True)
    print(f"mean difference {statistics.mean(differences):+.4f} nats a held-out token", end="")
    if len(plain) > 1:
        print(f"; between seeds the standard deviation is {statistics.stdev(plain):.4f}", end="")
    print()


if __name__ == "__main__":
    main()
