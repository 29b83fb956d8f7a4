"""What `retort tokenize` knows before it writes a row: the splits, what is in them, their rows.

Pass 1 counts each split; the driver then decides which documents are taken and how often, and takes
the prefix sum, which gives every split its rows. What passes between them lies under `plan/` in the
store, and is gone when the manifest and the files beside the list of sources are there.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import apache_beam as beam
import numpy as np
from pydantic import Field

from logit_store import layout, manifests, storage
from pipelines import software
from pipelines.answers import Answer, Answers
from schemas.base import Document
from schemas.errors import ConfigError
from schemas.manifest import (
    Corpus,
    CorpusReport,
    SourceFile,
    Split,
    TokensManifest,
)
from schemas.runs import TokenizeConfig
from teacher_dump import corpus, documents, packing, selection
from teacher_dump.corpus import Part
from teacher_dump.documents import Columns
from teacher_dump.tokenizer import Tokenizer

FOLDER = "plan/"
_THREADS = 16


class SplitSpec(Document):
    """The name of one split; its parts lie in the store, as there may be a thousand."""

    index: int = Field(ge=0)
    parts_sha256: str
    run: str = Field(description="Of the config, the tokenizer, the filters' files and the parts.")


class SplitParts(Document):
    """What a split consists of."""

    parts: tuple[Part, ...]


class CountedFile(Document):
    """A part as it was read."""

    size_bytes: int
    sha256: str
    records: int


class SplitCount(Answer):
    """What pass 1 learned of one split, but for what it says of each record."""

    files: tuple[CountedFile, ...]
    dead_letters: dict[str, int]
    listed_dead_letters: int
    masked: dict[str, int]


class SplitIdentity(Answer):
    """A split's files as they are now."""

    files: tuple[CountedFile, ...]


@dataclass(frozen=True)
class Found:
    """A plan: the manifest, the list of sources, and the files that lie beside it, by key."""

    manifest: TokensManifest
    corpus: Corpus
    report: CorpusReport
    files: dict[str, Callable[[], bytes]]


class CountSplit(beam.DoFn):
    """A split's name in, its number out; what was counted goes to the store."""

    def __init__(self, config: TokenizeConfig):
        self._config = config

    def process(self, element: str) -> Iterator[int]:
        spec = SplitSpec.model_validate_json(element)
        desk = Desk(self._config)
        tokenizer = Tokenizer.load(self._config.tokenizer)
        counted = documents.count(desk.parts(spec), self._config.corpus, tokenizer)
        desk.put_columns(spec, counted.columns)
        if counted.letters:
            desk.put_letters(spec, [letter.canonical_json() for letter in counted.letters])
        count = SplitCount(
            run=spec.run,
            files=tuple(
                CountedFile(size_bytes=p.size_bytes, sha256=p.sha256, records=p.records)
                for p in counted.parts
            ),
            dead_letters=counted.dead_letters,
            listed_dead_letters=len(counted.letters),
            masked=counted.masked,
        )
        desk.counts.put(spec.index, count)
        yield spec.index


class IdentifySplit(beam.DoFn):
    """A split's name in, its number out; what its files are now goes to the store."""

    def __init__(self, config: TokenizeConfig):
        self._config = config

    def process(self, element: str) -> Iterator[int]:
        spec = SplitSpec.model_validate_json(element)
        desk = Desk(self._config)
        tokenizer = Tokenizer.load(self._config.tokenizer)
        files = []
        for part in desk.parts(spec):
            size_bytes, sha256 = documents.identify(part, self._config.corpus, tokenizer)
            files.append(CountedFile(size_bytes=size_bytes, sha256=sha256, records=0))
        desk.identities.put(spec.index, SplitIdentity(run=spec.run, files=tuple(files)))
        yield spec.index


