"""Fuzzes everything that reads a store's bytes: no other end than the store's own errors.

`python benchmarks/fuzz_store.py --seconds 300` gives each target its share of the time and exits
with 1 on a finding. Coverage-guided, by Atheris (`pip install atheris`; it has wheels for Linux and
Python up to 3.13): our packages are instrumented, NumPy, Numba and TensorStore are not. The corpus
begins with the files of the small store of the tests. Targets:

- manifest: `parse_manifest`, on bytes as they are, and on JSON whose checksum was made to fit;
- ledger: records, segments and summaries, as they are and resealed, through all ways to ask;
- decoder: `codec.decode_rows` on columns of any values, as interpreted Python, which Atheris sees;
- kernel: the same, compiled with bounds checks, where an index out of bounds is an error; compiled
  code gives Atheris no coverage to go by, so that inputs are what `decoder` kept, and changes at
  random of them;
- files: any file of a store exchanged; rows are true or refused, and a verification ends well.

Address space is limited to a gigabyte above what the start needs, so that an allocation that
follows a length in the input is a finding too.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TARGETS = ("manifest", "ledger", "decoder", "kernel", "files")
MOST_INPUT_BYTES = 8192
_ROOM_BYTES = 2**30
_SHARED_MEMORY = Path("/dev/shm")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="of all targets together")
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--target", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        _fuzz(options.target, options.seconds, Path(options.folder))
        raise AssertionError("Atheris does not return")
    found = 0
    place = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for target in options.only:
            share = max(options.seconds // len(options.only), 1)
            found += _run(target, share, folder)
    return 1 if found else 0


def _run(target: str, seconds: int, folder: str) -> bool:
    """Run one target in a process of its own; whether it found something."""
    # Numba keys its cache by neither setting.
    environment = os.environ | {"NUMBA_CACHE_DIR": f"{folder}/{target}/numba"}
    environment |= {
        "decoder": {"NUMBA_DISABLE_JIT": "1"},
        "kernel": {"NUMBA_BOUNDSCHECK": "1"},
    }.get(target, {})
    command = [sys.executable, __file__, "--target", target, "--seconds", str(seconds)]
    command += ["--folder", folder]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines()
    inputs = [line.split()[-1] for line in lines if line.startswith("stat::number_of_executed")]
    covered = [line.split(" cov: ")[1].split()[0] for line in lines if " cov: " in line]
    end = f"{inputs[-1]} inputs, coverage {covered[-1]}" if inputs and covered else "no end"
    print(f"{target}: {end}{', A FINDING' if done.returncode else ''}", flush=True)
    if done.returncode:
        print("\n".join(lines[-60:]), flush=True)
        return True
    return False


def _fuzz(target: str, seconds: int, folder: Path) -> None:
    import atheris

    # What is compiled by Numba must stay as it is; interpreted, it is Python like all else.
    compiled = [] if os.environ.get("NUMBA_DISABLE_JIT") else ["logit_store.codec"]
    with atheris.instrument_imports(include=["logit_store", "schemas"], exclude=compiled):
        import small_store

        import logit_store.codec
        import logit_store.repair
        import logit_store.verify

    folder = folder / target
    store = folder / "store"
    if os.environ.get("NUMBA_DISABLE_JIT"):
        # A sum of uint16 is an integer when compiled; interpreted, uint64, and a float with int64.
        logit_store.codec.np = _IntegerSums()
    small_store.write_store(str(store))
    corpus = folder / "corpus"
    corpus.mkdir()
    run, seeds = {
        "manifest": _manifest,
        "ledger": _ledger,
        "decoder": _decoder,
        "kernel": _decoder,
        "files": _files,
    }[target](store)
    for number, seed in enumerate(seeds):
        run(seed)
        (corpus / str(number)).write_bytes(seed)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _ROOM_BYTES,) * 2)
    if target == "kernel":
        kept = (folder.parent / "decoder" / "corpus").glob("*")
        _change_at_random(run, seeds + [path.read_bytes() for path in kept], seconds)
    arguments = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-max_len={MOST_INPUT_BYTES}",
        "-rss_limit_mb=2048",
        "-timeout=30",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
        str(corpus),
    ]
    atheris.Setup(arguments, run)
    atheris.Fuzz()


def _change_at_random(run: Callable[[bytes], None], seeds: list[bytes], seconds: int) -> None:
    """What Atheris does where it sees nothing: change a few bytes of an input, until time is up."""
    rng = random.Random(0)
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(0, 6) if data else 0):
            place = rng.randrange(len(data))
            width = rng.choice((1, 1, 2, 8))
            data[place : place + width] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * width
        count += 1
        run(bytes(data))
    print(f"stat::number_of_executed_units: {count}\n cov: 0", file=sys.stderr)
    sys.exit(0)


Target = tuple[Callable[[bytes], None], list[bytes]]


def _manifest(store: Path) -> Target:
    """First byte: which group, and whether the checksum is made to fit."""
    import hashlib

    from logit_store import layout, manifests
    from schemas.base import canonical_json
    from schemas.errors import CorruptStoreError, FormatVersionError
    from schemas.manifest import identity

    def reseal(raw: bytes) -> bytes:
        try:
            document = json.loads(raw)
            attributes = document["attributes"]
            text = canonical_json(attributes[layout.MANIFEST_ATTRIBUTE]).encode()
            attributes[layout.CHECKSUM_ATTRIBUTE] = hashlib.sha256(text).hexdigest()
            return json.dumps(document).encode()
        except (ValueError, TypeError, LookupError, RecursionError):
            return raw

    def run(data: bytes) -> None:
        if not data:
            return
        raw = reseal(data[1:]) if data[0] & 2 else data[1:]
        try:
            found = manifests.parse_manifest(raw, "url", ("name" if data[0] & 1 else None), "here")
        except (CorruptStoreError, FormatVersionError):
            return
        assert len(identity(found)) == 64

    seeds = [(store / "zarr.json").read_bytes(), (store / "targets/default/zarr.json").read_bytes()]
    odd = [b"[" * 2000 + b"]" * 2000, b'{"attributes": {"retort": {"format_version": 1}}}', b"1"]
    nested = b'{"attributes":{"retort":{"format_version":1,"x":' + b"[" * 900 + b"]" * 900 + b"}}}"
    surrogate = b'{"attributes":{"retort":{"format_version":1,"x":"\\ud8' + b'ab"}}}'
    odd += [nested, surrogate]
    return run, [bytes([flag]) + raw for raw in seeds + odd for flag in range(4)]


def _ledger(store: Path) -> Target:
    """First byte: which object is exchanged, and whether its lines are sealed again."""
    import small_store
    import tensorstore as ts
    from pydantic import ValidationError

    from logit_store.ledger import Ledger, record_bytes, record_key, summary_bytes
    from schemas.errors import CorruptStoreError
    from schemas.manifest import LedgerRecord, LedgerSummary

    folder = store / "targets/default/ledger"
    manifest = small_store.targets_manifest()
    ledger = Ledger(str(store), "default", manifest)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = whole["segment-000000.jsonl"].splitlines(keepends=True)
    names = ["segment-000000.jsonl", "summary.json", record_key(0), record_key(2)]

    def sealed(line: bytes) -> bytes:
        for kind, encode in ((LedgerRecord, record_bytes), (LedgerSummary, summary_bytes)):
            try:
                return encode(kind.model_validate_json(line).sealed())
            except (ValidationError, UnicodeDecodeError):
                continue
        return line

    def run(data: bytes) -> None:
        if not data:
            return
        raw = data[1:]
        if data[0] & 4:
            raw = b"".join(sealed(line) for line in raw.splitlines(keepends=True))
        memory = ts.KvStore.open("memory://").result()
        objects = whole | {names[data[0] & 3]: raw}
        if data[0] & 8:
            del objects["summary.json"]
        if data[0] & 16:
            objects.pop("segment-000000.jsonl")
        for key, value in objects.items():
            memory.write(key, value).result()
        ledger._store = memory
        for ask in (
            ledger.summary,
            ledger.committed,
            ledger.pending,
            lambda: list(ledger.records()),
            lambda: list(ledger.lines()),
            lambda: [ledger.record(index) for index in range(manifest.num_shards)],
            ledger.superseded,
            lambda: ledger.superseded_fault(0),
            ledger.sum_up,
            ledger.compact,
            lambda: ledger.withdraw([1]),
        ):
            try:
                ask()
            except CorruptStoreError:
                continue

    seeds = [whole["segment-000000.jsonl"], whole["summary.json"], lines[0], lines[2], b"", b"{}\n"]
    return run, [bytes([flag]) + raw for raw in seeds for flag in range(32)]


class _IntegerSums:
    """NumPy, as the interpreted kernel needs it."""

    def __getattr__(self, name: str) -> Any:
        import numpy

        return getattr(numpy, name)

    @staticmethod
    def sum(values: Any) -> int:
        return int(values.sum())


def _decoder(store: Path) -> Target:
    """Columns of two rows from the input's bytes; what decodes must obey what readers rely on."""
    import numpy as np
    import small_store

    from logit_store import codec, layout
    from schemas.errors import CorruptStoreError

    rows = small_store.target_rows().columns()
    # Of the second, offsets need more bits than a row has.
    wide = codec.Vocabulary(np.arange(2**13, dtype=np.uint32), np.array([12, 12], np.uint8))
    vocabularies = (small_store.tables().vocabulary, wide)
    predicted = layout.predicted_mask(small_store.token_rows()[1])[3:]
    columns = {name: values[3:] for name, values in rows.items() if name != "teacher_nats"}
    sizes = {name: values.nbytes for name, values in columns.items()}

    def run(data: bytes) -> None:
        vocabulary = vocabularies[data[0] & 1 if data else 0]
        raw = data[1:].ljust(sum(sizes.values()), b"\0")
        given, start = {}, 0
        for name, values in columns.items():
            part = raw[start : start + sizes[name]]
            given[name] = np.frombuffer(part, values.dtype).reshape(values.shape).copy()
            start += sizes[name]
        before = {name: values.copy() for name, values in given.items()}
        with np.errstate(over="ignore"):
            try:
                found = codec.decode_rows(
                    vocabulary, predicted, given, small_store.BLOCK, small_store.SLOTS
                )
            except CorruptStoreError:
                found = None
        assert all((given[name] == before[name]).all() for name in given)
        if found is None:
            return
        used = found.entry_id >= 0
        assert found.entry_id.min() >= -1
        assert found.entry_id.max() < len(vocabulary.order)
        assert ((found.entry_weight > 0) == used).all()
        entries = found.head_count.astype(int) + found.tail_count
        assert entries.sum() == used.sum()
        position = codec.entry_positions(
            found.head_count, found.tail_count, small_store.BLOCK, small_store.SLOTS
        )
        for row in range(len(position)):
            mass = np.bincount(position[row], found.entry_weight[row], small_store.LENGTH)
            has = entries[row] > 0
            assert np.allclose(mass[has], 1, atol=1e-3), mass
            assert (mass[~has] == 0).all()

    whole = b"".join(values.tobytes() for values in columns.values())
    ones = {name: np.ones_like(values).tobytes() for name, values in columns.items()}
    seeds = [whole, b"", b"\xff" * len(whole), b"".join(ones.values())]
    full = {name: np.zeros_like(values) for name, values in columns.items()}
    full["head_count"] = np.where(predicted, 3, 0).astype(np.uint16)
    full["block_points"][:] = 6
    seeds.append(b"".join(values.tobytes() for values in full.values()))
    for name in columns:
        mixed = {n: ones[n] if n == name else v.tobytes() for n, v in columns.items()}
        seeds.append(b"".join(mixed.values()))
    return run, [bytes([which]) + seed for seed in seeds for which in range(2)]


def _files(store: Path) -> Target:
    """First byte: which file is exchanged for the rest of the input."""
    import numpy as np
    import small_store

    from logit_store import reader
    from logit_store.repair import repair
    from schemas.errors import RetortError

    url = str(store)
    keys = sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())
    truth = reader.TargetsReader(url, "default").rows(range(small_store.ROWS))

    def run(data: bytes) -> None:
        if not data:
            return
        key = keys[data[0] % len(keys)]
        path = store / key
        kept = path.read_bytes()
        path.write_bytes(data[1:])
        try:
            try:
                found = reader.TargetsReader(url, "default").rows(range(small_store.ROWS))
            except RetortError:
                found = truth
            report, _ = repair(url, apply=False)
        finally:
            path.write_bytes(kept)
        for name in truth.__dataclass_fields__:
            assert np.array_equal(getattr(found, name), getattr(truth, name)), (key, name)
        assert data[1:] == kept or key in {problem.file for problem in report.problems}, key

    return run, [bytes([n]) + (store / key).read_bytes() for n, key in enumerate(keys)]


if __name__ == "__main__":
    sys.exit(main())
