"""Source files and the documents in them: plain text, JSONL (also gzipped) and Parquet.

Reads whole files, so that the hash, the size and the documents are of the same bytes.
"""

import gzip
import hashlib
import io
import json
import zlib
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ConfigError, MissingDependencyError
from schemas.manifest import SourceFile
from schemas.runs import CorpusConfig

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class InputFile:
    """A file to read, local or by URL, and its size in bytes."""

    path: str
    size_bytes: int


def list_files(config: CorpusConfig) -> list[InputFile]:
    """Every readable file under the config's paths, once, sorted by path.

    Raises ConfigError for a path that does not exist, a file of a kind that is not read, or if
    there is no file at all.
    """
    found: dict[str, InputFile] = {}
    for path in config.paths:
        filesystem, root = _open_filesystem(path)
        if not filesystem.exists(root):
            raise ConfigError(f"Every corpus path must exist, but {path} does not; correct it.")
        is_folder = filesystem.isdir(root)
        if not is_folder and not root.endswith(SUFFIXES):
            raise ConfigError(
                f"A corpus file must end in one of {', '.join(SUFFIXES)}, but {path} does not; "
                "rename or convert it."
            )
        names = filesystem.find(root, detail=True) if is_folder else {root: filesystem.info(root)}
        for name, info in names.items():
            if name.endswith(SUFFIXES):
                url = filesystem.unstrip_protocol(name) if "://" in path else name
                found[url] = InputFile(url, int(info["size"]))
    if not found:
        raise ConfigError(
            f"A corpus must hold at least one file, but {', '.join(config.paths)} holds none that "
            f"ends in {', '.join(SUFFIXES)}."
        )
    return [found[path] for path in sorted(found)]


def read_file(path: str, config: CorpusConfig) -> tuple[SourceFile, list[str]]:
    """A file's identity and the documents that pass the filters, in order.

    Raises ConfigError naming the file, and the line or row, of anything that cannot be read.
    """
    try:
        with fsspec.open(path, "rb") as file:
            raw = file.read()
    except OSError as error:
        raise ConfigError(
            f"Every corpus file must be readable, but {path} is not ({error}); check it."
        ) from error
    if path.endswith(".parquet"):
        texts = _read_parquet(path, raw, config.text_field)
    elif path.endswith((".jsonl", ".jsonl.gz")):
        texts = _read_jsonl(path, raw, config.text_field)
    else:
        texts = [_decode(raw, path)]
    kept = [text for text in texts if _passes(text, config)]
    source = SourceFile(
        path=path,
        size_bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        documents=len(kept),
        text_bytes=sum(len(text.encode()) for text in kept),
    )
    return source, kept


def _open_filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system that serves `path`, and the path inside it."""
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise MissingDependencyError(
            f"A corpus at a URL needs the package that reads it, but for {path}: {error}."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"A corpus path must be a local path or a URL that fsspec reads, but {path} is not "
            f"({error}); correct it."
        ) from error


def _passes(text: str, config: CorpusConfig) -> bool:
    longest = config.max_characters
    return len(text) >= config.min_characters and (longest is None or len(text) <= longest)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Text must be UTF-8, but {where} is not at byte {error.start}; convert it or leave it "
            "out."
        ) from error


def _read_jsonl(path: str, raw: bytes, field: str) -> list[str]:
    if path.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(
                f"A .gz file must be whole, but {path} is not ({error}); make it again."
            ) from error
    texts = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            record = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"Every line must be JSON, but {where} is not ({error.msg}); mend or remove it."
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise ConfigError(
                f"Every record must have text in '{field}', but {where} has not; set "
                "corpus.text_field or mend the line."
            )
        texts.append(_no_lone_surrogates(record[field], where))
    return texts


def _read_parquet(path: str, raw: bytes, field: str) -> list[str]:
    try:
        with pq.ParquetFile(io.BytesIO(raw)) as file:
            has_column = field in file.schema_arrow.names
            table = file.read(columns=[field]) if has_column else None
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"A .parquet file must be whole, but {path} cannot be read ({error}); make it again."
        ) from error
    if table is None:
        raise ConfigError(
            f"Every Parquet file must have the column '{field}', but {path} has not; set "
            "corpus.text_field."
        )
    texts = table.column(field).to_pylist()
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(
                f"Every row must have text in '{field}', but row {row} of {path} has {text!r}; "
                "mend or remove it."
            )
    return texts


def _no_lone_surrogates(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"Text must be valid Unicode, but {where} holds half a surrogate pair; mend it."
        ) from error
    return text
