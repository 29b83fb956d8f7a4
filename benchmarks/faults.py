"""What a store survives: kills, writers at once, full disks, and damage to every bit and file.

`python -m benchmarks.faults` makes small stores (those of `tests/small_store.py`, cut to three rows
in two shards), breaks them in every way below, and prints a Markdown table:

- kill: a writer is killed at random moments, the next one goes on; the bytes must be those of a
  write that nobody disturbed, and meanwhile committed rows must be readable;
- writers: two and three at once, and two drivers with different configs;
- disk: writes onto a disk that becomes full, at every size and at every number of files, and
  `retort tokenize` onto some of them; needs to mount tmpfs, as root;
- bits, lengths, files: each bit flipped (`--bits sample`: a few thousand of them), each file cut to
  each length, missing, swapped with each other file, copied over each other file and to a name of
  its own. Verification must name each damaged file. A reader must give the true rows or refuse,
  naming what is damaged (of a whole file that lies in another's place it sees at most that the
  rows break a rule), and rows of other shards must stay readable. Repair must give up the shards
  whose data is damaged and no others, and once those are written again every byte must be as it was
  (`--repair-every`: of the flips and lengths, one in so many).

Exits with 1 if anything was lost.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import small_store

from logit_store import codec, layout, reader, storage
from logit_store.repair import repair
from logit_store.verify import verify
from schemas.errors import CorruptStoreError, RetortError

small_store.ROWS, small_store.VOCAB = 3, 60
SHARDS = {0: [0, 1], 1: [2]}
TARGETS = "targets/default/"
DATA = ("tokens", "segment_ids", *layout.row_arrays(small_store.targets_manifest()))
CLASSES = ("kill", "writers", "disk", "bits", "lengths", "files")
SHARED_MEMORY = Path("/dev/shm")
EXIT_REFUSED, EXIT_CRASHED = 2, 3
SAMPLE_BITS = 4000
CLI_DISKS = 12


@dataclass
class Case:
    """One class of faults: how often it was tried, and what was lost each time it was not met."""

    name: str
    tries: int = 0
    notes: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def expect(self, is_met: bool, what: str) -> None:
        if not is_met:
            self.lost.append(what)

    def add(self, other: "Case") -> None:
        self.tries += other.tries
        self.notes += other.notes
        self.lost += other.lost


def files(url: str) -> dict[str, bytes]:
    """All files of a store but locks, by key."""
    root = Path(url)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(storage.LOCK_SUFFIX)
    }


def put(url: str, contents: dict[str, bytes]) -> None:
    """Make a store's files exactly these."""
    for key in files(url).keys() - contents.keys():
        (Path(url) / key).unlink()
    for key, raw in contents.items():
        path = Path(url) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != raw:
            path.write_bytes(raw)


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield folder


def is_true(found: reader.TargetBatch, truth: reader.TargetBatch, rows: list[int]) -> bool:
    return all(
        np.array_equal(getattr(found, name), getattr(truth, name)[rows])
        for name in truth.__dataclass_fields__
    )


# Processes


def forked(run: Callable[[], None]) -> int:
    """Run something in a fork of this process, which must not have used TensorStore; its id."""
    process = os.fork()
    if process:
        return process
    status = 0
    try:
        run()
    except RetortError as error:
        print(str(error), file=sys.stderr)
        status = EXIT_REFUSED
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        status = EXIT_CRASHED
    sys.stderr.flush()
    os._exit(status)


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_forked(run: Callable[[], None]) -> int:
    return status_of(forked(run))


def said(run: Callable[[], None]) -> tuple[int, str]:
    """Exit status of a fork, and what it printed to stderr."""
    with tempfile.TemporaryFile() as file:

        def redirected() -> None:
            os.dup2(file.fileno(), 2)
            run()

        status = run_forked(redirected)
        file.seek(0)
        return status, file.read().decode()


def write_and_sweep(url: str) -> None:
    small_store.write_store(url)
    storage.sweep_locks(url)


