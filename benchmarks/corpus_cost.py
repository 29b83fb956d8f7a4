"""`retort tokenize` on 1, 10 and 100 times as much text: CPU time a token and peak memory.

`python -m benchmarks.corpus_cost` cuts Python's own sources into lines, mixes them into documents
of about 2 kB (`--document-bytes`), and lays the same documents out as files of lines, as one file
of lines and as a file for each. Each corpus is tokenized in a process of its own, after a small
one, so that start-up is not in the figures; CPU time is of that process and its threads, and the
largest split is by bytes, over their mean. `--filters` turns on near-duplicate removal, Gopher's
rules and masking.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pipelines import tokenize
from schemas.corpus import CorpusConfig
from schemas.runs import TokenizeConfig
from teacher_dump import tokenizer as tokenizers

FILES_PER_FOLDER = 1000
LAYOUTS = ["files of lines", "one file", "a file each"]
FILTERS = {
    "duplicates": {"exact": True, "near": True},
    "quality": {"preset": "gopher", "min_words": 10, "min_stop_words": 0},
    "masking": {"kinds": ["email", "ip", "card", "iban", "phone"]},
}


def documents(total_bytes: int, document_bytes: int, lines: list[str]) -> Iterator[str]:
    """Texts of about `document_bytes`, the same for every layout."""
    rng = random.Random(0)
    done = 0
    while done < total_bytes:
        text = ""
        while len(text) < document_bytes:
            text += rng.choice(lines) + "\n"
        done += len(text)
        yield text


def lay_out(folder: Path, layout: str, texts: Iterator[str]) -> None:
    folder.mkdir()
    if layout == "a file each":
        for number, text in enumerate(texts):
            inner = folder / f"{number // FILES_PER_FOLDER:06d}"
            inner.mkdir(exist_ok=True)
            (inner / f"{number:07d}.txt").write_text(text)
        return
    per_file = 100 if layout == "files of lines" else 10**9
    for number, text in enumerate(texts):
        with (folder / f"{number // per_file:06d}.jsonl").open("a") as file:
            file.write(json.dumps({"text": text}) + "\n")


def config(folder: Path, corpus: str, filters: bool) -> TokenizeConfig:
    settings = {"paths": [str(folder / corpus)], **(FILTERS if filters else {})}
    return TokenizeConfig(
        store=str(folder / "stores" / corpus),
        corpus=CorpusConfig.model_validate(settings),
        tokenizer=folder / "tokenizer.model",
        sequence_tokens=512,
        split_bytes=256 * 1024,
    )


def child(folder: Path, corpus: str, filters: bool) -> None:
    """Tokenize one corpus and print what it took."""
    from logit_store import manifests, reader

    quiet = Console(quiet=True)
    warm = config(folder, "warm", filters)
    store = f"{folder}/stores/warm-{time.time_ns()}"
    tokenize.tokenize(warm.model_copy(update={"store": store}), quiet)
    wanted = config(folder, corpus, filters)
    began, start = time.monotonic(), time.process_time()
    tokenize.tokenize(wanted, quiet)
    seconds, elapsed = time.process_time() - start, time.monotonic() - began
    report = manifests.read_report(wanted.store)
    assert report is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    whole = manifests.read_corpus(wanted.store, reader.TokensReader(wanted.store).manifest)
    sizes = [
        sum(source.size_bytes for source in whole.sources[split.first_file : split.stop_file])
        for split in whole.splits
    ]
    found = {
        "seconds": seconds,
        "elapsed": elapsed,
        "peak_mib": peak,
        "largest": max(sizes) * len(sizes) / sum(sizes),
        "report": report.model_dump(),
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="Of the smallest corpus.")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--document-bytes", type=int, default=2000)
    parser.add_argument("--filters", action="store_true")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1], arguments.filters)
        return
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = [line for path in library for line in path.read_text().splitlines() if line.strip()]
    print(
        "| corpus | files | tokens | splits, largest | elapsed | CPU time a token | peak memory |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizers.train(lines, folder / "tokenizer.model", vocab_size=4096)
            lay_out(folder / "warm", layout, documents(50_000, arguments.document_bytes, lines))
            first = None
            for times in arguments.times:
                texts = documents(times * arguments.bytes, arguments.document_bytes, lines)
                lay_out(folder / str(times), layout, texts)
                command = [sys.executable, "-m", "benchmarks.corpus_cost"]
                command += ["--child", name, str(times)] + ["--filters"] * arguments.filters
                found = json.loads(subprocess.check_output(command).splitlines()[-1])
                report = found["report"]
                cost = found["seconds"] / report["tokens"]
                first = first or (cost, found["peak_mib"])
                print(
                    f"| {layout} | {report['files']:,} | {report['tokens']:,} "
                    f"| {report['splits']:,}, {found['largest']:.2f} | {found['elapsed']:,.0f} s "
                    f"| {cost * 1e6:.2f} µs, {cost / first[0]:.2f} | {found['peak_mib']:,.0f} MiB, "
                    f"{found['peak_mib'] / first[1]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
