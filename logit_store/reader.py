"""Reads committed rows. Rows are found by arithmetic; nothing is listed but the ledger.

A reader sees what was committed when it was opened, or when `refresh` was last called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logit_store import layout, ledger, remote
from logit_store.decode import TargetRows, decode_entries
from logit_store.layout import list_targets
from schemas.errors import CorruptStoreError, IncompleteStoreError, ManifestMismatchError
from schemas.manifest import LedgerRecord, Manifest, TargetsManifest, TokensManifest, identity

__all__ = ["TargetBatch", "TargetsReader", "TokenRows", "TokensReader", "list_targets"]


@dataclass(frozen=True)
class TokenRows:
    """tokens int32 [R, L] and segment_ids int32 [R, L], 0 for padding."""

    tokens: np.ndarray
    segment_ids: np.ndarray


@dataclass(frozen=True)
class TargetBatch:
    """Rows as the trainer uses them; E entry slots a row, -1 and weight 0 where unused.

    tokens, segment_ids, entry_count int32 [R, L]; entry_id, entry_position int32 [R, E];
    entry_weight float32 [R, E]; teacher_entropy, label_logprob float32 [R, L] in nats. The entries
    of position t are the target for token t + 1.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    entry_count: np.ndarray
    entry_id: np.ndarray
    entry_position: np.ndarray
    entry_weight: np.ndarray
    teacher_entropy: np.ndarray
    label_logprob: np.ndarray


class _Rows:
    """Committed rows of one group's arrays."""

    def __init__(self, url: str, name: str | None):
        self.url = url
        self._name = name
        self._manifest: Manifest = layout.read_manifest(url, name)
        self._arrays: dict[str, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look again at which shards are committed."""
        self.committed: frozenset[int] = frozenset(ledger.committed_indices(self.url, self._name))

    def records(self) -> dict[int, LedgerRecord]:
        """The ledger records of all committed shards."""
        return ledger.read_committed(self.url, self._name)

    def columns(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Every array's stored values for `rows`, in their order; all are fetched at once.

        Raises IndexError for what is no row, IncompleteStoreError for rows not committed and
        CorruptStoreError for bytes that are damaged or missing.
        """
        index = self._index(rows)
        if not self._arrays:
            group = layout.group_path(self._name)
            self._arrays = {
                name: layout.open_array(self.url, group, spec)
                for name, spec in layout.arrays(self._manifest).items()
            }
        reads = {name: array[index].read() for name, array in self._arrays.items()}
        found = {}
        for name, read in reads.items():
            try:
                found[name] = read.result()
            except (ValueError, OSError) as error:
                remote.raise_if_unanswered(self.url, error)
                raise self._damage(name, index, error) from error
        return found

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
        is_missing = ~np.isin(shards, list(self.committed))
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
        found = self.columns(rows)
        return TokenRows(found["tokens"], found["segment_ids"].astype(np.int32))


class TargetsReader(_Rows):
    """One set of targets with the tokens it was computed from."""

    def __init__(self, url: str, name: str):
        super().__init__(url, name)
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

    def stored(self, rows: Sequence[int] | np.ndarray) -> TargetRows:
        """The columns as they are stored, undecoded."""
        return TargetRows(**self.columns(rows))

    def rows(self, rows: Sequence[int] | np.ndarray) -> TargetBatch:
        """Decoded targets of the given rows, in their order."""
        tokens = self.tokens.rows(rows)
        stored = self.stored(rows)
        entries = decode_entries(self.manifest, stored)
        return TargetBatch(
            tokens=tokens.tokens,
            segment_ids=tokens.segment_ids,
            entry_count=stored.entry_count.astype(np.int32),
            entry_id=entries.entry_id,
            entry_position=entries.entry_position,
            entry_weight=entries.entry_weight,
            teacher_entropy=stored.teacher_entropy.astype(np.float32),
            label_logprob=stored.label_logprob.astype(np.float32),
        )


def check_tokenizer(manifest: TokensManifest, sha256: str, vocab_size: int) -> None:
    """Raise ManifestMismatchError unless the store's tokenizer is the run's."""
    found = manifest.tokenizer
    if (found.sha256, found.vocab_size) != (sha256, vocab_size):
        raise ManifestMismatchError(
            f"A store's tokenizer must be the run's, but the store was made with {found.sha256} "
            f"({found.vocab_size} pieces) and the run uses {sha256} ({vocab_size} pieces); give "
            "the tokenizer that made the store."
        )
