"""Records to documents to tokens, for one split at a time; what both passes of a job share.

Pass 1 (`count`) reads every record and says what it is: a dead letter, dropped by a filter, or so
many tokens. Pass 2 (`rows`) reads them again and tokenizes only those that its rows need. Documents
are never in memory together, and what pass 1 decided is not decided again.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from logit_store.documents import Index
from schemas.corpus import CorpusConfig, DecontaminationConfig
from schemas.manifest import DeadLetter, TokenizerInfo
from teacher_dump import corpus, decontamination, duplicates, filters, mixture, packing
from teacher_dump.corpus import Part, kind_of
from teacher_dump.masking import Masker
from teacher_dump.records import PartReader, Place, Poison, Record
from teacher_dump.tokenizer import Tokenizer

MOST_LETTERS = 10_000
"""Of a split, that are written down; the others are counted."""
KEPT, DEAD, UNREADABLE = "kept", "dead_letter", "unreadable_file"


@dataclass(frozen=True)
class CountedPart:
    """A part as pass 1 found it; `records` are good, bad and dropped ones together."""

    part: Part
    size_bytes: int
    sha256: str
    records: int


@dataclass(frozen=True)
class Columns:
    """What pass 1 says of each record of a split, in the order in which they are read.

    tokens uint32 [D] and text_bytes uint32 [D], 0 where it is not kept; reason uint8 [D], a place
    in `reasons`, of which the first is that it is kept. If the config needs them there are, of the
    kept ones alone, draw uint64 [K], digest uint64 [K, 2] and signature uint32 [K, permutations].
    """

    reasons: tuple[str, ...]
    values: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]


@dataclass(frozen=True)
class CountedSplit:
    """All that pass 1 learns of a split."""

    parts: tuple[CountedPart, ...]
    columns: Columns
    letters: tuple[DeadLetter, ...]
    dead_letters: dict[str, int]
    masked: dict[str, int]


def check(config: CorpusConfig) -> None:
    """Raise ConfigError or MissingDependencyError if a filter that is on cannot be had here."""
    filters.make(config, lambda: _evaluation_ngrams(config.decontamination))
    Masker(config.masking)
    if config.duplicates.near:
        duplicates.Signer(config.duplicates)


def count(parts: Sequence[Part], config: CorpusConfig, tokenizer: Tokenizer) -> CountedSplit:
    """Read, filter and tokenize a split. Raises ConfigError if a file cannot be reached."""
    reader = _Documents(config, tokenizer)
    found = _Found(config)
    counted = [reader.count(part, found) for part in parts]
    return CountedSplit(
        parts=tuple(counted),
        columns=found.columns(),
        letters=tuple(found.letters),
        dead_letters=dict(sorted(found.dead_letters.items())),
        masked=dict(sorted(reader.mask.counts.items())),
    )


def rows(
    parts: Sequence[Part],
    config: CorpusConfig,
    tokenizer: Tokenizer,
    index: Index,
    first_row: int,
    stop_row: int,
    sequence_tokens: int,
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]] | None:
    """Tokens int32 [R, L] and segment ids uint16 [R, L] of rows [first_row, stop_row) of a split.

    Also each part's size and SHA-256 as it is now. None if its records are not the index's, in
    number or in their tokens, so that a part must have changed.
    """
    first, stop = first_row * sequence_tokens, stop_row * sequence_tokens
    order, lengths = index.layout()
    starts = np.cumsum(lengths) - lengths
    needed: dict[int, list[int]] = {}
    for at in np.flatnonzero((starts < stop) & (starts + lengths > first)):
        needed.setdefault(int(order[at]), []).append(int(starts[at]) - first)
    tokens = np.full(stop - first, tokenizer.info.pad_id, np.int32)
    reader = _Documents(config, tokenizer)
    identities = []
    number = 0
    for part in parts:
        records = PartReader(part, config, tokenizer.info)
        for record in records:
            places = needed.get(number)
            number += 1
            if places is None:
                continue
            ids = reader.ids(record, part.path)
            if ids is None or number > len(index.tokens) or len(ids) != index.tokens[number - 1]:
                return None
            for start in places:
                inside = slice(max(start, 0), min(start + len(ids), len(tokens)))
                tokens[inside] = ids[inside.start - start : inside.stop - start]
        identities.append((records.size_bytes, records.sha256))
    if number != len(index.tokens):
        return None
    segment_ids = packing.segments(lengths, first_row, stop_row, sequence_tokens)
    return tokens.reshape(segment_ids.shape), segment_ids, identities


def identify(part: Part, config: CorpusConfig, tokenizer: Tokenizer) -> tuple[int, str]:
    """A part's size and SHA-256 as it is now."""
    reader = PartReader(part, config, tokenizer.info)
    for _ in reader:
        pass
    return reader.size_bytes, reader.sha256


