"""`retort quickstart`: corpus → tokenizer → teacher → stored targets → two students → report.

The same functions as the verbs run here, one after the other, on small models. Every stage finds
what an earlier run left under `out` and reuses or resumes it. Held-out documents are set apart
first, by a hash of their name, and nothing but the evaluation reads them.
"""

import hashlib
import json
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gemma2.model import num_parameters
from logit_store import reader, statistics
from pipelines import dump, progress, report, tokenize, training
from schemas.base import Document
from schemas.errors import ConfigError
from schemas.model import TOKENIZER_FILE, ModelConfig
from schemas.runs import (
    CorpusConfig,
    DumpConfig,
    OptimizerConfig,
    QuickstartConfig,
    RateSchedule,
    SamplerConfig,
    TokenizeConfig,
    TrainConfig,
)
from student_train.loop import TrainResult
from teacher_dump import corpus, documents
from teacher_dump import tokenizer as tokenizers

HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Size:
    """What a quickstart of one size makes; the figures were chosen for two CPU cores."""

    corpus_bytes: int
    student_percent: int
    vocab_size: int
    sequence_tokens: int
    teacher: ModelConfig
    student: ModelConfig
    teacher_steps: int
    teacher_learning_rate: float
    student_steps: int
    student_learning_rate: float
    batch_sequences: int
    entries_per_token: int


def _model(vocab_size: int, d_model: int, layers: int, window: int, length: int) -> ModelConfig:
    heads = d_model // 32
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=layers,
        mlp_width=3 * d_model,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_size=32,
        query_scalar=32,
        window_tokens=window,
        max_tokens=length,
    )


SIZES = {
    "tiny": Size(
        corpus_bytes=600_000,
        student_percent=50,
        vocab_size=1024,
        sequence_tokens=128,
        teacher=_model(1024, 64, 2, 32, 128),
        student=_model(1024, 64, 2, 32, 128),
        teacher_steps=120,
        teacher_learning_rate=4e-3,
        student_steps=40,
        student_learning_rate=4e-3,
        batch_sequences=8,
        entries_per_token=8,
    ),
    "small": Size(
        corpus_bytes=16_000_000,
        student_percent=25,
        vocab_size=4096,
        sequence_tokens=256,
        teacher=_model(4096, 128, 4, 64, 256),
        student=_model(4096, 128, 2, 64, 256),
        teacher_steps=800,
        teacher_learning_rate=5e-3,
        student_steps=350,
        student_learning_rate=5e-3,
        batch_sequences=8,
        entries_per_token=12,
    ),
}


class Prepared(Document):
    """What the corpus stage made, so that a second run can tell that it is the same."""

    config: dict[str, str | int | tuple[str, ...]]
    documents: dict[str, int]
    text_bytes: dict[str, int]


def quickstart(config: QuickstartConfig, console: Console) -> Path:
    """Run every stage; returns the path of report.html.

    Raises ConfigError if `config.out` holds a quickstart of another corpus or size.
    """
    started = time.monotonic()
    size = SIZES[config.size]
    out = config.out
    prepared = _prepare_corpus(config, size, console)
    tokenizer_file = _train_tokenizer(out, size, console)
    stores = {name: str(out / f"{name}.zarr") for name in ("teacher", "store", "heldout")}
    for name, store in stores.items():
        done = tokenize.tokenize(
            TokenizeConfig(
                store=store,
                corpus=CorpusConfig(paths=_corpus_paths(out, name)),
                tokenizer=tokenizer_file,
                sequence_tokens=size.sequence_tokens,
                shard_sequences=512,
                split_bytes=1_000_000,
            ),
            console,
        )
        console.print(f"{name}: {done}")

    trained = {}
    trained["teacher"] = teacher = _train(
        config, size, console, stores, tokenizer_file, "teacher", size.teacher, targets=None
    )
    done = dump.dump(
        DumpConfig(
            store=stores["store"],
            teacher=teacher.export,
            sampler=SamplerConfig(entries_per_token=size.entries_per_token),
            batch_sequences=8,
            dtype="float32",
        ),
        console,
    )
    console.print(done)
    for name, targets in (("scratch", None), ("distilled", "default")):
        trained[name] = _train(
            config, size, console, stores, tokenizer_file, name, size.student, targets
        )
    results = [
        _result("teacher", size.teacher, size.teacher_steps, size, teacher),
        _result("student from scratch", size.student, size.student_steps, size, trained["scratch"]),
        _result("distilled student", size.student, size.student_steps, size, trained["distilled"]),
    ]
    path = _write_report(config, size, prepared, stores["store"], tokenizer_file, trained, results)
    _print_table(console, results, stores["store"])
    console.print(f"{time.monotonic() - started:,.0f} s in all; report: {path}")
    return path


# Corpus