class Desk:
    """What passes between the driver and pass 1, in a folder of the store."""

    def __init__(self, config: TokenizeConfig):
        self._config = config
        # Of two drivers with different configs neither may touch the other's.
        self._folder = f"{FOLDER}{config.fingerprint()[:16]}/"
        self.counts = Answers(config.store, f"{self._folder}counts/", SplitCount)
        self.identities = Answers(config.store, f"{self._folder}identities/", SplitIdentity)

    @cached_property
    def _store(self) -> Any:
        return storage.open_kvstore(self._config.store, self._folder)

    def lay_out(self, splits: Sequence[Sequence[Part]]) -> list[SplitSpec]:
        """Write down what each split is; equal splits, equal specs."""
        config = self._config
        tokenizer = Tokenizer.load(config.tokenizer).info.sha256
        common = f"{config.fingerprint()}-{tokenizer}-{documents.filter_files(config.corpus)}"
        specs = []
        for index, parts in enumerate(splits):
            found = SplitParts(parts=tuple(parts))
            sha256 = found.fingerprint()
            run = hashlib.sha256(f"{common}-{index}-{sha256}".encode()).hexdigest()
            specs.append(SplitSpec(index=index, parts_sha256=sha256, run=run))
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._put_parts, range(len(splits)), splits))
        return specs

    def _put_parts(self, index: int, parts: Sequence[Part]) -> None:
        found = SplitParts(parts=tuple(parts)).canonical_json().encode()
        key = _name("parts", index)
        if storage.read_bytes(self._store, key) != found:
            storage.write_bytes(self._store, key, found)

    def parts(self, spec: SplitSpec) -> tuple[Part, ...]:
        """Raises ConfigError if another driver has finished or found other files meanwhile."""
        raw = self._read("parts", spec.index)
        if hashlib.sha256(raw).hexdigest() != spec.parts_sha256:
            raise self._taken()
        return SplitParts.model_validate_json(raw).parts

    def put_columns(self, spec: SplitSpec, columns: Columns) -> None:
        raw = io.BytesIO()
        np.savez(raw, reasons=np.asarray(columns.reasons), **columns.values)  # type: ignore[arg-type]
        storage.write_bytes(self._store, _name("columns", spec.index, spec.run), raw.getvalue())

    def columns(self, spec: SplitSpec) -> Columns:
        raw = self._read("columns", spec.index, spec.run)
        with np.load(io.BytesIO(raw), allow_pickle=False) as found:
            values = {name: found[name] for name in found.files}
        return Columns(tuple(values.pop("reasons").tolist()), values)

    def put_letters(self, spec: SplitSpec, lines: list[str]) -> None:
        raw = "".join(f"{line}\n" for line in lines).encode()
        storage.write_bytes(self._store, _name("letters", spec.index, spec.run), raw)

    def letters(self, spec: SplitSpec) -> bytes:
        return self._read("letters", spec.index, spec.run)

    def counted(self, specs: Sequence[SplitSpec]) -> list[SplitCount]:
        """What was counted of every split. Raises ConfigError if something is gone."""
        found = self.counts.get({spec.index: spec.run for spec in specs})
        if len(found) < len(specs):
            raise self._taken()
        return [found[spec.index] for spec in specs]

    def clear(self, others: bool) -> None:
        """Take all away, and what runs with other configs left, if so; for the driver alone."""
        store = storage.open_kvstore(self._config.store, FOLDER) if others else self._store
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda key: storage.delete(store, key), storage.list_keys(store)))

    def _read(self, kind: str, index: int, run: str = "") -> bytes:
        raw = storage.read_bytes(self._store, _name(kind, index, run))
        if raw is None:
            raise self._taken()
        return raw

    def _taken(self) -> ConfigError:
        return ConfigError(
            f"A store must be planned by one job at a time, but another plans or has planned "
            f"{self._config.store} meanwhile; run again when it has ended."
        )


def cut(config: TokenizeConfig) -> list[list[Part]]:
    """The corpus in splits. Raises ConfigError as `teacher_dump.corpus.list_files` does."""
    files = corpus.list_files(config.corpus)
    return corpus.split(files, config.corpus, config.split_bytes)