def check_unfinished(url: str) -> None:
    """Raise unless a store that a writer left is good as far as it goes.

    Metadata that the driver had not written yet and a summary that it had not drawn up are missed
    by a verification, and written by the next driver; nothing else may be wrong.
    """
    report = verify(url)
    awaited = ("missing", "is missing")
    wrong = [
        str(p)
        for p in report.problems
        if p.kind == "data" or p.shard is not None or not any(word in p.what for word in awaited)
    ]
    if wrong:
        raise AssertionError("; ".join(wrong))
    tokens, segments = small_store.token_rows()
    try:
        stored = reader.TokensReader(url)
    except RetortError:
        return
    for shard in np.flatnonzero(stored.committed).tolist():
        rows = SHARDS[shard]
        found = stored.rows(rows)
        assert np.array_equal(found.tokens, tokens[rows])
        assert np.array_equal(found.segment_ids, segments[rows])
    try:
        targets = reader.TargetsReader(url, "default")
    except RetortError:
        return
    entries, _ = small_store.row_entries()
    for shard in np.flatnonzero(targets.committed).tolist():
        batch = targets.rows(SHARDS[shard])
        for index, row in enumerate(SHARDS[shard]):
            found_ids = np.sort(batch.entry_id[index][batch.entry_id[index] >= 0])
            assert np.array_equal(found_ids, np.sort(entries[row].id))


def warm() -> None:
    """Compile the kernels and load what a write loads, without touching TensorStore."""
    rows, tables = small_store.target_rows(), small_store.tables()
    segments = small_store.token_rows()[1]
    sampler = small_store.targets_manifest().sampler
    codec.check_rows(
        tables.vocabulary,
        layout.predicted_mask(segments),
        rows.columns(),
        sampler.block_tokens,
        sampler.slots_per_block,
        0,
    )


# Kills


def kills(golden: dict[str, bytes], tries: int) -> list[Case]:
    case = Case("writer killed (SIGKILL) at a random moment, then resumed")
    rng = random.Random(0)
    states = set()
    with scratch() as folder:
        url = f"{folder}/store"
        lengths = []
        for _ in range(9):
            start = time.monotonic()
            run_forked(lambda: small_store.write_store(url))
            lengths.append(time.monotonic() - start)
            shutil.rmtree(url)
        length = statistics.median(lengths)
        while case.tries < tries:
            number = case.tries
            process = forked(lambda: small_store.write_store(url))
            time.sleep(rng.uniform(0, length))
            os.kill(process, signal.SIGKILL)
            was_killed = status_of(process) == -signal.SIGKILL
            case.tries += was_killed
            case.notes["more that had ended before"] += not was_killed
            state = frozenset(files(url))
            states.add(state)
            if state:
                case.expect(run_forked(lambda: check_unfinished(url)) == 0, f"{number}: not good")
            case.expect(run_forked(lambda: write_and_sweep(url)) == 0, f"{number}: no resume")
            case.expect(files(url) == golden, f"{number}: other bytes")
            shutil.rmtree(url, ignore_errors=True)
    case.notes["distinct states of the files"] = len(states)
    return [case]


# Writers at once


def writers(golden: dict[str, bytes], rounds: int) -> list[Case]:
    cases = []
    with scratch() as folder:
        url = f"{folder}/store"
        for count in (2, 3):
            case = Case(f"{count} writers (each driver and worker) at once")
            for number in range(rounds):
                started = [forked(lambda: small_store.write_store(url)) for _ in range(count)]
                ends = [status_of(process) for process in started]
                case.expect(ends == [0] * count, f"round {number}: exits {ends}")
                run_forked(lambda: write_and_sweep(url))
                case.expect(files(url) == golden, f"round {number}: other bytes")
                case.tries += 1
                shutil.rmtree(url)
            cases.append(case)
        seeds = (0, 1)
        by_seed = []
        for seed in seeds:
            run_forked(lambda seed=seed: _write_seed(f"{folder}/seed-{seed}", seed))
            by_seed.append(files(f"{folder}/seed-{seed}"))
        case = Case("2 drivers with different configs at once")
        for number in range(rounds):
            run_forked(lambda: small_store.write_tokens(url))
            order = seeds if number % 2 else seeds[::-1]
            started = {seed: forked(lambda seed=seed: _write_seed(url, seed)) for seed in order}
            ends = [status_of(started[seed]) for seed in seeds]
            case.expect(sorted(ends) == [0, EXIT_REFUSED], f"round {number}: exits {ends}")
            run_forked(lambda: storage.sweep_locks(url) and None)
            winner = ends.index(0) if 0 in ends else 0
            case.expect(files(url) == by_seed[winner], f"round {number}: a mixture")
            case.notes[f"won by config {winner + 1}"] += 1
            case.tries += 1
            shutil.rmtree(url)
        cases.append(case)
    return cases


