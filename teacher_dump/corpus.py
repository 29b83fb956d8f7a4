"""Which files a corpus consists of, and how they are cut so that they spread evenly over workers.

Lists and looks at footers; no document is read here.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from schemas.base import Document
from schemas.corpus import CorpusConfig
from schemas.errors import ConfigError, MissingDependencyError
from teacher_dump import token_arrays

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
LINE_SUFFIXES = (".jsonl", ".ndjson")
ARROW_SUFFIXES = (".arrow", ".feather")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KINDS = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys(LINE_SUFFIXES, "lines"),
    **dict.fromkeys(ARROW_SUFFIXES, "arrow"),
    ".parquet": "parquet",
    token_arrays.SUFFIX: "zarr",
}
_COMPRESSED = tuple(
    suffix + compression
    for suffix in (*TEXT_SUFFIXES, *LINE_SUFFIXES)
    for compression in COMPRESSIONS
)
SUFFIXES = (*_KINDS, *_COMPRESSED)
# A part that cannot be cut may be so many splits' worth before it is worth a word.
_MOST_SPLITS = 4
# Of a split, however small they are: opening a file in a bucket takes a tenth of a second.
MOST_FILES = 1000
_FOOTER_THREADS = 16


@dataclass(frozen=True)
class InputFile:
    """A file to read, local or by URL, its size in bytes and its group of the mixture."""

    path: str
    size_bytes: int
    group: int = 0


class Part(Document):
    """What one reader reads: a file, or a part of a large one."""

    path: str
    group: int = Field(0, ge=0)
    part: tuple[int, int] | None = Field(None, description="As in schemas.manifest.SourceFile.")
    size_bytes: int = Field(ge=0, description="About, for planning.")


def kind_of(path: str) -> str:
    """text, lines, parquet, arrow or zarr, whatever it is compressed by."""
    bare = path
    for suffix in COMPRESSIONS:
        bare = bare.removesuffix(suffix)
    return next(kind for suffix, kind in _KINDS.items() if bare.endswith(suffix))


def list_files(config: CorpusConfig) -> list[InputFile]:
    """Every readable file under the config's paths, once, sorted by path.

    Raises ConfigError for a path that does not exist, a glob that matches nothing, a file of a kind
    that is not read, a file of two groups, or if a group has no file at all.
    """
    found: dict[str, InputFile] = {}
    for group, paths in enumerate(config.groups):
        before = len(found)
        for path in paths:
            for name, size in _expand(path):
                if name in found and found[name].group != group:
                    raise ConfigError(
                        f"A file must be of one group of the mixture, but {name} is of groups "
                        f"{found[name].group} and {group}; mend corpus.mixture."
                    )
                found[name] = InputFile(name, size, group)
        if len(found) == before:
            raise ConfigError(
                f"A corpus must hold at least one file, but {', '.join(paths)} holds none that "
                f"ends in {', '.join(SUFFIXES)}."
            )
    return [found[path] for path in sorted(found)]


def split(files: Sequence[InputFile], config: CorpusConfig, split_bytes: int) -> list[list[Part]]:
    """The files in order, in runs of about `split_bytes`: many small ones, or a part of a large.

    Depends on names, sizes and Parquet footers alone.
    """
    splits: list[list[Part]] = []
    size = 0
    for part in _parts(files, config, split_bytes):
        full = splits and size + part.size_bytes > split_bytes
        if not splits or full or len(splits[-1]) == MOST_FILES:
            splits.append([])
            size = 0
        splits[-1].append(part)
        size += part.size_bytes
    return splits


def most_part_bytes(split_bytes: int) -> int:
    """How large a part should be at most."""
    return _MOST_SPLITS * split_bytes


def too_large(splits: Sequence[Sequence[Part]], split_bytes: int) -> list[Part]:
    """The parts that are larger than they should be, largest first.

    Compressed and Arrow files or row groups of Parquet; a text file is one document anyway.
    """
    most = most_part_bytes(split_bytes)
    found = [part for parts in splits for part in parts if part.size_bytes > most]
    found = [part for part in found if kind_of(part.path) != "text"]
    return sorted(found, key=lambda part: (-part.size_bytes, part.path))


def _expand(path: str) -> Iterator[tuple[str, int]]:
    """(name or URL, size) of every file that a path of the config stands for."""
    filesystem, root = _open_filesystem(path)
    roots = [root]
    try:
        if not filesystem.exists(root):
            roots = sorted(filesystem.glob(root)) if set("*?[") & set(root) else []
        if not roots:
            raise ConfigError(f"Every corpus path must exist, but {path} does not; correct it.")
        for one in roots:
            yield from _walk(filesystem, one, path)
    except OSError as error:
        raise ConfigError(
            f"Every corpus path must be readable, but {path} is not ({error}); check it."
        ) from error


def _walk(filesystem: Any, root: str, path: str) -> Iterator[tuple[str, int]]:
    is_folder = filesystem.isdir(root)
    if not is_folder and not root.endswith(SUFFIXES):
        raise ConfigError(
            f"A corpus file must end in one of {', '.join(SUFFIXES)}, but {path} does not; "
            "rename or convert it."
        )
    names = filesystem.find(root, detail=True) if is_folder else {root: filesystem.info(root)}
    arrays: dict[str, int] = {}
    for name, info in names.items():
        size = int(info["size"] or 0)
        array = token_arrays.root_of(name)
        if array is not None:
            arrays[array] = arrays.get(array, 0) + size
        elif name.endswith(SUFFIXES):
            yield (filesystem.unstrip_protocol(name) if "://" in path else name), size
    for name, size in arrays.items():
        yield (filesystem.unstrip_protocol(name) if "://" in path else name), size


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


def _parts(files: Sequence[InputFile], config: CorpusConfig, split_bytes: int) -> Iterator[Part]:
    """The files, large ones cut. Footers are read ahead, as a bucket answers slowly."""
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        large = [file for file in files if file.size_bytes > split_bytes]
        cuts = dict(
            zip(
                (file.path for file in large),
                pool.map(lambda file: _cuts(file, config, split_bytes), large),
                strict=True,
            )
        )
    for file in files:
        for (first, stop), size in cuts.get(file.path) or [((-1, -1), file.size_bytes)]:
            part = None if first < 0 else (first, stop)
            yield Part(path=file.path, group=file.group, part=part, size_bytes=size)


def _cuts(
    file: InputFile, config: CorpusConfig, split_bytes: int
) -> list[tuple[tuple[int, int], int]]:
    """Parts of a large file and their sizes; none if it must be read whole, as compressed ones."""
    kind = kind_of(file.path)
    if kind == "lines" and not file.path.endswith(tuple(COMPRESSIONS)):
        return _even(file.size_bytes, file.size_bytes, split_bytes)
    if kind == "zarr":
        return _even(token_arrays.length(file.path), file.size_bytes, split_bytes)
    if kind == "parquet":
        return _row_groups(file.path, config.ids_field or config.text_field, split_bytes)
    return []


def _even(length: int, size: int, split_bytes: int) -> list[tuple[tuple[int, int], int]]:
    """`length` places of `size` bytes in all, in even ranges of at most `split_bytes`."""
    count = min(-(-size // split_bytes), length)
    edges = [length * index // count for index in range(count + 1)] if count else []
    return [((first, stop), size * (stop - first) // length) for first, stop in pairwise(edges)]


def _row_groups(path: str, field: str, split_bytes: int) -> list[tuple[tuple[int, int], int]]:
    """Runs of a Parquet file's row groups, by the bytes of the column that is read.

    A file that is no Parquet is left whole: who reads it will say so.
    """
    try:
        with fsspec.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata
            sizes = []
            for group in range(metadata.num_row_groups):
                columns = metadata.row_group(group)
                sizes.append(
                    sum(
                        columns.column(index).total_compressed_size
                        for index in range(columns.num_columns)
                        if f"{columns.column(index).path_in_schema}.".startswith(f"{field}.")
                    )
                )
    except (pa.ArrowException, OSError, ValueError):
        return []
    runs: list[tuple[tuple[int, int], int]] = []
    first = total = 0
    for group, size in enumerate(sizes):
        if group > first and total + size > split_bytes:
            runs.append(((first, group), total))
            first, total = group, 0
        total += size
    return [*runs, ((first, len(sizes)), total)] if sizes else []
