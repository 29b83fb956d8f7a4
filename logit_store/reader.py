"""Reads committed rows. Rows are found by arithmetic; of a finished store nothing is listed.

A reader sees what was committed when it was opened, or when `refresh` was last called. Its memory
is that of the rows asked for, twice (as stored and decoded), and a few megabytes of tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from logit_store import codec, layout, manifests, remote, seals, storage
from logit_store.codec import Vocabulary
from logit_store.ledger import Ledger
from logit_store.manifests import list_targets
from logit_store.rows import TargetRows, decode_entries
from schemas.errors import CorruptStoreError, IncompleteStoreError, ManifestMismatchError
from schemas.manifest import Manifest, TargetsManifest, TokensManifest, identity

__all__ = ["TargetBatch", "TargetsReader", "TokenRows", "TokensReader", "list_targets"]


@dataclass(frozen=True)
class TokenRows:
    """tokens int32 [R, L] and segment_ids int32 [R, L], 0 for padding."""

    tokens: np.ndarray
    segment_ids: np.ndarray


@dataclass(frozen=True)
class TargetBatch:
    """Rows as the trainer uses them; E entry slots a row, -1 and weight 0 where unused.

    tokens, segment_ids int32 [R, L]; entry_id int32 [R, E]; entry_weight float32 [R, E]; head_count
    and tail_count uint16 [R, L], the entries of each position, which are the target for the next
    token; teacher_entropy, label_logprob float32 [R, L] in nats. Block b owns slots
    [b K, (b + 1) K): its heads, then its tails, each by position; `codec.entry_positions` gives the
    position of each. An id equal to the vocabulary's size, which only top_k stores, stands for all
    ids without an entry.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    entry_id: np.ndarray
    entry_weight: np.ndarray
    head_count: np.ndarray
    tail_count: np.ndarray
    teacher_entropy: np.ndarray
    label_logprob: np.ndarray


class Sealed(NamedTuple):
    """Every array's values for R rows, without their seals, and these, uint32 [R]."""

    columns: dict[str, np.ndarray]
    seals: np.ndarray