def _write_seed(url: str, seed: int) -> None:
    # Quiet: that one of them is refused is the point.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    small_store.write_tokens(url)
    small_store.write_targets(url, seed=seed)


# Full disks


@contextlib.contextmanager
def small_disk(folder: str, options: str) -> Iterator[Callable[[], None]]:
    """A tmpfs of limited size on `folder`; yields what gives it room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        room = ["mount", "-o", "remount,size=64m,nr_inodes=100000", folder]
        yield lambda: subprocess.run(room, check=True) and None
    finally:
        subprocess.run(["umount", folder], check=True)


def is_one_sentence(text: str) -> bool:
    """What a user should see: one line of rule, value and fix, and no traceback."""
    return text.count("\n") == 1 and "free space" in text and "Traceback" not in text


def disks(golden: dict[str, bytes]) -> list[Case]:
    cases = []
    page = os.sysconf("SC_PAGE_SIZE")
    runs = {
        "disk full after n pages": [f"size={n * page}" for n in range(1, 80)],
        "disk full after n files and folders": [f"nr_inodes={n}" for n in range(2, 110)],
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(folder, "size=1m"):
                pass
        except subprocess.CalledProcessError:
            case = Case("disk full (not run: needs to mount tmpfs)")
            return [case]
        for name, options in runs.items():
            case, states = Case(name), set()
            for option in options:
                with small_disk(folder, option) as make_room:
                    _fill(f"{folder}/store", golden, case, states, option, make_room)
            case.notes["distinct states of the files"] = len(states)
            cases.append(case)
        cases.append(_cli_disks(folder))
    return cases


def _fill(
    url: str,
    golden: dict[str, bytes],
    case: Case,
    states: set[frozenset[str]],
    option: str,
    make_room: Callable[[], None],
) -> None:
    status, text = said(lambda: small_store.write_store(url))
    if status == 0:
        case.notes["had room"] += 1
        return
    case.tries += 1
    case.expect(status == EXIT_REFUSED and is_one_sentence(text), f"{option}: {status}, {text}")
    state = frozenset(files(url)) if os.path.isdir(url) else frozenset()
    states.add(state)
    if state:
        case.expect(run_forked(lambda: check_unfinished(url)) == 0, f"{option}: not good")
    make_room()
    case.expect(run_forked(lambda: write_and_sweep(url)) == 0, f"{option}: no resume")
    case.expect(files(url) == golden, f"{option}: other bytes")


def _cli_disks(folder: str) -> Case:
    """`retort tokenize` onto disks that become full at different stages."""
    case = Case("disk full under `retort tokenize`")
    with tempfile.TemporaryDirectory() as inputs:
        words = random.Random(0).choices(["salt", "still", "steam", "copper", "glass"], k=4000)
        (Path(inputs) / "text.txt").write_text(" ".join(words))
        code = (
            "import sys; from pathlib import Path; from teacher_dump.tokenizer import train; "
            "train(iter([Path(sys.argv[1]).read_text()]), Path(sys.argv[2]), vocab_size=300)"
        )
        model = f"{inputs}/tokenizer.model"
        subprocess.run([sys.executable, "-c", code, f"{inputs}/text.txt", model], check=True)

        def tokenize(store: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "pipelines.cli", "tokenize", "--store", store]
            command += ["--tokenizer", model, "--corpus.paths", f"{inputs}/text.txt"]
            command += ["--sequence_tokens", "64", "--shard_sequences", "16"]
            return subprocess.run(command, capture_output=True, text=True)

        calm = tokenize(f"{inputs}/calm")
        case.expect(calm.returncode == 0, calm.stderr)
        golden = files(f"{inputs}/calm")
        most = 2 * len(golden)
        for inodes in np.unique(np.linspace(2, most, CLI_DISKS).astype(int)).tolist():
            with small_disk(folder, f"nr_inodes={inodes}") as make_room:
                ended = tokenize(f"{folder}/store")
                if ended.returncode == 0:
                    case.notes["had room"] += 1
                    continue
                case.tries += 1
                errors = [line for line in ended.stderr.splitlines() if "retort tokenize:" in line]
                case.expect(
                    ended.returncode == EXIT_REFUSED
                    and len(errors) == 1
                    and "Traceback" not in ended.stderr,
                    f"nr_inodes={inodes}: {ended.returncode}, {ended.stderr[-2000:]}",
                )
                make_room()
                again = tokenize(f"{folder}/store")
                case.expect(again.returncode == 0, f"nr_inodes={inodes}: no resume {again.stderr}")
                case.expect(files(f"{folder}/store") == golden, f"nr_inodes={inodes}: other bytes")
    return case


# Damage


@dataclass(frozen=True)
class Damage:
    """Some files' new contents (None: it is gone), and whether to repair the store after."""

    case: str
    change: dict[str, bytes | None]
    repairs: bool


