"""Workers of a Dask cluster killed while they write a store.

`python -m benchmarks.engine_faults` starts a scheduler and three workers, each under a nanny that
replaces it, and writes small stores through `retort`'s own jobs while workers get SIGKILL at random
moments, until so many were killed. Every store must be whole and have the bytes of one that nobody
disturbed, and no record of a shard may be written a second time.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from dump_world import digest, dump_config, make_world, tokenize_config

from logit_store.verify import verify
from pipelines import dump, runner, tokenize

QUIET = Console(quiet=True)
WORKERS = 3


class Cluster:
    """A scheduler that gives up on nothing, and workers."""

    def __init__(self, folder: Path):
        self._file = folder / "scheduler.json"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "DASK_TEMPORARY_DIRECTORY": str(folder),
            # A task that was on so many workers that died is blamed for it.
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1000",
        }
        flags = ["--scheduler-file", str(self._file), "--no-dashboard"]
        module = [sys.executable, "-m"]
        with (folder / "log").open("wb") as log:
            self._processes = [
                subprocess.Popen(c, env=environment, cwd=folder, stdout=log, stderr=log)
                for c in (
                    [*module, "distributed.cli.dask_scheduler", *flags, "--port", "0"],
                    *[[*module, "distributed.cli.dask_worker", *flags, "--nthreads", "1"]]
                    * WORKERS,
                )
            ]
        while not self._file.exists() or not self._file.read_text():
            time.sleep(0.2)

    def options(self) -> list[str]:
        address = json.loads(self._file.read_text())["address"]
        return ["--runner=DaskRunner", f"--dask_client_address={address}"]

    def workers(self) -> list[psutil.Process]:
        """Those under the nannies, started at least a second ago."""
        found = []
        for nanny in self._processes[1:]:
            for process in psutil.Process(nanny.pid).children(recursive=True):
                try:
                    is_worker = "spawn_main" in " ".join(process.cmdline())
                    if is_worker and time.time() - process.create_time() > 1:
                        found.append(process)
                except psutil.Error:
                    continue
        return found

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait()


class Watch(threading.Thread):
    """Kills workers, and looks at the ledger for records that change."""

    def __init__(self, cluster: Cluster, store: Path, shortest: float, longest: float, seed: int):
        super().__init__(daemon=True)
        self._cluster, self._store = cluster, store
        self._between = (shortest, longest)
        self._random = random.Random(seed)
        self._seen: dict[Path, tuple[int, int]] = {}
        self.kills, self.rewritten = 0, 0
        self.done = threading.Event()

    @property
    def records(self) -> int:
        """How many were seen."""
        return len(self._seen)

    def run(self) -> None:
        due = time.monotonic() + self._random.uniform(*self._between)
        while not self.done.wait(0.05):
            self._look()
            if time.monotonic() < due:
                continue
            workers = self._cluster.workers()
            if workers:
                self._random.choice(workers).send_signal(signal.SIGKILL)
                self.kills += 1
            due = time.monotonic() + self._random.uniform(*self._between)

    def _look(self) -> None:
        for path in self._store.rglob("ledger/*.json"):
            try:
                status = path.stat()
            except OSError:  # compacted in the meantime
                continue
            now = (status.st_ino, status.st_mtime_ns)
            self.rewritten += self._seen.setdefault(path, now) != now
            self._seen[path] = now


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--between", type=float, nargs=2, default=[1.0, 12.0], help="seconds")
    parser.add_argument("--shard-sequences", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = make_world(folder)

        def write(store: Path, beam_options: list[str]) -> None:
            shards = options.shard_sequences
            given = runner.parse_options(beam_options)
            tokenize.tokenize(tokenize_config(world, store, shard_sequences=shards), QUIET, given)
            given = runner.parse_options(beam_options)
            dump.dump(dump_config(world, store), QUIET, given)

        write(folder / "whole", [])
        wanted = digest(folder / "whole")
        cluster = Cluster(folder)
        total: Counter[str] = Counter()
        start = time.monotonic()
        try:
            while total["kills"] < options.kills:
                store = folder / f"store{total['stores']}"
                watch = Watch(cluster, store, *options.between, seed=total["stores"])
                watch.start()
                write(store, cluster.options())
                watch.done.set()
                watch.join()
                report = verify(str(store))
                total.update(
                    stores=1,
                    kills=watch.kills,
                    records=watch.records,
                    rewritten=watch.rewritten,
                    damaged=int(not report.ok or report.missing_shards > 0),
                    other=int(digest(store) != wanted),
                )
                print(f"{time.monotonic() - start:.0f} s: {dict(total)}", flush=True)
        finally:
            cluster.close()
    sys.exit(int(any(total[what] for what in ("rewritten", "damaged", "other"))))


if __name__ == "__main__":
    main()
