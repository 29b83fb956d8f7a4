"""Records of a part of a file, as they lie there: a line, a value of a column, a whole text.

Reading never stops at a bad record: what cannot be a document comes as a `Poison`, which says why.
Only a file that cannot be reached is an error. Memory holds one record, or one batch of a column;
the part's size and hash are of the bytes that were read, so they tell a file that has changed.
What a record says is for `teacher_dump.documents`.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.corpus import CorpusConfig
from schemas.errors import ConfigError
from schemas.manifest import DeadLetter, TokenizerInfo
from teacher_dump import token_arrays
from teacher_dump.corpus import COMPRESSIONS, Part, kind_of

_BLOCK_BYTES = 1 << 20
_BATCH_ROWS = 128
_EXCERPT = 80


class Poison(Exception):
    """A document that cannot be read: a code for counting, a sentence's end, how it begins."""

    def __init__(self, reason: str, detail: str, begins: bytes | str | None = None):
        super().__init__(detail)
        self.reason, self.detail = reason, detail
        self.excerpt = None if begins is None else _escape(begins)


@dataclass(frozen=True)
class Place:
    """Where a record is, as `schemas.manifest.DeadLetter` says it."""

    line: int | None = None
    row: int | None = None
    byte: int | None = None

    def letter(self, path: str, poison: Poison) -> DeadLetter:
        return DeadLetter(
            path=path,
            line=self.line,
            row=self.row,
            byte=self.byte,
            reason=poison.reason,
            detail=poison.detail[:200],
            excerpt=poison.excerpt,
        )

    def name(self) -> str:
        """The place in its file; it does not depend on how the file was cut."""
        return str(self.row if self.byte is None else self.byte)


@dataclass(frozen=True)
class Record:
    """One record: UTF-8 bytes (of a text or of JSON), token ids [n], or why there is neither."""

    place: Place
    raw: "bytes | np.ndarray | Poison"