def recipe(config: TokenizeConfig) -> dict[str, object] | None:
    """What `schemas.manifest.Corpus.recipe` says; None if there is nothing but defaults."""
    found = config.corpus.model_dump(mode="json", exclude_defaults=True, exclude={"paths"})
    for group in found.get("mixture", ()):
        del group["paths"]
    files = documents.filter_files(config.corpus)
    return found | ({"files": files} if files else {}) or None


def put_together(config: TokenizeConfig, desk: Desk, specs: Sequence[SplitSpec]) -> Found:
    """Decide what is taken, and take the prefix sum. Raises ConfigError if nothing is."""
    counts = desk.counted(specs)
    parts = [desk.parts(spec) for spec in specs]
    groups = [
        [(part.group, file.records) for part, file in zip(some, counts[i].files, strict=True)]
        for i, some in enumerate(parts)
    ]
    chosen = selection.select(config.corpus, groups, lambda split: desk.columns(specs[split]))
    sources: list[SourceFile] = []
    splits: list[Split] = []
    files: dict[str, Callable[[], bytes]] = {}
    row = letter_bytes = 0
    for spec, some, index in zip(specs, parts, chosen.indices, strict=True):
        count = counts[spec.index]
        text_bytes = desk.columns(spec)["text_bytes"].astype(np.int64) * index.copies
        first_file, record = len(sources), 0
        for part, file in zip(some, count.files, strict=True):
            records = slice(record, record + file.records)
            record += file.records
            sources.append(
                SourceFile(
                    path=part.path,
                    size_bytes=file.size_bytes,
                    sha256=file.sha256,
                    documents=int(index.copies[records].sum(dtype=np.int64)),
                    text_bytes=int(text_bytes[records].sum()),
                    part=part.part,
                    group=part.group if config.corpus.mixture else None,
                )
            )
        tokens = index.total_tokens()
        rows = packing.count_rows([tokens], config.sequence_tokens)
        files[layout.documents_key(spec.index)] = index.to_bytes
        letters = desk.letters(spec) if count.listed_dead_letters else None
        if letters is not None:
            letter_bytes += len(letters)
            files[layout.dead_letters_key(spec.index)] = partial(desk.letters, spec)
        splits.append(
            Split(
                first_file=first_file,
                stop_file=len(sources),
                first_row=row,
                stop_row=row + rows,
                tokens=tokens,
                documents_sha256=hashlib.sha256(index.to_bytes()).hexdigest(),
                dead_letters_sha256=None
                if letters is None
                else hashlib.sha256(letters).hexdigest(),
            )
        )
        row += rows
    report = _report(config, counts, chosen, sources, splits, letter_bytes)
    if row == 0:
        raise ConfigError(_nothing(config, report))
    raw = report_bytes(report)
    files[layout.REPORT_KEY] = lambda: raw
    found = Corpus(
        sources=tuple(sources),
        splits=tuple(splits),
        recipe=recipe(config),
        report_sha256=hashlib.sha256(raw).hexdigest(),
    )
    manifest = TokensManifest(
        tokenizer=Tokenizer.load(config.tokenizer).info,
        num_sequences=row,
        sequence_tokens=config.sequence_tokens,
        shard_sequences=config.shard_sequences,
        corpus=found.summary(),
        software=software.versions(),
    )
    return Found(manifest, found, report, files)


def report_bytes(report: CorpusReport) -> bytes:
    document = report.model_dump(mode="json")
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def write_files(url: str, files: dict[str, Callable[[], bytes]]) -> None:
    """Write what lies beside the list of sources; for the driver alone, after the manifest."""
    store = storage.open_kvstore(url)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda item: storage.write_bytes(store, item[0], item[1]()), files.items()))


def files_are_whole(url: str, found: Corpus) -> bool:
    """Whether all that lies beside the list of sources is there as it says."""
    store = storage.open_kvstore(url)

    def is_whole(item: tuple[str, str]) -> bool:
        raw = storage.read_bytes(store, item[0])
        return raw is not None and hashlib.sha256(raw).hexdigest() == item[1]

    with ThreadPoolExecutor(_THREADS) as pool:
        return all(pool.map(is_whole, manifests.corpus_files(found).items()))


