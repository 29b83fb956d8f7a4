"""`retort serve`: opens the stores that the command line names, each with its tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from logit_store.inspect.text import Pieces
from logit_store.inspect.web.stores import Served, Student
from logit_store.reader import TokensReader, check_tokenizer
from schemas.model import TOKENIZER_FILE
from teacher_dump.tokenizer import Tokenizer


def find_tokenizer(store: str, given: Path | None) -> Tokenizer | None:
    """The tokenizer that made a store: the one given, or tokenizer.model beside a local store.

    None if there is none beside it. Raises ManifestMismatchError if it is another's.
    """
    path = given
    if path is None:
        if "://" in store:
            return None
        path = Path(store).absolute().parent / TOKENIZER_FILE
        if not path.exists():
            return None
    tokenizer = Tokenizer.load(path)
    manifest = TokensReader(store).manifest
    check_tokenizer(manifest, tokenizer.info.sha256, tokenizer.info.vocab_size)
    return tokenizer


def pieces(tokenizer: Tokenizer) -> Pieces:
    """All pieces, with the very bytes of those that are no text by themselves."""
    names = [tokenizer.piece_text(index) for index in range(tokenizer.info.vocab_size)]
    lengths = tokenizer.piece_bytes().tolist()
    return Pieces([_raw(*piece) for piece in zip(names, lengths, strict=True)], names)


def _raw(name: str, length: int) -> bytes:
    if length == 0:
        return b""
    encoded = name.encode()
    # A byte that is no text goes by its name, <0xE2>.
    return encoded if len(encoded) == length else bytes([int(name[1:-1], 16)])


def open_stores(
    urls: Sequence[str], tokenizer: Path | None, student: Student | None = None
) -> list[Served]:
    """The stores, under the shortest ends of their paths that tell them apart.

    The student is one of the first store's tokens.
    """
    found = []
    for url, label in zip(urls, labels(urls), strict=True):
        used = find_tokenizer(url, tokenizer)
        served = Served(url, label, None if used is None else pieces(used))
        found.append(served)
    for served in found:
        # Others over the same tokens can be compared with it as well.
        if served.fingerprint == found[0].fingerprint:
            served.student = student
    return found


def labels(urls: Sequence[str]) -> list[str]:
    """Ends of paths, as long as is needed for each to be another's of no other."""
    parts = [url.rstrip("/").split("/") for url in urls]
    depth = 1
    while depth < max(map(len, parts), default=1):
        if len({tuple(part[-depth:]) for part in parts}) == len({tuple(part) for part in parts}):
            break
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