def _prepare_corpus(config: QuickstartConfig, size: Size, console: Console) -> Prepared:
    """Documents into JSONL files: `heldout`, and for training `student` (a share) and `rest`."""
    paths = config.corpus or (sysconfig.get_paths()["stdlib"],)
    wanted = {"corpus": paths, "size": config.size}
    marker = config.out / "corpus" / "prepared.json"
    if marker.exists():
        prepared = Prepared.model_validate_json(marker.read_text())
        if json.dumps(prepared.config) != json.dumps(wanted):
            raise ConfigError(
                f"{config.out} must be of the same corpus and size as this run, but it is of "
                f"{prepared.config} and not {wanted}; choose another --out or remove it."
            )
        console.print(f"corpus: {sum(prepared.documents.values()):,} documents reused")
        return prepared
    folder = marker.parent
    folder.mkdir(parents=True, exist_ok=True)
    documents = _select(paths, size, is_default=not config.corpus)
    counts = dict.fromkeys(("heldout", "student", "rest"), 0)
    text_bytes = dict(counts)
    files = {part: (folder / f"{part}.jsonl").open("w", encoding="utf-8") for part in counts}
    with progress.bar(console, "corpus", None, "documents") as advance:
        for number, (name, text) in enumerate(documents, 1):
            part = _part(name, size)
            files[part].write(json.dumps({"text": text, "name": name}) + "\n")
            counts[part] += 1
            text_bytes[part] += len(text.encode())
            advance(number, "")
    for file in files.values():
        file.close()
    for part, count in counts.items():
        if count == 0:
            raise ConfigError(
                f"The corpus must be large enough to be split, but no document fell to the "
                f"'{part}' part of {sum(counts.values())}; give more or smaller documents."
            )
    prepared = Prepared(config=wanted, documents=counts, text_bytes=text_bytes)
    marker.write_text(prepared.model_dump_json())
    return prepared


def _select(paths: tuple[str, ...], size: Size, is_default: bool) -> Iterator[tuple[str, str]]:
    """(name, text) of distinct documents in an order of hashes, up to `size.corpus_bytes`."""
    settings = CorpusConfig(paths=paths)
    total = 0
    seen: set[bytes] = set()
    files = [
        file
        for file in corpus.list_files(settings)
        if not is_default or _is_library_source(Path(file.path).relative_to(paths[0]))
    ]
    files.sort(key=lambda file: hashlib.sha256(Path(file.path).name.encode()).digest())
    for file in files:
        texts = list(documents.file_texts(file.path, settings))
        for number, text in enumerate(texts):
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            total += len(text.encode())
            if total > size.corpus_bytes:
                return
            name = str(Path(file.path))
            yield (name if len(texts) == 1 else f"{name}#{number}"), text


def _is_library_source(path: Path) -> bool:
    """Of the standard library: sources, but no tests (some are broken on purpose), no tables of

    character sets, and no installed packages.
    """
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
    return path.suffix == ".py" and not skipped & set(path.parts)


def _part(name: str, size: Size) -> str:
    """The part a document belongs to, by its name alone, so that it never moves."""
    bucket = int.from_bytes(hashlib.sha256(Path(name).name.encode()).digest()[8:16]) % 100
    if bucket < HELD_OUT_PERCENT:
        return "heldout"
    return "student" if bucket < HELD_OUT_PERCENT + size.student_percent else "rest"


def _corpus_paths(out: Path, store: str) -> tuple[str, ...]:
    parts = {"teacher": ("rest", "student"), "store": ("student",), "heldout": ("heldout",)}
    return tuple(str(out / "corpus" / f"{part}.jsonl") for part in parts[store])


def _train_tokenizer(out: Path, size: Size, console: Console) -> Path:
    """SentencePiece on the training documents; reused if it is there."""
    path = out / TOKENIZER_FILE
    if path.exists():
        console.print("tokenizer: reused")
        return path
    started = time.monotonic()
    settings = CorpusConfig(paths=_corpus_paths(out, "teacher"))
    texts = (text for file in settings.paths for text in documents.file_texts(file, settings))
    with console.status(f"training a tokenizer of {size.vocab_size} pieces"):
        tokenizers.train(texts, path, vocab_size=size.vocab_size)
    console.print(f"tokenizer: {size.vocab_size} pieces in {time.monotonic() - started:.1f} s")
    return path


# Models