def texts(config: CorpusConfig) -> Iterator[str]:
    """The texts of all files, but for dead letters and what the length filters drop."""
    for file in corpus.list_files(config):
        yield from file_texts(file.path, config)


def file_texts(path: str, config: CorpusConfig) -> Iterator[str]:
    """The same of one file."""
    unused = TokenizerInfo(sha256="", vocab_size=1, bos_id=0, eos_id=0, pad_id=0)
    for record in PartReader(Part(path=path, size_bytes=0), config, unused):
        try:
            text = decode_text(record, path, config)
        except Poison:
            continue
        if filters.length(text, config) is None:
            yield text


def filter_files(config: CorpusConfig) -> dict[str, str]:
    """SHA-256 of every file that decides what is dropped, by path."""
    paths = [] if config.blocklist.file is None else [config.blocklist.file]
    if config.decontamination.paths:
        paths += [file.path for file in corpus.list_files(_evaluation(config.decontamination))]
    return {path: filters.digest(path) for path in sorted(paths)}


def decode_text(record: Record, path: str, config: CorpusConfig) -> str:
    """The text that a record holds. Raises Poison."""
    raw = record.raw
    if isinstance(raw, Poison):
        raise raw
    assert isinstance(raw, bytes)
    if kind_of(path) == "lines":
        value = _field(raw, config.text_field)
        if not isinstance(value, str):
            raise Poison("no_text", f"there is no text in '{config.text_field}'", raw)
        text = value
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Poison("surrogate", "half a surrogate pair is no character", raw) from error
    else:
        text = _decode(raw)
    if not text:
        raise Poison("empty", "the text is empty", None)
    if "\0" in text:
        raise Poison("nul_bytes", f"there is a NUL at character {text.index(chr(0))}", text)
    return text


