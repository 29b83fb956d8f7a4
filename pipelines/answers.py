"""What a small job before the real one leaves in the store: an answer for each piece of its work.

A worker writes one document for its piece; the driver reads them all and takes them away once the
manifest holds what they say. Those that an interrupted run left are used again if they are answers
to the same question: `run` in each says which.
"""

from collections.abc import Mapping
from typing import Generic, TypeVar

from pydantic import Field

from logit_store import storage
from schemas.base import Document


class Answer(Document):
    """One piece's answer."""

    run: str = Field(description="Fingerprint of all that the answer depends on.")


A = TypeVar("A", bound=Answer)


class Answers(Generic[A]):
    """The answers of one job, in a folder of the store."""

    def __init__(self, url: str, folder: str, kind: type[A]):
        self._store, self._kind = storage.open_kvstore(url, folder), kind

    def put(self, index: int, answer: A) -> None:
        """Leave the answer of piece `index`, over any that is there."""
        storage.write_bytes(self._store, _key(index), answer.canonical_json().encode())

    def get(self, runs: Mapping[int, str]) -> dict[int, A]:
        """Of pieces whose `run` would be as given, the answers that are there."""
        there = set(storage.list_keys(self._store))
        found = {}
        for index, run in runs.items():
            raw = storage.read_bytes(self._store, _key(index)) if _key(index) in there else None
            answer = None if raw is None else self._kind.model_validate_json(raw)
            if answer is not None and answer.run == run:
                found[index] = answer
        return found

    def count(self) -> int:
        """How many there are, of whatever run."""
        return len(storage.list_keys(self._store))

    def forget(self) -> None:
        """Take all away; for the driver alone, after the manifest is written."""
        for key in storage.list_keys(self._store):
            storage.delete(self._store, key)


def _key(index: int) -> str:
    return f"{index:08d}.json"