class Bench:
    """One process's store, to be broken and mended."""

    def __init__(self, url: str):
        self._url = url
        small_store.write_store(url)
        self.golden = files(url)
        self._truth = reader.TargetsReader(url, "default").rows(range(small_store.ROWS))

    def run(self, damage: Damage) -> Case:
        case = Case(damage.case, tries=1)
        changed = {k: raw for k, raw in damage.change.items() if self.golden.get(k) != raw}
        where = f"{damage.case}: {', '.join(changed)}"
        self._apply(changed)
        try:
            found = {problem.file for problem in verify(self._url).problems}
            case.expect(changed.keys() <= found, f"{where}: not all are named")
            self._read(case, where, changed)
            if damage.repairs:
                self._repair(case, where, changed)
        except Exception:  # noqa: BLE001
            case.lost.append(f"{where}: {traceback.format_exc()}")
        if damage.repairs:
            put(self._url, self.golden)
        else:
            self._apply({key: self.golden.get(key) for key in changed})
        return case

    def _apply(self, change: dict[str, bytes | None]) -> None:
        for key, raw in change.items():
            path = Path(self._url, key)
            if raw is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(raw)

    def _read(self, case: Case, where: str, changed: dict[str, bytes | None]) -> None:
        """Each shard's rows are true, or refused with the name of what is damaged."""
        hit = {shard_of(key) for key in changed}
        opened = None
        for shard, rows in SHARDS.items():
            try:
                opened = opened or reader.TargetsReader(self._url, "default")
                found = opened.rows(rows)
            except RetortError as error:
                text = str(error)
                is_named = any(name in text for key in changed for name in names_in_errors(key))
                case.expect(is_named, f"{where}: the error names it not: {text}")
                if isinstance(error, CorruptStoreError) and hit == {1 - shard}:
                    case.lost.append(f"{where}: shard {shard} is untouched and was refused")
                match = re.search(r"in shards \[(\d+)\]", text)
                case.expect(match is None or int(match[1]) in hit, f"{where}: wrong shard: {text}")
                case.notes["reads refused"] += 1
                continue
            if is_true(found, self._truth, rows):
                case.notes["reads true"] += 1
            else:
                case.lost.append(f"{where}: shard {shard} reads as other values")

    def _repair(self, case: Case, where: str, changed: dict[str, bytes | None]) -> None:
        case.notes["repaired"] += 1
        expected: dict[str | None, set[int]] = {}
        for key in changed:
            shard = shard_of(key)
            if shard is not None and key in self.golden:
                name = "default" if key.startswith(TARGETS) else None
                expected.setdefault(name, set()).add(shard)
        _, plan = repair(self._url, apply=False)
        _, outcome = repair(self._url, apply=True)
        case.expect(outcome == plan, f"{where}: a repair did not what it said")
        found = {name: set(shards) for name, shards in outcome.withdrawn.items()}
        if found != expected:
            if takes_more(changed):
                # Its tokens are needed to derive a record, and both are damaged.
                case.notes["gave up a shard for a record"] += 1
            else:
                case.lost.append(f"{where}: gave up {found} and not {expected}")
        for key in changed:
            if key.startswith("corpus/") or key not in self.golden:
                # There is no copy of the list of sources; strangers are left to a person.
                case.expect(any(line.startswith(key) for line in outcome.left), f"{where}: unsaid")
                self._apply({key: self.golden.get(key)})
        report = verify(self._url)
        case.expect(report.ok, f"{where}: not whole after a repair: {report.problems}")
        small_store.write_store(self._url)
        case.expect(files(self._url) == self.golden, f"{where}: other bytes after a repair")