def decode_ids(record: Record, path: str, config: CorpusConfig, vocab_size: int) -> np.ndarray:
    """The token ids int32 [n] that a record holds. Raises Poison."""
    raw = record.raw
    if isinstance(raw, Poison):
        raise raw
    field = config.ids_field or ""
    if isinstance(raw, bytes):
        value = _field(raw, field) if kind_of(path) == "lines" else None
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise Poison("no_text", f"there are no token ids in '{field}'", raw)
        # Python's integers have no bounds, and those of arrays do.
        bounded = [item if -1 <= item <= vocab_size else -1 for item in value]
        raw = np.asarray(bounded, np.int64)
    if not len(raw):
        raise Poison("empty", "there are no token ids", None)
    wrong = (raw < 0) | (raw >= vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise Poison(
            "bad_ids", f"the id at {at} is not one of the tokenizer's {vocab_size}", str(raw[at])
        )
    return raw.astype(np.int32)


class _Found:
    """What is found of a split's records, as it grows: some bytes for each, whatever they hold."""

    def __init__(self, config: CorpusConfig):
        self.reasons: dict[str, int] = {KEPT: 0, DEAD: 1, UNREADABLE: 2}
        self.letters: list[DeadLetter] = []
        self.dead_letters: Counter[str] = Counter()
        self.reason, self.tokens, self.text_bytes = array("B"), array("I"), array("I")
        self._extra: dict[str, tuple[bytearray, np.dtype, int]] = {}
        for name, dtype, width, on in (
            ("draw", "<u8", 1, bool(config.mixture)),
            ("digest", "<u8", 2, config.duplicates.exact),
            ("signature", "<u4", config.duplicates.permutations, config.duplicates.near),
        ):
            if on:
                self._extra[name] = bytearray(), np.dtype(dtype), width

    def letter(self, path: str, place: Place, poison: Poison) -> None:
        self.dead_letters[poison.reason] += 1
        if len(self.letters) < MOST_LETTERS:
            self.letters.append(place.letter(path, poison))

    def drop(self, reason: str) -> None:
        self._add(self.reasons.setdefault(reason, len(self.reasons)), 0, 0)

    def keep(self, tokens: int, text_bytes: int, extra: dict[str, np.ndarray]) -> None:
        self._add(0, tokens, text_bytes)
        for name, values in extra.items():
            raw, dtype, _ = self._extra[name]
            raw += values.astype(dtype).tobytes()

    def _add(self, reason: int, tokens: int, text_bytes: int) -> None:
        self.reason.append(reason)
        self.tokens.append(tokens)
        self.text_bytes.append(text_bytes)

    def spoil(self, first: int) -> None:
        """The records from `first` on are of a file that cannot be read to its end."""
        kept = self.reason[:first].count(0)
        for raw, dtype, width in self._extra.values():
            del raw[kept * width * dtype.itemsize :]
        for at in range(first, len(self.reason)):
            self.reason[at] = self.reasons[UNREADABLE]
            self.tokens[at] = self.text_bytes[at] = 0

    def columns(self) -> Columns:
        values: dict[str, np.ndarray] = {
            "reason": np.frombuffer(self.reason, np.uint8),
            "tokens": np.frombuffer(self.tokens, np.uint32),
            "text_bytes": np.frombuffer(self.text_bytes, np.uint32),
        }
        for name, (raw, dtype, width) in self._extra.items():
            flat = np.frombuffer(raw, dtype)
            values[name] = flat if width == 1 else flat.reshape(-1, width)
        return Columns(tuple(self.reasons), values)


class _Documents:
    """Turns records into token ids, as the config says."""

    def __init__(self, config: CorpusConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self.mask = Masker(config.masking)

    @cached_property
    def _filters(self) -> list[filters.Filter]:
        config = self._config
        return filters.make(config, lambda: _evaluation_ngrams(config.decontamination))

    @cached_property
    def _sign(self) -> duplicates.Signer:
        return duplicates.Signer(self._config.duplicates)

    def ids(self, record: Record, path: str) -> np.ndarray | None:
        """Token ids int32 [n] of a record that was kept, or None if it is no document now."""
        try:
            if self._config.ids_field is not None:
                return decode_ids(record, path, self._config, self._tokenizer.info.vocab_size)
            text = decode_text(record, path, self._config)
        except Poison:
            return None
        return self._tokenizer.encode_document(self.mask(text))

    def count(self, part: Part, found: _Found) -> CountedPart:
        """Read a part and add what is found of each of its records."""
        reader = PartReader(part, self._config, self._tokenizer.info)
        first = len(found.reason)
        for record in reader:
            try:
                self._count_record(part.path, record, found)
            except Poison as poison:
                found.drop(DEAD)
                found.letter(part.path, record.place, poison)
        if reader.fault is not None:
            found.spoil(first)
            found.letter(part.path, Place(), reader.fault)
        return CountedPart(part, reader.size_bytes, reader.sha256, len(found.reason) - first)

    def _count_record(self, path: str, record: Record, found: _Found) -> None:
        config = self._config
        extra: dict[str, np.ndarray] = {}
        if config.ids_field is not None:
            ids = decode_ids(record, path, config, self._tokenizer.info.vocab_size)
            data, text_bytes = ids.tobytes(), self._tokenizer.text_bytes(ids)
        else:
            text = decode_text(record, path, config)
            reason = filters.first_reason(self._filters, text)
            if reason is not None:
                found.drop(reason)
                return
            text = self.mask(text)
            data = text.encode()
            text_bytes = len(data)
            ids = self._tokenizer.encode_document(text)
            if config.duplicates.near:
                extra["signature"] = self._sign(text)
        if config.duplicates.exact:
            extra["digest"] = duplicates.digest(data)
        if config.mixture:
            drawn = mixture.draw(config.mixture_seed, path, record.place.name())
            extra["draw"] = np.asarray([drawn], np.uint64)
        found.keep(len(ids), text_bytes, extra)


def _field(raw: bytes, field: str) -> object:
    """What a line of JSON has in a field; None if there is none. Raises Poison."""
    try:
        record = json.loads(_decode(raw))
    except (ValueError, RecursionError) as error:
        what = getattr(error, "msg", None) or "too deep, or a number too large"
        raise Poison("not_json", f"the line is not JSON ({what})", raw) from error
    if isinstance(record, dict) and field in record:
        return record[field]
    for name in field.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(name)
    return record


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Poison("not_utf8", f"byte {error.start} is not UTF-8", raw) from error


def _evaluation(config: DecontaminationConfig) -> CorpusConfig:
    return CorpusConfig(paths=config.paths, text_field=config.text_field)


@lru_cache(maxsize=2)
def _evaluation_ngrams(config: DecontaminationConfig) -> frozenset[str]:
    return decontamination.collect(config, texts(_evaluation(config)))
