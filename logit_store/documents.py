"""Where a store's documents are: of each split, `documents/NNNNNNNN.bin`.

A split's documents are laid out one after another and cut into its rows, so that their lengths say
which document, and which source, a position is of.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from logit_store import layout, storage
from schemas.errors import CorruptStoreError
from schemas.manifest import Split

RECORD_BYTES = 5
"""Of a record in its split's index: its tokens and how often it is taken."""


@dataclass(frozen=True)
class Index:
    """What a store keeps of a split's records: tokens uint32 [D] and copies uint8 [D].

    Documents are laid out in order; then come, in order again, those that are taken twice, and so
    on, so that copies do not lie side by side.
    """

    tokens: np.ndarray
    copies: np.ndarray

    def to_bytes(self) -> bytes:
        return self.tokens.astype("<u4").tobytes() + self.copies.tobytes()

    @staticmethod
    def from_bytes(raw: bytes) -> "Index":
        records = len(raw) // RECORD_BYTES
        return Index(np.frombuffer(raw, "<u4", records), np.frombuffer(raw[4 * records :], "u1"))

    def total_tokens(self) -> int:
        return int((self.tokens.astype(np.int64) * self.copies).sum())

    def layout(self) -> tuple[np.ndarray, np.ndarray]:
        """Records int64 [P] in the order in which they are laid out, and their tokens int64 [P]."""
        rounds = range(int(self.copies.max(initial=0)))
        records = [np.flatnonzero(self.copies > done) for done in rounds]
        order = np.concatenate([np.empty(0, np.int64), *records])
        return order, self.tokens[order].astype(np.int64)

    def sources(self, documents: np.ndarray) -> np.ndarray:
        """int64 [P], the source of what is laid out, of sources with so many documents int64 [S].

        A source's records are neighbours, and their copies add up to its documents.
        """
        copies = np.cumsum(self.copies, dtype=np.int64)
        of_record = np.searchsorted(np.cumsum(documents), copies, side="left")
        return of_record[self.layout()[0]]


def read_index(url: str, number: int, split: Split) -> Index | None:
    """A split's index; None if the store was made without. Raises CorruptStoreError."""
    if split.documents_sha256 is None:
        return None
    key = layout.documents_key(number)
    raw = storage.read_bytes(storage.open_kvstore(url), key)
    if raw is None or hashlib.sha256(raw).hexdigest() != split.documents_sha256:
        raise CorruptStoreError(
            f"{key} of {url} must be what the list of sources says, but it is "
            f"{'missing' if raw is None else 'not'}; run `retort tokenize` again, which writes it."
        )
    return Index.from_bytes(raw)