def shard_of(key: str) -> int | None:
    """The shard whose data a file is, or None."""
    array = key.removeprefix(TARGETS).split("/")[0]
    return int(key.split("/c/")[1].split("/")[0]) if array in DATA and "/c/" in key else None


def names_in_errors(key: str) -> tuple[str, ...]:
    """How a reader's error calls the file: data and tables by array, a lost manifest by group."""
    if "/c/" in key:
        return (key.split("/c/")[0],)
    if key == layout.GROUP_KEY:
        return key, "holds no tokens"
    return (key, "holds no targets 'default'") if key == TARGETS + layout.GROUP_KEY else (key,)


def takes_more(changed: dict[str, bytes | None]) -> bool:
    ledger = any(key.startswith(f"{TARGETS}ledger/") for key in changed)
    return ledger and any(key.startswith(("tokens/c/", "segment_ids/c/")) for key in changed)


def damages(golden: dict[str, bytes], classes: set[str]) -> Iterator[tuple[str, int, int]]:
    """Names of pieces of work: a class or a key, and which part of it; see `pieces`."""
    if "bits" in classes:
        yield from ((f"bits {key}", part, 8) for key in golden for part in range(8))
    if "lengths" in classes:
        yield from ((f"lengths {key}", 0, 1) for key in golden)
    if "files" in classes:
        yield from (("files", part, 64) for part in range(64))


def pieces(
    golden: dict[str, bytes], work: tuple[str, int, int], bits: str, repair_every: int
) -> Iterator[Damage]:
    """The damages of one piece of work."""
    name, part, parts = work
    kind, _, key = name.partition(" ")
    if kind == "bits":
        raw = golden[key]
        total = sum(len(raw) for raw in golden.values()) * 8
        step = 1 if bits == "all" else total // SAMPLE_BITS
        offset = random.Random(key).randrange(step)
        for bit in range(len(raw) * 8)[offset + part * step :: parts * step]:
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            repairs = random.Random(f"{key} {bit}").randrange(repair_every) == 0
            yield Damage("each bit flipped", {key: bytes(flipped)}, repairs)
    elif kind == "lengths":
        raw = golden[key]
        for length in range(0, len(raw), 1 if bits == "all" else 40):
            repairs = random.Random(f"{key} {length}").randrange(repair_every) == 0
            yield Damage("each file cut to each length", {key: raw[:length]}, repairs)
    else:
        for number, damage in enumerate(_files(golden)):
            if number % parts == part:
                yield damage