class PartReader:
    """Iterates over a part's records, once. `size_bytes`, `sha256`, `fault` are known afterwards.

    `fault` says why the file could not be read to its end, if so; its records are then no good.
    Raises ConfigError if the file cannot be reached.
    """

    def __init__(self, part: Part, config: CorpusConfig, tokenizer: TokenizerInfo):
        self._part, self._config, self._tokenizer = part, config, tokenizer
        self._digest = hashlib.sha256()
        self.size_bytes = 0
        self.fault: Poison | None = None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Record]:
        kind = kind_of(self._part.path)
        read = {
            "text": self._text,
            "lines": self._lines,
            "parquet": self._parquet,
            "arrow": self._arrow,
            "zarr": self._zarr,
        }[kind]
        try:
            yield from read()
        except Poison as poison:
            self.fault = poison
        except ConfigError:
            raise
        except (pa.ArrowException, OSError, EOFError, ValueError, KeyError) as error:
            what = " ".join(str(error).split())[:120]
            self.fault = Poison("unreadable", f"the file is damaged or another kind ({what})")

    @contextmanager
    def _open(self, hash_all: bool) -> Iterator["_Source"]:
        path = self._part.path
        try:
            opened = fsspec.open(path, "rb").open()
        except OSError as error:
            raise _unreachable(path, error) from error
        with opened:
            yield _Source(path, opened, self._digest if hash_all else None)

    @contextmanager
    def _stream(self) -> Iterator[tuple["_Source", io.BufferedReader]]:
        """The part's file, decompressed. All of it is read in the end and hashed as it lies there,
        but for a part of it, whose lines are hashed by who reads them."""
        path, part = self._part.path, self._part.part
        with self._open(hash_all=part is None) as source:
            compression = next((c for end, c in COMPRESSIONS.items() if path.endswith(end)), None)
            raw: Any = source
            if compression is not None:
                raw = pa.CompressedInputStream(pa.PythonFile(source, "r"), compression)
            yield source, io.BufferedReader(raw, _BLOCK_BYTES)

    def _text(self) -> Iterator[Record]:
        limit = self._config.max_document_bytes
        with self._stream() as (source, stream):
            try:
                raw = stream.read(limit + 1)
                yield Record(Place(), raw if len(raw) <= limit else _too_long(limit, raw))
                while stream.read(_BLOCK_BYTES):
                    pass
            finally:
                self.size_bytes = source.drain()

    def _lines(self) -> Iterator[Record]:
        with self._stream() as (source, stream):
            try:
                if self._part.part is None:
                    yield from self._lines_from(stream, 0, None)
                else:
                    first, stop = self._part.part
                    at = _first_line(source, stream, first, stop)
                    yield from self._lines_from(stream, at, stop)
            finally:
                if self._part.part is None:
                    self.size_bytes = source.drain()

    def _lines_from(self, stream: Any, at: int, stop: int | None) -> Iterator[Record]:
        """The lines that begin before `stop`, from a line's beginning at byte `at`."""
        limit = self._config.max_document_bytes
        number = 0
        while stop is None or at < stop:
            line = stream.readline(limit + 1)
            if not line:
                return
            begin, number = at, number + 1
            at += self._read(line)
            place = Place(line=number if stop is None else None, byte=begin)
            if len(line) > limit and not line.endswith(b"\n"):
                yield Record(place, _too_long(limit, line))
                line = line[:1]
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_BLOCK_BYTES)
                    at += self._read(line)
            elif not line.isspace():
                yield Record(place, line)

    def _read(self, line: bytes) -> int:
        if self._part.part is not None:
            self._digest.update(line)
            self.size_bytes += len(line)
        return len(line)

    def _parquet(self) -> Iterator[Record]:
        with self._open(hash_all=False) as source:
            with pq.ParquetFile(source, pre_buffer=False) as file:
                first, stop = self._part.part or (0, file.metadata.num_row_groups)
                name = self._column(file.schema_arrow)
                row = sum(file.metadata.row_group(group).num_rows for group in range(first))
                batches = file.iter_batches(_BATCH_ROWS, list(range(first, stop)), [name])
                for batch in batches:
                    yield from self._values(batch, row)
                    row += batch.num_rows
            self.size_bytes = self._part.size_bytes if self._part.part else source.size()

    def _arrow(self) -> Iterator[Record]:
        with self._open(hash_all=False) as source:
            self.size_bytes = source.size()
            row = 0
            for batch in _arrow_batches(source):
                self._column(batch.schema)
                for at in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from self._values(batch.slice(at, _BATCH_ROWS), row + at)
                row += batch.num_rows

    def _zarr(self) -> Iterator[Record]:
        if self._config.ids_field is None:
            raise Poison("no_field", "it holds token ids, not text; set corpus.ids_field")
        limit = self._config.max_document_bytes
        try:
            array = token_arrays.open_array(self._part.path)
        except FileNotFoundError as error:
            raise _unreachable(self._part.path, error) from error
        first, stop = self._part.part or (0, array.shape[0])
        self.size_bytes = self._part.size_bytes
        info = self._tokenizer
        found = token_arrays.documents(
            array, first, stop, info.eos_id, info.pad_id, limit // 4, self._digest
        )
        for row, ids in found:
            yield Record(Place(row=row), _too_long(limit) if ids is None else ids)

    @property
    def _field(self) -> str:
        return self._config.ids_field or self._config.text_field

    def _column(self, schema: pa.Schema) -> str:
        """The column that holds the field: of that name, or inside others, after dots."""
        names = [self._field] if self._field in schema.names else self._field.split(".")
        fields: Any = schema if names[0] in schema.names else pa.struct([])
        for name in names:
            if isinstance(fields, pa.DataType) and not pa.types.is_struct(fields):
                fields = pa.struct([])
            if fields.get_field_index(name) < 0:
                raise Poison("no_field", f"the file has no column '{self._field}'")
            fields = fields.field(name).type
        return self._field

    def _values(self, batch: pa.RecordBatch, row: int) -> Iterator[Record]:
        """A column's values, from `row` on; what is hashed is what is returned."""
        limit = self._config.max_document_bytes
        for number, value in enumerate(_column_values(batch, self._field), row):
            if value is None:
                self._digest.update(b"\xff" * 8)
                raw: bytes | np.ndarray | Poison = Poison(
                    "no_text", f"there is no {_wanted(self._config)} in '{self._field}'"
                )
            else:
                stored = value if isinstance(value, bytes) else value.tobytes()
                self._digest.update(len(stored).to_bytes(8, "little"))
                self._digest.update(stored)
                wrong = isinstance(value, bytes) != (self._config.ids_field is None)
                raw = value
                if len(stored) > (limit if isinstance(value, bytes) else 2 * limit):
                    raw = _too_long(limit, value if isinstance(value, bytes) else None)
                elif wrong:
                    raw = Poison("no_text", f"'{self._field}' holds no {_wanted(self._config)}")
            yield Record(Place(row=number), raw)


