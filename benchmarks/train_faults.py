"""What a training run survives: kills, signals, full disks, damaged checkpoints and stores.

`python -m benchmarks.train_faults` trains a tiny student on a small store (those of
`tests/student_store.py`) once without disturbance, then again and again with one, and prints a
Markdown table. Whatever is done to a run, once it has ended its records, the bytes of its exported
weights and every bit of its last state must be those of the undisturbed one:

- kill: SIGKILL at random moments, a third of them while a checkpoint is written;
- signal: SIGTERM and SIGINT, also during compilation and evaluation, must end the run with status
  0 or 130 and a saved state; a second one must end it at once;
- checkpoint: each file of the newest checkpoint flipped in random bits, cut, missing; the run must
  say so in a line and go on from the one before;
- disk: the run's disk becomes full, at several sizes; needs to mount tmpfs, as root;
- store: a shard missing, cut, flipped or misaligned, found while the run is under way or by its
  next part; another store in its place; a store that grows.

Exits with 1 if anything was lost.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import student_store

from benchmarks.faults import Case, report, scratch
from gemma2 import presets
from logit_store import writer
from schemas.errors import RetortError
from schemas.runs import TrainConfig
from student_train import loop
from student_train import mesh as meshes
from student_train.checkpoint import Checkpoints, check_sums
from student_train.data import AHEAD, StoreSource, row_order
from student_train.step import abstract_state
from student_train.throughput import NO_RATES

CLASSES = ("kill", "signal", "checkpoint", "disk", "store")
STEPS, EVERY, EVAL_EVERY = 40, 4, 10
ROWS, SHARD_ROWS, BATCH = 196, 2, 8
TOKENS = 128
"""Of a row: enough of them that one row alone shows whether it is misaligned."""
DELAY_SECONDS = 0.02
EXIT_REFUSED, EXIT_CRASHED = 2, 3
PATIENCE_SECONDS = 900
COMPILED = Path(tempfile.gettempdir()) / f"retort-train-faults-{os.getpid()}"


@dataclass(frozen=True)
class World:
    """The folder of everything, and how the undisturbed run ended."""

    folder: Path
    golden: dict[str, Any]

    def config(self, name: str, **changes: Any) -> TrainConfig:
        return make_config(self.folder, name, **changes)


def make_config(folder: Path, name: str, **changes: Any) -> TrainConfig:
    fields = {"steps": STEPS, "checkpoint_every": EVERY, "eval_every": EVAL_EVERY} | changes
    return student_store.small_config(folder, folder / name, **fields)


# Runs, each in a fork of this process, which itself uses neither TensorStore nor a JAX device


class Run:
    """One part of a run, under way."""

    def __init__(
        self, config: TrainConfig, delay_seconds: float = DELAY_SECONDS, cache: bool = True
    ):
        self.config = config
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._begun = COMPILED.with_name(f"{COMPILED.name}-begun")
        self._begun.unlink(missing_ok=True)
        self._process = os.fork()
        if self._process == 0:
            os.dup2(self._said.fileno(), 1)
            os.dup2(self._said.fileno(), 2)
            status = self._train(delay_seconds, cache)
            sys.stderr.flush()
            os._exit(status)
        self.status: int | None = None

    def _train(self, delay_seconds: float, cache: bool) -> int:
        if cache:
            jax.config.update("jax_compilation_cache_dir", str(COMPILED))
        result = loop._Run.result

        def begun(run: Any) -> Any:
            self._begun.touch()
            return result(run)

        loop._Run.result = begun  # type: ignore[method-assign]
        try:
            loop.train(self.config, on_event=lambda event: time.sleep(delay_seconds))
            with contextlib.suppress(OSError):  # a disk that is full to the last byte
                (self.config.out / "state").write_text(state_digest(self.config))
            return 0
        except RetortError as error:
            print(error, file=sys.stderr)
            return EXIT_REFUSED
        except SystemExit as stop:
            return int(stop.code or 0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            return EXIT_CRASHED

    def is_over(self) -> bool:
        if self.status is None:
            process, status = os.waitpid(self._process, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def until(self, is_time: Callable[[], bool]) -> bool:
        """Wait for a moment; False if the run was over before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_time():
            if self.is_over():
                return False
            if time.monotonic() > deadline:
                os.kill(self._process, signal.SIGKILL)
            time.sleep(0.002)
        return not self.is_over()

    def has_begun(self) -> bool:
        return self._begun.exists()

    def send(self, number: int) -> None:
        if not self.is_over():
            os.kill(self._process, number)

    def end(self) -> int:
        self.until(lambda: False)
        assert self.status is not None
        return self.status

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read().decode()