def expected(
    existing: TokensManifest, config: TokenizeConfig, desk: Desk, specs: Sequence[SplitSpec]
) -> tuple[TokensManifest, Corpus]:
    """What the manifest would be for the inputs as they are now, as far as hashes tell.

    Equal to `existing` if nothing changed; else it differs in the fields that did.
    """
    before = manifests.read_corpus(config.store, existing)
    identities = desk.identities.get({spec.index: spec.run for spec in specs})
    sources: list[SourceFile] = []
    edges = []
    for spec in specs:
        first = len(sources)
        for part, file in zip(desk.parts(spec), identities[spec.index].files, strict=True):
            sources.append(
                SourceFile(
                    path=part.path,
                    size_bytes=file.size_bytes,
                    sha256=file.sha256,
                    documents=0,
                    text_bytes=0,
                    part=part.part,
                    group=part.group if config.corpus.mixture else None,
                )
            )
        edges.append((first, len(sources)))
    if len(sources) == len(before.sources):
        # Files that are the same have the same documents.
        sources = [
            old if _place(old) == _place(new) else new
            for old, new in zip(before.sources, sources, strict=True)
        ]
    same_splits = edges == [(split.first_file, split.stop_file) for split in before.splits]
    splits = (
        before.splits
        if same_splits
        else tuple(
            Split(first_file=first, stop_file=stop, first_row=0, stop_row=0, tokens=0)
            for first, stop in edges
        )
    )
    found = before.model_copy(
        update={"sources": tuple(sources), "splits": splits, "recipe": recipe(config)}
    )
    manifest = existing.model_copy(
        update={
            "tokenizer": Tokenizer.load(config.tokenizer).info,
            "sequence_tokens": config.sequence_tokens,
            "shard_sequences": config.shard_sequences,
            "corpus": found.summary(),
        }
    )
    return manifest, found


def _place(source: SourceFile) -> SourceFile:
    return source.model_copy(update={"documents": 0, "text_bytes": 0})


def _report(
    config: TokenizeConfig,
    counts: Sequence[SplitCount],
    chosen: selection.Selection,
    sources: Sequence[SourceFile],
    splits: Sequence[Split],
    letter_bytes: int,
) -> CorpusReport:
    letters, masked = Counter[str](), Counter[str]()
    for count in counts:
        letters.update(count.dead_letters)
        masked.update(count.masked)
    rows = splits[-1].stop_row if splits else 0
    tokens = sum(split.tokens for split in splits)
    return CorpusReport(
        files=len({source.path for source in sources}),
        parts=len(sources),
        splits=len(splits),
        file_bytes=sum(source.size_bytes for source in sources),
        documents_read=sum(len(index.copies) for index in chosen.indices),
        documents_kept=sum(int((index.copies > 0).sum()) for index in chosen.indices),
        dropped=chosen.dropped,
        dead_letters=dict(sorted(letters.items())),
        unlisted_dead_letters=letters.total() - sum(count.listed_dead_letters for count in counts),
        dead_letter_bytes=letter_bytes or None,
        masked=dict(sorted(masked.items())),
        documents=sum(source.documents for source in sources),
        text_bytes=sum(source.text_bytes for source in sources),
        tokens=tokens,
        rows=rows,
        padding_share=1 - tokens / (rows * config.sequence_tokens) if rows else 0.0,
        mixture=chosen.groups,
    )


def _nothing(config: TokenizeConfig, report: CorpusReport) -> str:
    paths = ", ".join(path for group in config.corpus.groups for path in group)
    reasons = Counter(report.dropped) + Counter(report.dead_letters)
    why = ", ".join(f"{name} {number:,}" for name, number in reasons.most_common(5))
    return (
        f"A corpus must hold at least one document, but none of the {report.files} files of "
        f"{paths} has one that can be read and passes the filters ({why or 'they are empty'}); "
        "check corpus.*."
    )


def _name(kind: str, index: int, run: str = "") -> str:
    return f"{kind}/{index:08d}{'-' if run else ''}{run}"