def _train(
    config: QuickstartConfig,
    size: Size,
    console: Console,
    stores: dict[str, str],
    tokenizer_file: Path,
    name: str,
    model: ModelConfig,
    targets: str | None,
) -> TrainResult:
    """The teacher, or one of the two students; the students differ in `targets` alone."""
    is_teacher = name == "teacher"
    out = config.out / (name if is_teacher else f"{name}-seed{config.seed}")
    model_file = config.out / f"model-{'teacher' if is_teacher else 'student'}.json"
    model_file.write_text(model.model_dump_json(indent=2))
    steps = size.teacher_steps if is_teacher else size.student_steps
    return training.train(
        TrainConfig(
            store=stores["teacher" if is_teacher else "store"],
            out=out,
            model=str(model_file),
            tokenizer=tokenizer_file,
            targets=targets,
            alpha=1.0 if targets else 0.0,
            steps=steps,
            batch_sequences=size.batch_sequences,
            seed=0 if is_teacher else config.seed,
            dtype="float32",
            loss_chunk_tokens=512,
            remat="none",
            optimizer=OptimizerConfig(
                learning_rate=(
                    size.teacher_learning_rate if is_teacher else size.student_learning_rate
                ),
                schedule=RateSchedule(warmup_steps=max(steps // 20, 1)),
            ),
            eval_store=stores["heldout"],
            checkpoint_every=max(steps // 4, 1),
            keep_checkpoints=1,
            log_every=max(steps // 100, 1),
        ),
        console,
        label=name,
    )


def _result(
    name: str, model: ModelConfig, steps: int, size: Size, trained: TrainResult
) -> report.Result:
    assert trained.evaluation is not None
    assert trained.evaluation.bits_per_byte is not None
    return report.Result(
        name=name,
        parameters=num_parameters(model),
        training_tokens=steps * size.batch_sequences * size.sequence_tokens,
        nats_per_token=trained.evaluation.nats_per_token,
        bits_per_byte=trained.evaluation.bits_per_byte,
    )


# Report


def _write_report(
    config: QuickstartConfig,
    size: Size,
    prepared: Prepared,
    store: str,
    tokenizer_file: Path,
    trained: dict[str, TrainResult],
    results: list[report.Result],
) -> Path:
    """`report.html` beside the store."""
    tokenizer = tokenizers.Tokenizer.load(tokenizer_file)
    targets = reader.TargetsReader(store, "default")
    sequence = targets.manifest.num_sequences // 2
    summary = statistics.summary(store, "default")
    page = targets.rows(np.array([sequence]))
    text = report.render(
        subtitle=(
            f"{sum(prepared.documents.values()):,} documents, "
            f"{sum(prepared.text_bytes.values()):,} bytes; "
            f"{prepared.documents['heldout']:,} of them held out; size {config.size}, "
            f"seed {config.seed}"
        ),
        results=results,
        verdict=verdict(results),
        curves=[_curve(name, run, size) for name, run in trained.items()],
        store=[
            ("sequences x tokens", f"{summary.sequences:,} x {size.sequence_tokens}"),
            ("sampler", targets.manifest.sampler.name),
            ("entries per token", f"{summary.entries_per_token:.2f}"),
            ("stored mass per token", f"{summary.mean_mass:.4f}"),
            ("teacher entropy", f"{summary.mean_entropy_nats:.3f} nats"),
            ("bytes per token", f"{summary.bytes_per_token:.2f}"),
        ],
        arrays=[
            (name, size_bytes, size_bytes / summary.tokens)
            for name, size_bytes in summary.array_bytes.items()
        ],
        page=report.choose_page(page, targets.positions(page), sequence, tokenizer.piece_text),
    )
    path = config.out / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def share_closed(results: list[report.Result]) -> float:
    """Share of the gap between the student from scratch and the teacher that distilling closed."""
    teacher, scratch, distilled = (result.nats_per_token for result in results)
    return (scratch - distilled) / (scratch - teacher)


def verdict(results: list[report.Result]) -> str:
    """One sentence on what distilling changed, whichever way it went."""
    teacher, scratch, distilled = (result.nats_per_token for result in results)
    if scratch <= teacher:
        return (
            f"The teacher ({teacher:.4f}) is no better than the student from scratch "
            f"({scratch:.4f} nats per token), so there is no gap to close."
        )
    if distilled >= scratch:
        return (
            f"The distilled student is {distilled - scratch:.4f} nats per token worse than the one "
            "from scratch: distilling closed none of the gap to the teacher."
        )
    return (
        f"The distilled student is {scratch - distilled:.4f} nats per token better than the one "
        f"from scratch: {100 * share_closed(results):.1f} % of the gap to the teacher is closed."
    )


def _curve(name: str, run: TrainResult, size: Size) -> report.Curve:
    per_step = size.batch_sequences * size.sequence_tokens
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    logged = [record for record in records if "ce" in record]
    held_out = [record for record in records if "eval_nats_per_token" in record]
    return report.Curve(
        name=name,
        tokens=[record["step"] * per_step for record in logged],
        nats=[record["ce"] for record in logged],
        held_out=[(r["step"] * per_step, r["eval_nats_per_token"]) for r in held_out],
    )


def _print_table(console: Console, results: list[report.Result], store: str) -> None:
    table = Table("held out", "parameters", "training tokens", "nats/token", "bits/byte")
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        table.add_row(
            result.name,
            f"{result.parameters:,}",
            f"{result.training_tokens:,}",
            f"{result.nats_per_token:.4f}",
            f"{result.bits_per_byte:.4f}",
        )
    console.print(table)
    console.print(verdict(results))
    summary = statistics.summary(store, "default")
    console.print(
        f"store: {summary.bytes_per_token:.2f} bytes per token, "
        f"{summary.entries_per_token:.2f} entries per token"
    )