def state_digest(config: TrainConfig) -> str:
    """Of every bit of the last checkpoint's arrays."""
    model = presets.resolve(config.model)
    mesh = meshes.make_mesh(config.mesh)
    with Checkpoints(config.out, None) as checkpoints:
        state = checkpoints.restore(config.steps, abstract_state(model, config, mesh))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def records(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return [{k: v for k, v in record.items() if k not in NO_RATES} for record in found]


def steps_done(out: Path) -> int:
    return max((record["step"] for record in records(out)), default=0)


def outcome(out: Path) -> dict[str, Any]:
    weights = out / "export" / "model.safetensors"
    return {
        "records": sorted(records(out), key=lambda r: (r["step"], "loss" not in r)),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None,
        "state": (out / "state").read_text() if (out / "state").exists() else None,
    }


def goes_on(case: Case, world: World, config: TrainConfig, what: str) -> Run:
    """Run to the end; what was disturbed must end as what was not."""
    run = Run(config, 0)
    status = run.end()
    case.expect(status == 0, f"{what}: the next run ended with {status}: {run.said()}")
    case.expect(outcome(config.out) == world.golden, f"{what}: another end")
    return run


# Kills and signals


def is_saving(out: Path) -> bool:
    return any((out / "checkpoints").glob("saving-*"))


def moment(run: Run, kind: str) -> bool:
    """Wait for a random moment of a kind; False if the run was over before."""
    out = run.config.out
    if not run.until(run.has_begun):
        return False
    if kind == "start":
        time.sleep(random.uniform(0, 4))
    elif kind == "save":
        run.until(lambda: is_saving(out))
        time.sleep(random.uniform(0, 0.2))
    elif kind == "evaluation":
        step = steps_done(out) // EVAL_EVERY * EVAL_EVERY + EVAL_EVERY
        run.until(lambda: steps_done(out) >= step)
        time.sleep(random.uniform(0, 0.05))
    else:
        step = steps_done(out) + random.randint(1, 8)
        run.until(lambda: steps_done(out) >= step)
        time.sleep(random.uniform(0, 0.05))
    return not run.is_over()


def kills(world: World, count: int) -> list[Case]:
    case = Case("killed (SIGKILL) at a random moment, then run again")
    number = 0
    while case.tries < count:
        config = world.config(f"killed-{number}")
        number += 1
        while case.tries < count:
            run = Run(config)
            kind = random.choice(["start", "step", "save"])
            if not moment(run, kind):
                break
            in_save = is_saving(config.out)
            run.send(signal.SIGKILL)
            if run.end() == -signal.SIGKILL:
                case.tries += 1
                case.notes["while a checkpoint was written" if in_save else f"during {kind}"] += 1
        goes_on(case, world, config, f"killed run {number}")
    case.notes["runs in all"] += number
    return [case]


def signals(world: World, count: int) -> list[Case]:
    first = Case("SIGTERM or SIGINT, then run again")
    second = Case("a second signal 50 ms after the first, then run again")
    longest = 0.0
    for case, is_twice in ((first, False), (second, True)):
        for number in range(count):
            kind = ("start", "save", "evaluation", "step")[number % 4]
            signal_number = (signal.SIGTERM, signal.SIGINT)[number // 4 % 2]
            wanted = 0 if signal_number == signal.SIGTERM else 130
            config = world.config(f"signal-{is_twice}-{number}")
            what = f"{signal_number.name} at a {kind}"
            # At the start: compile in earnest, which nothing but the thread can interrupt.
            run = Run(config, 0.05, cache=kind != "start")
            case.tries += 1
            if moment(run, kind):
                start = time.monotonic()
                run.send(signal_number)
                if is_twice:
                    time.sleep(0.05)
                    run.send(signal_number)
                status = run.end()
                seconds = time.monotonic() - start
                allowed = (wanted, 128 + signal_number) if is_twice else (wanted,)
                case.expect(status in allowed, f"{what}: status {status}: {run.said()}")
                if is_twice:
                    case.notes[f"status {status}"] += 1
                    case.expect(seconds < 5, f"{what}: took {seconds:.1f} s")
                else:
                    longest = max(longest, seconds)
                    if status == wanted and steps_done(config.out):
                        saved = config.out / "checkpoints" / str(steps_done(config.out))
                        case.expect(
                            saved.is_dir() or "nothing had to be saved" in run.said(),
                            f"{what}: {saved} is not there",
                        )
                case.notes[f"during {kind}"] += 1
            else:
                case.notes["was over before"] += 1
            goes_on(case, world, config, what)
            shutil.rmtree(config.out)
    first.notes["seconds at most from the signal to the end"] = math.ceil(longest)
    return [first, second]


# Checkpoints


def damaged(raw: bytes, kind: str) -> bytes | None:
    if kind == "missing":
        return None
    if kind == "cut":
        return raw[: random.randrange(len(raw))] if raw else None
    at = random.randrange(len(raw) * 8)
    flipped = bytearray(raw)
    flipped[at // 8] ^= 1 << at % 8
    return bytes(flipped)


def put(path: Path, raw: bytes | None) -> None:
    if raw is None:
        path.unlink()
    else:
        path.write_bytes(raw)


def checkpoints(world: World, flips: int, runs: int) -> list[Case]:
    template = world.config("template")
    run = Run(template)
    run.until(lambda: (template.out / "checkpoints" / str(3 * EVERY)).is_dir())
    run.send(signal.SIGKILL)
    run.end()
    newest = template.out / "checkpoints" / str(3 * EVERY)
    names = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    seen = []
    for kind, each in (("flip", flips), ("cut", 4), ("missing", 1)):
        case = Case(f"newest checkpoint, each file: {kind}")
        for name in names:
            raw = (newest / name).read_bytes()
            for _ in range(each):
                case.tries += 1
                put(newest / name, damaged(raw, kind))
                case.expect(check_sums(newest) is not None, f"{kind} in {name} was not seen")
                (newest / name).write_bytes(raw)
        case.notes["files"] = len(names)
        seen.append(case)
    assert check_sums(newest) is None

    case = Case("the same, then run again")
    for number in range(runs):
        kind = ("flip", "cut", "missing")[number % 3]
        name = random.choice(names)
        config = world.config(f"damaged-{number}")
        shutil.copytree(template.out, config.out)
        path = config.out / "checkpoints" / newest.name / name
        put(path, damaged(path.read_bytes(), kind))
        run = goes_on(case, world, config, f"{kind} {name}")
        case.tries += 1
        said = f"The checkpoint of step {newest.name} is damaged"
        case.expect(said in run.said(), f"{kind} {name}: not said: {run.said()}")
        aside = config.out / "checkpoints" / f"damaged-{newest.name}"
        case.expect(aside.is_dir(), f"{kind} {name}: not set aside")
        shutil.rmtree(config.out)

    every = Case("every checkpoint damaged: refused, and kept")
    config = world.config("all-damaged")
    shutil.copytree(template.out, config.out)
    before = {}
    for folder in (config.out / "checkpoints").iterdir():
        if not folder.name.isdecimal():
            continue  # what the copied run was killed in the middle of
        path = folder / "params" / "_METADATA"
        before[path] = path.read_bytes()
        put(path, damaged(before[path], "flip"))
    run = Run(config, 0)
    every.tries += 1
    every.expect(run.end() == EXIT_REFUSED, f"ended with {run.status}: {run.said()}")
    every.expect(all(path.exists() for path in before), "a checkpoint is gone")
    for path, raw in before.items():
        path.write_bytes(raw)
    goes_on(every, world, config, "every checkpoint damaged")
    return [*seen, case, every]


# Disks


def disks(world: World, count: int) -> list[Case]:
    case = Case("disk full under a run, then run again with room")
    place = world.folder / "disk"
    place.mkdir()
    size = sum(p.stat().st_size for p in (world.folder / "whole").rglob("*") if p.is_file())
    for number in range(count):
        kilobytes = int(size / 1024 * (0.15 + 1.6 * number / count))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "retort", str(place)]
        if subprocess.run(mount, capture_output=True).returncode:
            case.notes["skipped: tmpfs cannot be mounted here"] += 1
            return [case]
        try:
            config = world.config("disk/out", on_failed_save=("continue", "stop")[number % 2])
            run = Run(config)
            status = run.end()
            case.tries += 1
            what = f"disk of {kilobytes} kB"
            case.expect(status in (0, EXIT_REFUSED), f"{what}: status {status}: {run.said()}")
            case.expect("Traceback" not in run.said(), f"{what}: {run.said()}")
            case.notes["had room" if status == 0 else "ended with a sentence"] += 1
            case.notes["a save failed and training went on"] += "Training goes on" in run.said()
            for folder in (config.out / "checkpoints").glob("[0-9]*"):
                fault = check_sums(folder)
                case.expect(fault is None, f"{what}: {folder.name}: {fault}")
            remount = ["mount", "-o", "remount,size=64m", str(place)]
            subprocess.run(remount, check=True, capture_output=True)
            if status:
                goes_on(case, world, config, what)
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
    return [case]


# Stores


def late_shard(store: Path) -> int:
    """The shard whose first row is drawn last; the check at the start has no row of it either."""
    order = row_order(StoreSource(str(store), "default"), 0)
    first: dict[int, int] = {}
    for step in range(STEPS):
        for row in order.rows(step, BATCH).tolist():
            first.setdefault(row // SHARD_ROWS, step)
    shard = max(first, key=lambda number: first[number])
    # Batches are read AHEAD, and the damage comes after step 3.
    assert first[shard] > 3 + AHEAD + 2
    return shard


def shard_file(store: Path, array: str, shard: int) -> Path:
    (found,) = (path for path in (store / array / "c" / str(shard)).rglob("*") if path.is_file())
    return found


def stores(world: World) -> list[Case]:
    true = world.folder / "true-store"
    shard = int(in_fork(lambda: str(late_shard(true))))
    array = "targets/default/entry_bucket"
    raw = shard_file(true, array, shard).read_bytes()
    # Tables have no shards.
    targets = [path.parents[1] for path in (true / "targets/default").glob(f"*/c/{shard}")]
    assert len(targets) > 3
    rolled = {
        shard_file(true, str(path.relative_to(true)), shard): shard_file(
            world.folder / "rolled", str(path.relative_to(true)), shard
        ).read_bytes()
        for path in targets
    }
    case = Case("a shard lost or damaged: named before a step is taken on it, then mended")
    for kind in ("missing", "cut", "flip", "misaligned"):
        for is_live in (True, False):
            config = world.config(f"store-{kind}-{is_live}")
            what = f"{kind}, {'under the run' if is_live else 'before its next part'}"
            case.tries += 1
            case.notes["under the run" if is_live else "between two parts"] += 1
            run = Run(config, 0.2 if is_live else DELAY_SECONDS)
            run.until(lambda out=config.out: steps_done(out) >= 3)
            if not is_live:
                run.send(signal.SIGTERM)
                run.end()
            kept = {path: path.read_bytes() for path in rolled}
            if kind == "misaligned":
                for path, bad in rolled.items():
                    path.write_bytes(bad)
            else:
                put(shard_file(true, array, shard), damaged(raw, kind))
            if not is_live:
                run = Run(config)
            status, said, done = run.end(), run.said(), steps_done(config.out)
            case.expect(status == EXIT_REFUSED, f"{what}: status {status}: {said}")
            case.expect(f"shards [{shard}]" in said or f"shard {shard} " in said, f"{what}: {said}")
            case.expect(f"saved at step {done}" in said, f"{what}: not saved at {done}: {said}")
            case.expect(3 <= done < STEPS, f"{what}: at step {done}")
            for path, good in kept.items():
                path.write_bytes(good)
            goes_on(case, world, config, what)

    other = Case("another store in its place: refused with both identities, then put back")
    config = world.config("other-store")
    run = Run(config)
    run.until(lambda: steps_done(config.out) >= 3)
    run.send(signal.SIGTERM)
    run.end()
    true.rename(world.folder / "away")
    (world.folder / "other").rename(true)
    run = Run(config)
    status, said = run.end(), run.said()
    other.tries += 1
    other.expect(status == EXIT_REFUSED, f"status {status}: {said}")
    other.expect(len(re.findall(r"tokens is (\w{64}) there and (\w{64}) here", said)) == 1, said)
    true.rename(world.folder / "other")
    (world.folder / "away").rename(true)
    goes_on(other, world, config, "another store")

    grows = Case("a store that grows: refused without the flag, and the run keeps its rows")
    grows.tries += 1
    growing = world.folder / "growing"
    refused = Run(world.config("refused", store=str(growing)))
    grows.expect(refused.end() == EXIT_REFUSED, refused.said())
    grows.expect("--partial_store" in refused.said(), refused.said())
    ends = []
    for name in ("grown", "as-it-was"):
        config = world.config(name, store=str(growing), partial_store=True)
        run = Run(config)
        if name == "as-it-was":
            grows.expect(run.end() == 0, run.said())
        else:
            run.until(lambda out=config.out: steps_done(out) >= 10)
            run.send(signal.SIGTERM)
            run.end()
        ends.append(config)
    in_fork(lambda: finish_targets(growing))
    run = Run(ends[0])
    grows.expect(run.end() == 0, run.said())
    grows.expect(outcome(ends[0].out) == outcome(ends[1].out), "a grown store gives other numbers")
    grows.expect(len(records(ends[0].out)) > STEPS, "too few records")
    return [case, other, grows]


PARTIAL_SHARDS = 60


def make_stores(folder: Path) -> None:
    make = partial(student_store.make_store, length=TOKENS)
    make(folder / "true-store", rows=ROWS, shard_sequences=SHARD_ROWS)
    make(folder / "rolled", rows=ROWS, shard_sequences=SHARD_ROWS, roll=1)
    make(folder / "other", rows=ROWS, shard_sequences=SHARD_ROWS, seed=9)
    make(folder / "growing", rows=ROWS, shard_sequences=SHARD_ROWS, targets=False)
    rows = student_store.make_rows(ROWS, TOKENS, 1)
    student_store.add_targets(folder / "growing", "default", *rows, shards=PARTIAL_SHARDS)
    make(folder / "held-out", rows=24, seed=2, targets=False)


def finish_targets(store: Path) -> None:
    tokens, segments = student_store.make_rows(ROWS, TOKENS, 1)
    targets = writer.TargetsWriter(str(store), "default")
    encoded = student_store.make_targets(tokens, segments)
    for spec in writer.plan_shards(targets.manifest)[PARTIAL_SHARDS:]:
        part = slice(spec.first_row, spec.stop_row)
        targets.write(spec, tokens[part], segments[part], encoded.part(part))


def in_fork(make: Callable[[], str | None]) -> str:
    """What a function returns that uses TensorStore, which must not be forked after."""
    with tempfile.TemporaryFile() as file:
        process = os.fork()
        if process == 0:
            status = EXIT_CRASHED
            try:
                os.write(file.fileno(), (make() or "").encode())
                status = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            os._exit(status)
        assert os.waitpid(process, 0)[1] == 0
        file.seek(0)
        return file.read().decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--signals", type=int, default=12, help="once, and twice in a row")
    parser.add_argument("--flips", type=int, default=16, help="of each file of a checkpoint")
    parser.add_argument("--runs", type=int, default=9, help="on a damaged checkpoint")
    parser.add_argument("--disks", type=int, default=8)
    options = parser.parse_args()
    with scratch() as name:
        folder = Path(name)
        in_fork(lambda: make_stores(folder))
        (folder / "store").symlink_to("true-store")
        undisturbed = make_config(folder, "whole")
        run = Run(undisturbed, 0)
        assert run.end() == 0, run.said()
        world = World(folder, outcome(undisturbed.out))
        assert [r["step"] for r in world.golden["records"] if "loss" in r] == [*range(1, STEPS + 1)]
        cases: list[Case] = []
        for what, found in {
            "kill": lambda: kills(world, options.kills),
            "signal": lambda: signals(world, options.signals),
            "checkpoint": lambda: checkpoints(world, options.flips, options.runs),
            "disk": lambda: disks(world, options.disks),
            "store": lambda: stores(world),
        }.items():
            if what in options.only:
                start = time.monotonic()
                cases += found()
                print(f"{what}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    shutil.rmtree(COMPILED, ignore_errors=True)
    COMPILED.with_name(f"{COMPILED.name}-begun").unlink()
    return report(cases)


if __name__ == "__main__":
    sys.exit(main())
