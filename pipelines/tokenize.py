"""`retort tokenize`: documents to packed sequences in a store, as two Beam passes.

Pass 1 counts: each split (a run of input files) reports how many sequences it packs into. The
driver takes the prefix sum, which gives every split its rows, and writes the manifest. Pass 2
writes: each shard packs the splits that overlap it again and commits its rows. Packing is a pure
function of a split's files, so any runner, number of workers and retry give the same store.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from pydantic import Field
from rich.console import Console

from logit_store import manifests, reader, storage, writer
from logit_store.ledger import Ledger
from pipelines import progress, runner, software
from pipelines.answers import Answer, Answers
from pipelines.shards import write_missing
from schemas.base import Document
from schemas.errors import ConfigError, StoreNotFoundError
from schemas.manifest import (
    Corpus,
    LedgerRecord,
    ShardSpec,
    SourceFile,
    Split,
    TokensManifest,
)
from schemas.runs import TokenizeConfig
from teacher_dump import corpus, packing
from teacher_dump.tokenizer import Tokenizer


class SplitSpec(Document):
    """The name of one split to count: a run of the sorted input files."""

    index: int = Field(ge=0)
    first_file: int = Field(ge=0)
    paths: tuple[str, ...]


class SplitCount(Answer):
    """What pass 1 learned of one split; `run` is of the config, the tokenizer and the split."""

    sources: tuple[SourceFile, ...]
    rows: int
    tokens: int


def tokenize(
    config: TokenizeConfig, console: Console, options: PipelineOptions | None = None
) -> str:
    """Tokenize and pack a corpus into `config.store`; returns what was done.

    A finished store is left as it is if the inputs are unchanged. Raises ManifestMismatchError if
    the store was made from other inputs or settings, ConfigError if there is nothing to tokenize.
    """
    _pack.cache_clear()
    manifest, sources = _plan(config, console, options)
    writer.create_tokens(config.store, manifest, sources)
    _counts(config).forget()
    storage.sweep_locks(config.store)
    written, reused = write_missing(
        Ledger(config.store, None, manifest),
        WriteTokens(config),
        console,
        options,
        verb="tokenize",
        stage="tokenize: writing",
    )
    if not written:
        return f"tokens are complete: all {reused} shards reused"
    return f"tokens: {written} shards written, {reused} reused"


def _plan(
    config: TokenizeConfig, console: Console, options: PipelineOptions | None
) -> tuple[TokensManifest, Corpus]:
    """Pass 1 and the prefix sum. Counts that an interrupted run left are used again."""
    tokenizer = Tokenizer.load(config.tokenizer)
    specs = plan_splits(config)
    existing = _existing_manifest(config)
    if existing is not None:
        return _expected_manifest(existing, config, specs)
    counts = _counts(config)
    runs = {spec.index: _run(config, spec) for spec in specs}
    known = counts.get(runs)
    missing = [spec for spec in specs if spec.index not in known]
    with progress.watch(
        console,
        "tokenize: counting",
        len(specs),
        "splits",
        counts.count,
    ):
        runner.run(missing, CountSplit(config), "CountSplit", options)
    known = counts.get(runs)
    sources: list[SourceFile] = []
    splits: list[Split] = []
    row = 0
    for spec in specs:
        count = known[spec.index]
        sources.extend(count.sources)
        splits.append(
            Split(
                first_file=spec.first_file,
                stop_file=spec.first_file + len(spec.paths),
                first_row=row,
                stop_row=row + count.rows,
                tokens=count.tokens,
            )
        )
        row += count.rows
    if row == 0:
        raise ConfigError(
            f"A corpus must hold at least one document, but none of the {len(sources)} files of "
            f"{', '.join(config.corpus.paths)} has one that passes the filters; check corpus.*."
        )
    found = Corpus(sources=tuple(sources), splits=tuple(splits))
    manifest = TokensManifest(
        tokenizer=tokenizer.info,
        num_sequences=row,
        sequence_tokens=config.sequence_tokens,
        shard_sequences=config.shard_sequences,
        corpus=found.summary(),
        software=software.versions(),
    )
    return manifest, found


def plan_splits(config: TokenizeConfig) -> list[SplitSpec]:
    """The sorted input files in runs of about `config.split_bytes`."""
    splits: list[SplitSpec] = []
    paths: list[str] = []
    first = size = 0
    files = corpus.list_files(config.corpus)
    for index, file in enumerate(files):
        if paths and size + file.size_bytes > config.split_bytes:
            splits.append(SplitSpec(index=len(splits), first_file=first, paths=tuple(paths)))
            paths, first, size = [], index, 0
        paths.append(file.path)
        size += file.size_bytes
    if paths:
        splits.append(SplitSpec(index=len(splits), first_file=first, paths=tuple(paths)))
    return splits


class CountSplit(beam.DoFn):
    """A split's name in, its count out; the count itself goes to the store."""

    def __init__(self, config: TokenizeConfig):
        self._config = config

    def process(self, element: str) -> Iterator[int]:
        spec = SplitSpec.model_validate_json(element)
        sources, tokens, segment_ids = _pack(self._config, spec.paths)
        count = SplitCount(
            run=_run(self._config, spec),
            sources=sources,
            rows=len(tokens),
            tokens=int(np.count_nonzero(segment_ids)),
        )
        _counts(self._config).put(spec.index, count)
        yield spec.index


