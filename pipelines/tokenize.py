"""`retort tokenize`: documents to packed sequences in a store, as two Beam passes.

Pass 1 counts: each split (a run of input files, or a part of a large one) reports its documents.
The driver decides which are taken, takes the prefix sum, which gives every split its rows, and
writes the manifest (`pipelines.tokenize_plan`). Pass 2 writes: each shard reads the splits that
overlap it again, tokenizes what its rows need and commits them. Packing is a pure function of a
split's files and of what was decided, so any runner, number of workers and retry give the same
store.
"""

import time
from collections.abc import Iterator
from functools import lru_cache

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console

from logit_store import layout, manifests, reader, storage, writer
from logit_store.documents import Index, read_index
from logit_store.ledger import Ledger
from pipelines import progress, runner, tokenize_plan, tokenize_view
from pipelines.shards import write_missing
from pipelines.tokenize_plan import CountSplit, Desk, IdentifySplit
from schemas.errors import ConfigError, ManifestMismatchError, StoreNotFoundError
from schemas.manifest import Corpus, LedgerRecord, ShardSpec, Split, TokensManifest
from schemas.runs import TokenizeConfig
from teacher_dump import corpus, documents
from teacher_dump.corpus import Part
from teacher_dump.tokenizer import Tokenizer


def tokenize(
    config: TokenizeConfig, console: Console, options: PipelineOptions | None = None
) -> str:
    """Tokenize and pack a corpus into `config.store`; returns what was done.

    A finished store is left as it is if the inputs are unchanged. Raises ManifestMismatchError if
    the store was made from other inputs or settings, ConfigError if there is nothing to tokenize.
    """
    started = time.monotonic()
    _read_corpus.cache_clear()
    documents.check(config.corpus)
    manifest = _plan(config, console, options)
    planned = time.monotonic()
    storage.sweep_locks(config.store)
    written, reused = write_missing(
        Ledger(config.store, None, manifest),
        WriteTokens(config),
        console,
        options,
        verb="tokenize",
        stage="tokenize: writing",
    )
    report = manifests.read_report(config.store)
    if report is not None:
        seconds = (planned - started, time.monotonic() - planned) if written else None
        console.print(tokenize_view.text(report, config.store, seconds))
    if not written:
        return f"tokens are complete: all {reused} shards reused"
    return f"tokens: {written} shards written, {reused} reused"


def _plan(
    config: TokenizeConfig, console: Console, options: PipelineOptions | None
) -> TokensManifest:
    """Pass 1 and what follows from it, up to an empty store. What an interrupted run left is used.

    Of a store that is there already only the files' hashes are compared.
    """
    desk = Desk(config)
    splits = tokenize_plan.cut(config)
    specs = desk.lay_out(splits)
    large = corpus.too_large(splits, config.split_bytes)
    # Of a million files, a gigabyte that the job does without.
    del splits
    existing = _existing_manifest(config)
    if existing is not None:
        before = manifests.read_corpus(config.store, existing)
        if tokenize_plan.files_are_whole(config.store, before):
            # Those of an earlier run may be of other files.
            desk.identities.forget()
            with progress.watch(
                console, "tokenize: checking", len(specs), "splits", desk.identities.count
            ):
                runner.run(specs, IdentifySplit(config), "IdentifySplit", options)
            manifest, found = tokenize_plan.expected(existing, config, desk, specs)
            _create(desk, config, manifest, found)
            desk.clear(others=True)
            return manifest
    if large:
        notice = tokenize_view.too_large(large, corpus.most_part_bytes(config.split_bytes))
        console.print(f"tokenize: {notice}", markup=False)
    known = desk.counts.get({spec.index: spec.run for spec in specs})
    missing = [spec for spec in specs if spec.index not in known]
    with progress.watch(console, "tokenize: counting", len(specs), "splits", desk.counts.count):
        runner.run(missing, CountSplit(config), "CountSplit", options)
    plan = tokenize_plan.put_together(config, desk, specs)
    _create(desk, config, plan.manifest, plan.corpus)
    # Only now, as of two drivers with different configs the other may have won.
    tokenize_plan.write_files(config.store, plan.files)
    desk.clear(others=True)
    return plan.manifest


def _create(desk: Desk, config: TokenizeConfig, manifest: TokensManifest, found: Corpus) -> None:
    """As `writer.create_tokens`; a plan that is refused leaves nothing in another's store."""
    try:
        writer.create_tokens(config.store, manifest, found)
    except ManifestMismatchError:
        desk.clear(others=False)
        raise


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
    for number, split in enumerate(whole.splits):
        first, stop = max(spec.first_row, split.first_row), min(spec.stop_row, split.stop_row)
        if first >= stop:
            continue
        rows = _rows(config, whole, number, first - split.first_row, stop - split.first_row)
        tokens.append(rows[0])
        segment_ids.append(rows[1])
    return tokens_writer.write(spec, np.concatenate(tokens), np.concatenate(segment_ids))


def _rows(
    config: TokenizeConfig, whole: Corpus, number: int, first: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [R, L] and segment ids uint16 [R, L] of some rows of a split."""
    split = whole.splits[number]
    sources = whole.sources[split.first_file : split.stop_file]
    index = _index(config.store, number, split)
    parts = [
        Part(path=s.path, group=s.group or 0, part=s.part, size_bytes=s.size_bytes) for s in sources
    ]
    tokenizer = Tokenizer.load(config.tokenizer)
    found = documents.rows(
        parts, config.corpus, tokenizer, index, first, stop, config.sequence_tokens
    )
    now = (
        [documents.identify(part, config.corpus, tokenizer) for part in parts]
        if found is None
        else found[2]
    )
    for source, (size_bytes, sha256) in zip(sources, now, strict=True):
        if (source.size_bytes, source.sha256) != (size_bytes, sha256):
            raise ConfigError(
                f"Inputs must not change while they are tokenized, but {source.path} hashed to "
                f"{source.sha256} when it was counted and to {sha256} now; start a new store."
            )
    if found is None:
        raise ConfigError(
            f"Equal files must give equal tokens, but those of {sources[0].path} and "
            f"{len(sources) - 1} more do not; use the version of retort that began the store."
        )
    return found[:2]


@lru_cache(maxsize=1)
def _read_corpus(store: str, sha256: str) -> Corpus:
    """The store's list of sources, once per process and not once per shard; sha256 is its name."""
    return manifests.read_corpus(store, reader.TokensReader(store).manifest)


def _index(store: str, number: int, split: Split) -> Index:
    """Raises ConfigError if the store was made without, CorruptStoreError if it is damaged."""
    found = read_index(store, number, split)
    if found is None:
        raise ConfigError(
            f"A store is continued only with its {layout.DOCUMENTS}, but {store} was made by an "
            "older version, without; tokenize into a new store."
        )
    return found


def _existing_manifest(config: TokenizeConfig) -> TokensManifest | None:
    try:
        return reader.TokensReader(config.store).manifest
    except StoreNotFoundError:
        return None