class _Rows:
    """Committed rows of one group's arrays."""

    def __init__(self, url: str, name: str | None):
        self.url = url
        self._name = name
        self._manifest: Manifest = manifests.read_manifest(url, name)
        self.ledger = Ledger(url, name, self._manifest)
        self._arrays: dict[str, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look again at which shards are committed: bool [num_shards]."""
        self.committed: np.ndarray = self.ledger.committed()

    def request(self, rows: Sequence[int] | np.ndarray) -> Callable[[np.ndarray], Sealed]:
        """Ask for rows of all arrays at once; what is returned waits for them.

        It takes what the rows' seals start from, uint64 [R], and gives their values in the order
        asked for. Raises IndexError for what is no row and IncompleteStoreError for rows not
        committed; CorruptStoreError for bytes that are damaged, missing or another row's.
        """
        index = self._index(rows)
        if not self._arrays:
            group = layout.group_path(self._name)
            self._arrays = {
                name: storage.open_array(self.url, group, spec)
                for name, spec in layout.row_arrays(self._manifest).items()
            }
        distinct, place = np.unique(index, return_inverse=True)
        # TensorStore copies rows that are asked for twice value by value, six times slower.
        repeats = len(distinct) < len(index)
        wanted = distinct if repeats else index
        # Together, so that arrays that share a request make one.
        with ts.Batch() as batch:
            reads = {name: a[wanted].read(batch=batch) for name, a in self._arrays.items()}

        def wait(start: np.ndarray) -> Sealed:
            found = {}
            for name, read in reads.items():
                try:
                    values = read.result()
                except (ValueError, OSError) as error:
                    remote.raise_if_unanswered(self.url, error)
                    raise self._damage(name, distinct, error) from error
                found[name] = values[place] if repeats else values
            columns, sealed = seals.detach(found)
            strange = seals.seal(start, columns) != sealed
            if strange.any():
                raise self._strange(index[strange])
            return Sealed(columns, sealed)

        return wait

    def _strange(self, index: np.ndarray) -> CorruptStoreError:
        """The error for rows that are whole and not these rows."""
        shards = index // self._manifest.shard_sequences
        arrays = " or ".join(layout.group_path(self._name) + name for name in self._arrays)
        cause = "" if self._name is None else ", or is of other tokens"
        return CorruptStoreError(
            f"Rows must be those that were written in their place, but rows {_few(index)} of "
            f"{self.url} are not: in shards {_few(shards)} a file of {arrays} is another's{cause}; "
            f"run `retort verify {self.url}`."
        )

    def _index(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [R], all of them committed rows."""
        total = self._manifest.num_sequences
        given = np.asarray(rows)
        index = given.astype(np.int64) if given.dtype.kind in "iu" or not given.size else None
        if index is None or index.ndim != 1 or ((index < 0) | (index >= total)).any():
            raise IndexError(
                f"Rows must be a list of whole numbers in [0, {total}), but they are "
                f"{given.tolist()[:8]}."
            )
        shards = index // self._manifest.shard_sequences
        is_missing = ~self.committed[shards]
        if is_missing.any():
            what = "tokens" if self._name is None else f"targets '{self._name}'"
            raise IncompleteStoreError(
                f"Only committed rows can be read, but rows {_few(index[is_missing])}, of shards "
                f"{_few(shards[is_missing])} of the {what} of {self.url}, are not; run the job "
                "that writes them again."
            )
        return index

    def _damage(self, name: str, index: np.ndarray, error: Exception) -> CorruptStoreError:
        """The error for an array that could not be read, with the shards that are to blame."""
        shards = index // self._manifest.shard_sequences
        bad = []
        for shard in np.unique(shards):
            try:
                self._arrays[name][index[shards == shard]].read().result()
            except (ValueError, OSError) as found:
                bad.append(shard)
                error = found
        array = layout.group_path(self._name) + name
        return CorruptStoreError(
            f"Stored bytes must be there and match their checksums, but those of {array} in shards "
            f"{_few(np.array(bad))} of {self.url} do not ({str(error).splitlines()[0]}); run "
            f"`retort verify {self.url}`."
        )


def _few(values: np.ndarray) -> str:
    """The first of the values, each once, in order."""
    distinct = np.unique(values).tolist()
    return str(distinct) if len(distinct) <= 8 else f"{distinct[:8]} and {len(distinct) - 8} more"


class TokensReader(_Rows):
    """The tokens of a store."""

    def __init__(self, url: str):
        super().__init__(url, None)

    @property
    def manifest(self) -> TokensManifest:
        assert isinstance(self._manifest, TokensManifest)
        return self._manifest

    def rows(self, rows: Sequence[int] | np.ndarray) -> TokenRows:
        """Tokens and segment ids of the given rows, in their order."""
        found = self.request(rows)(np.asarray(rows)).columns
        return TokenRows(found["tokens"], found["segment_ids"].astype(np.int32))


class TargetsReader(_Rows):
    """One set of targets with the tokens it was computed from."""

    def __init__(self, url: str, name: str):
        super().__init__(url, name)
        self.vocabulary = read_vocabulary(url, name, self.manifest)
        self.tokens = TokensReader(url)
        found = identity(self.tokens.manifest)
        if self.manifest.tokens_fingerprint != found:
            raise ManifestMismatchError(
                f"Targets must be over the tokens of their store, but '{name}' was computed from "
                f"{self.manifest.tokens_fingerprint} and {url} holds {found}; dump them again."
            )

    @property
    def manifest(self) -> TargetsManifest:
        assert isinstance(self._manifest, TargetsManifest)
        return self._manifest

    def positions(self, batch: TargetBatch) -> np.ndarray:
        """int32 [R, E]: the position of each entry, and of an unused slot its block's last."""
        sampler = self.manifest.sampler
        return codec.entry_positions(
            batch.head_count, batch.tail_count, sampler.block_tokens, sampler.slots_per_block
        )

    def rows(self, rows: Sequence[int] | np.ndarray) -> TargetBatch:
        """Decoded targets of the given rows, in their order. Raises as `request` does."""
        # Both are on their way before either is waited for.
        tokens_read, read = self.tokens.request(rows), self.request(rows)
        tokens, tokens_seals = tokens_read(np.asarray(rows))
        stored = TargetRows(**read(tokens_seals).columns)
        segment_ids = tokens["segment_ids"]
        try:
            entries = decode_entries(self.manifest, self.vocabulary, segment_ids, stored)
        except CorruptStoreError as error:
            raise CorruptStoreError(
                f"{error} Rows {_few(np.asarray(rows))} of {self.url}."
            ) from error
        return TargetBatch(
            tokens=tokens["tokens"],
            segment_ids=segment_ids.astype(np.int32),
            entry_id=entries.entry_id,
            entry_weight=entries.entry_weight,
            head_count=entries.head_count,
            tail_count=entries.tail_count,
            teacher_entropy=codec.decode_nats(stored.teacher_nats[:, 0]),
            label_logprob=-codec.decode_nats(stored.teacher_nats[:, 1]),
        )


def read_vocabulary(url: str, name: str, manifest: TargetsManifest) -> Vocabulary:
    """The tables of a set of targets. Raises CorruptStoreError unless they are the manifest's."""
    tables = {
        table: read_table(url, name, manifest, table)
        for table in ("vocabulary_order", "bucket_bits")
    }
    vocabulary = Vocabulary(tables["vocabulary_order"], tables["bucket_bits"])
    what = vocabulary.fault(manifest.teacher.vocab_size)
    if what is not None:
        raise CorruptStoreError(
            f"A vocabulary's tables must fit each other, but of targets '{name}' of {url} {what}; "
            "make the targets again."
        )
    return vocabulary


def read_table(url: str, name: str, manifest: TargetsManifest, table: str) -> np.ndarray:
    """One table of a set of targets. Raises CorruptStoreError unless it is the manifest's."""
    path = layout.group_path(name)
    spec = layout.table_arrays(manifest)[table]
    try:
        values = storage.open_array(url, path, spec).read().result()
    except (ValueError, OSError) as error:
        remote.raise_if_unanswered(url, error)
        raise CorruptStoreError(
            f"Stored bytes must be there and match their checksums, but those of {path}{table} of "
            f"{url} do not ({str(error).splitlines()[0]}); run `retort repair {url}`."
        ) from error
    if layout.table_digest(values) != layout.table_digests(manifest)[table]:
        raise CorruptStoreError(
            f"A vocabulary's table must be the manifest's, but {path}{table} of {url} is another; "
            f"run `retort repair {url}`."
        )
    return values


def check_tokenizer(manifest: TokensManifest, sha256: str, vocab_size: int) -> None:
    """Raise ManifestMismatchError unless the store's tokenizer is the run's."""
    found = manifest.tokenizer
    if (found.sha256, found.vocab_size) != (sha256, vocab_size):
        raise ManifestMismatchError(
            f"A store's tokenizer must be the run's, but the store was made with {found.sha256} "
            f"({found.vocab_size} pieces) and the run uses {sha256} ({vocab_size} pieces); give "
            "the tokenizer that made the store."
        )