class WriteTokens(beam.DoFn):
    """A shard's name in, its committed ledger record out."""

    def __init__(self, config: TokenizeConfig):
        self._config = config

    def process(self, element: str) -> Iterator[str]:
        spec = ShardSpec.model_validate_json(element)
        yield write_shard(self._config, spec).canonical_json()


def write_shard(config: TokenizeConfig, spec: ShardSpec) -> LedgerRecord:
    """Pack and commit one shard. Raises ConfigError if an input changed since it was counted."""
    tokens_writer = writer.TokensWriter(config.store)
    existing = tokens_writer.committed(spec)
    if existing is not None:
        return existing
    manifest = tokens_writer.manifest
    tokens: list[np.ndarray] = []
    segment_ids: list[np.ndarray] = []
    whole = _read_corpus(config.store, manifest.corpus.sha256)
    for split in whole.splits:
        first, stop = max(spec.first_row, split.first_row), min(spec.stop_row, split.stop_row)
        if first >= stop:
            continue
        expected = whole.sources[split.first_file : split.stop_file]
        sources, split_tokens, split_segments = _pack(config, tuple(s.path for s in expected))
        for before, now in zip(expected, sources, strict=True):
            if before != now:
                raise ConfigError(
                    f"Inputs must not change while they are tokenized, but {now.path} hashed to "
                    f"{before.sha256} when it was counted and to {now.sha256} now; start a new "
                    "store."
                )
        rows = slice(first - split.first_row, stop - split.first_row)
        tokens.append(split_tokens[rows])
        segment_ids.append(split_segments[rows])
    return tokens_writer.write(spec, np.concatenate(tokens), np.concatenate(segment_ids))


@lru_cache(maxsize=1)
def _read_corpus(store: str, sha256: str) -> Corpus:
    """The store's list of sources, once per process and not once per shard; sha256 is its name."""
    return manifests.read_corpus(store, reader.TokensReader(store).manifest)


@lru_cache(maxsize=2)
def _pack(
    config: TokenizeConfig, paths: tuple[str, ...]
) -> tuple[tuple[SourceFile, ...], np.ndarray, np.ndarray]:
    """One split's sources, tokens int32 [rows, L] and segment ids uint16 [rows, L].

    The last two splits are kept, as neighbouring shards share one.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    sources: list[SourceFile] = []
    documents: list[np.ndarray] = []
    for path in paths:
        source, texts = corpus.read_file(path, config.corpus)
        sources.append(source)
        documents.extend(tokenizer.encode_document(text) for text in texts)
    tokens, segment_ids = packing.pack(
        documents, config.sequence_tokens, pad_id=tokenizer.info.pad_id
    )
    return tuple(sources), tokens, segment_ids


def _existing_manifest(config: TokenizeConfig) -> TokensManifest | None:
    try:
        return reader.TokensReader(config.store).manifest
    except StoreNotFoundError:
        return None


def _expected_manifest(
    existing: TokensManifest, config: TokenizeConfig, specs: Sequence[SplitSpec]
) -> tuple[TokensManifest, Corpus]:
    """What the manifest would be for these inputs, as far as can be told without packing them.

    Equal to `existing` if nothing changed; else it differs in the fields that did.
    """
    before = manifests.read_corpus(config.store, existing)
    sources = tuple(
        corpus.read_file(path, config.corpus)[0] for spec in specs for path in spec.paths
    )
    files = [(spec.first_file, spec.first_file + len(spec.paths)) for spec in specs]
    same_splits = files == [(split.first_file, split.stop_file) for split in before.splits]
    splits = tuple(
        Split(first_file=first, stop_file=stop, first_row=0, stop_row=0, tokens=0)
        for first, stop in files
    )
    found = Corpus(sources=sources, splits=before.splits if same_splits else splits)
    manifest = existing.model_copy(
        update={
            "tokenizer": Tokenizer.load(config.tokenizer).info,
            "sequence_tokens": config.sequence_tokens,
            "shard_sequences": config.shard_sequences,
            "corpus": found.summary(),
        }
    )
    return manifest, found


def _counts(config: TokenizeConfig) -> Answers[SplitCount]:
    return Answers(config.store, "counts/", SplitCount)


def _run(config: TokenizeConfig, spec: SplitSpec) -> str:
    tokenizer = Tokenizer.load(config.tokenizer).info.sha256
    return f"{config.fingerprint()}-{tokenizer}-{spec.fingerprint()}"