def _files(golden: dict[str, bytes]) -> Iterator[Damage]:
    for key in golden:
        yield Damage("each file missing", {key: None}, True)
        yield Damage("each file copied to a name of its own", {f"{key}.copy": golden[key]}, True)
    for one, two in itertools.combinations(golden, 2):
        if golden[one] != golden[two]:
            change: dict[str, bytes | None] = {one: golden[two], two: golden[one]}
            yield Damage("each two files swapped", change, True)
    for one, two in itertools.permutations(golden, 2):
        if golden[one] != golden[two]:
            yield Damage("each file copied over each other", {two: golden[one]}, True)
    data = {key: key.startswith(TARGETS) for key in golden if shard_of(key) == 0}
    for groups in ({False}, {True}, {False, True}):
        exchanged: dict[str, bytes | None] = {}
        for one in (key for key, group in data.items() if group in groups):
            two = one.replace("/c/0", "/c/1")
            exchanged |= {one: golden[two], two: golden[one]}
        yield Damage("all files of a shard exchanged with another's", exchanged, True)


_bench: Bench
_options: tuple[str, int]


def _start(folder: str, bits: str, repair_every: int) -> None:
    global _bench, _options
    _bench = Bench(f"{folder}/{os.getpid()}")
    _options = bits, repair_every


def _work(work: tuple[str, int, int]) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for damage in pieces(_bench.golden, work, *_options):
        cases.setdefault(damage.case, Case(damage.case)).add(_bench.run(damage))
    return cases


def broken(
    golden: dict[str, bytes], classes: set[str], bits: str, repair_every: int, jobs: int
) -> list[Case]:
    work = list(damages(golden, classes))
    random.Random(0).shuffle(work)
    cases: dict[str, Case] = {}
    start = time.monotonic()
    with scratch() as folder:
        context = multiprocessing.get_context("spawn")
        with context.Pool(jobs, _start, (folder, bits, repair_every)) as pool:
            for done, found in enumerate(pool.imap_unordered(_work, work), 1):
                for name, case in found.items():
                    cases.setdefault(name, Case(name)).add(case)
                seconds = time.monotonic() - start
                tries = sum(case.tries for case in cases.values())
                lost = sum(len(case.lost) for case in cases.values())
                print(
                    f"damage: {done} of {len(work)} pieces, {tries:,} tries, {lost} lost, "
                    f"{seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return list(cases.values())


def table(cases: list[Case]) -> str:
    lines = ["| case | tries | as promised | lost | of these |", "|---|---:|---:|---:|---|"]
    for case in cases:
        notes = "; ".join(f"{count:,} {name}" for name, count in sorted(case.notes.items()))
        good = max(case.tries - len(case.lost), 0)
        lines.append(f"| {case.name} | {case.tries:,} | {good:,} | {len(case.lost)} | {notes} |")
    return "\n".join(lines)


def report(cases: list[Case]) -> int:
    """Print the table, and what was lost to stderr; returns the exit status."""
    print(table(cases))
    lost = [line for case in cases for line in case.lost]
    for line in lost[:40]:
        print(line, file=sys.stderr)
    return 1 if lost else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--bits", choices=("all", "sample"), default="all")
    parser.add_argument("--repair-every", type=int, default=100, help="of flips and lengths")
    parser.add_argument("--kills", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=30, help="of writers at once")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    classes = set(options.only)
    warm()
    # This process never uses TensorStore, so that it can be forked.
    with scratch() as folder:
        run_forked(lambda: small_store.write_store(f"{folder}/store"))
        golden = files(f"{folder}/store")
    total = sum(len(raw) for raw in golden.values())
    print(f"a store of {len(golden)} files, {total:,} bytes", file=sys.stderr, flush=True)
    cases: list[Case] = []
    start = time.monotonic()
    if "kill" in classes:
        cases += kills(golden, options.kills)
    if "writers" in classes:
        cases += writers(golden, options.rounds)
    if "disk" in classes:
        cases += disks(golden)
    print(f"processes and disks: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if classes & {"bits", "lengths", "files"}:
        cases += broken(golden, classes, options.bits, options.repair_every, options.jobs)
    return report(cases)


if __name__ == "__main__":
    sys.exit(main())
