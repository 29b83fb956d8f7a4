"""Hostile text made harmless: what is shown of pieces, file names and whatever else was stored.

Control characters, which command a terminal, and invisible or direction-changing ones, which make a
text read as another, become signs. Markup is not known here: each face escapes its own.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"}


def visible(text: str) -> str:
    """Text with white space and control characters as signs, safe to print anywhere."""
    return "".join(_SIGNS.get(c, _harmless(c)) for c in text)


def printable(text: str) -> str:
    """Text with its spaces, but with a sign for each control character, line ends included."""
    return "".join(_harmless(c) for c in text)


def readable(text: str) -> str:
    """Text that keeps its spaces and breaks its lines, each with a sign for the break."""
    signs = {"\n": "⏎\n", "\t": "⇥\t"}
    return "".join(signs.get(c, _harmless(c)) for c in text)


def hidden(text: str) -> list[str]:
    """Names of the characters that the other functions here replace: ['U+202E']."""
    return [f"U+{ord(c):04X}" for c in text if _harmless(c) != c]


def _harmless(character: str) -> str:
    # Also the separators of lines and paragraphs, which are no control characters.
    is_bad = unicodedata.category(character)[0] == "C" or character in "\u2028\u2029"
    return "�" if is_bad else character


class Pieces:
    """What each id of a tokenizer stands for: its bytes, and how a person reads it.

    Without a tokenizer an id is written as itself, between angle brackets.
    """

    def __init__(self, raw: Sequence[bytes], names: Sequence[str]):
        self._names = names
        self.lengths = np.array([len(piece) for piece in raw], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.data = np.frombuffer(b"".join(raw), np.uint8)

    @classmethod
    def numbers(cls, vocab_size: int) -> "Pieces":
        """Ids as themselves."""
        names = [f"⟨{index}⟩" for index in range(vocab_size)]
        return cls([name.encode() for name in names], names)

    def __len__(self) -> int:
        return len(self._names)

    def text(self, piece: int) -> str:
        """One piece, or a number for what is none."""
        return self._names[piece] if 0 <= piece < len(self._names) else f"⟨{piece}⟩"

    def spell(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The bytes of all ids int [n] in a row, and where each begins, int64 [n + 1].

        A piece without bytes, as the end of a document, is one byte that no UTF-8 has, so that
        nothing is found across it.
        """
        known = np.clip(ids, 0, len(self._names) - 1)
        lengths = self.lengths[known]
        is_empty = (lengths == 0) | (known != ids)
        lengths = np.where(is_empty, 1, lengths)
        begins = np.concatenate([[0], np.cumsum(lengths)])
        source = np.arange(begins[-1]) + np.repeat(self.starts[known] - begins[:-1], lengths)
        data = self.data[np.minimum(source, max(len(self.data) - 1, 0))]
        data[begins[:-1][is_empty]] = 0xFF
        return data.tobytes(), begins