class _Source(io.RawIOBase):
    """A file that hashes what is read from it, in order, and says if it cannot be reached."""

    def __init__(self, path: str, file: Any, digest: Any):
        self._path, self._file, self._digest = path, file, digest

    @property
    def mode(self) -> str:
        return "rb"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            raise _unreachable(self._path, error) from error
        buffer[: len(data)] = data
        if self._digest is not None:
            self._digest.update(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def size(self) -> int:
        at = self.tell()
        end = self.seek(0, 2)
        self.seek(at)
        return end

    def drain(self) -> int:
        """Read what is left; returns the file's size."""
        while self.read(_BLOCK_BYTES):
            pass
        return self.tell()


def _unreachable(path: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"Every corpus file must be readable, but {path} is not ({error}); check it."
    )


def _escape(begins: bytes | str) -> str:
    text = begins[:_EXCERPT]
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return text.encode("unicode_escape").decode()[:_EXCERPT]


def _too_long(limit: int, begins: bytes | None = None) -> Poison:
    return Poison("too_long", f"it is longer than max_document_bytes, {limit}", begins)


def _wanted(config: CorpusConfig) -> str:
    return "text" if config.ids_field is None else "token ids"


def _first_line(source: _Source, stream: io.BufferedReader, first: int, stop: int) -> int:
    """Go to the first line that begins at `first` or later; returns where, or `stop` or beyond."""
    if first == 0:
        return 0
    # From the byte before, which is the line's end if one begins right at `first`.
    source.seek(first - 1)
    at = first - 1
    while at < stop:
        piece = stream.readline(_BLOCK_BYTES)
        at += len(piece)
        if piece.endswith(b"\n"):
            return at
        if not piece:
            break
    return stop


def _arrow_batches(source: _Source) -> Iterator[pa.RecordBatch]:
    """Of the file format (Feather), or of the stream format, which Hugging Face's datasets use."""
    try:
        with pa.ipc.open_file(source) as file:
            for index in range(file.num_record_batches):
                yield file.get_batch(index)
        return
    except pa.ArrowInvalid:
        source.seek(0)
    with pa.ipc.open_stream(source) as stream:
        yield from stream


def _column_values(batch: pa.RecordBatch, field: str) -> Iterator[bytes | np.ndarray | None]:
    """Texts as the bytes that are stored, which may not be UTF-8; lists of integers as int64."""
    names = [field] if field in batch.schema.names else field.split(".")
    column = batch.column(names[0])
    for name in names[1:]:
        column = pc.struct_field(column, name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        # A cast of the type alone: Arrow itself would stop at bytes that are no UTF-8.
        kind = pa.binary_view() if pa.types.is_string_view(kind) else pa.large_binary()
        column = column.cast(kind)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view():
        yield from column.to_pylist()
    elif hasattr(kind, "value_type") and pa.types.is_integer(kind.value_type):
        for scalar in column:
            ids = scalar.values
            yield None if ids is None or ids.null_count else ids.to_numpy().astype(np.int64)
    else:
        yield from (None for _ in range(batch.num_rows))
