"""The corpus: every format gives its documents; whatever is wrong is named by file and line."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError
from schemas.runs import CorpusConfig
from teacher_dump import corpus

TEXTS = ["first\r\nline", "zweiter Text, größer 😀", "\tthird\n"]


def config(*paths: Path | str, **settings: object) -> CorpusConfig:
    return CorpusConfig.model_validate({"paths": [str(path) for path in paths], **settings})


def write(folder: Path, name: str) -> Path:
    """A file of TEXTS in the format that its name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps({"text": text, "other": 1}) for text in TEXTS)
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3]}), path, row_group_size=2)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_bytes(lines.encode() + b"\n\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_files_of_many_documents(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    source, texts = corpus.read_file(str(path), config(path))
    assert texts == TEXTS
    raw = path.read_bytes()
    assert source.path == str(path)
    assert source.size_bytes == len(raw)
    assert source.sha256 == hashlib.sha256(raw).hexdigest()
    assert source.documents == 3
    assert source.text_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("suffix", corpus.TEXT_SUFFIXES)
def test_a_text_file_is_one_document_as_it_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(TEXTS[0].encode())
    assert corpus.read_file(str(path), config(path))[1] == [TEXTS[0]]


def test_files_are_listed_once_sorted_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.md", "a.py", "skip.bin", "b/c/d.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    files = corpus.list_files(config(tmp_path / "b", tmp_path, tmp_path / "a.py"))
    assert [Path(f.path).relative_to(tmp_path).as_posix() for f in files] == [
        "a.py",
        "b/a.md",
        "b/c/d.jsonl.gz",
        "b/z.txt",
    ]
    assert {f.size_bytes for f in files} == {5}


def test_urls_are_read_and_stay_urls() -> None:
    import fsspec

    with fsspec.open("memory://corpus/x/a.txt", "wb") as file:
        file.write(b"remote")
    (found,) = corpus.list_files(config("memory://corpus"))
    assert found.path == "memory:///corpus/x/a.txt"
    assert corpus.read_file(found.path, config("memory://corpus"))[1] == ["remote"]


def test_filters_count_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": "é" * n}) for n in (1, 2, 3, 4)))
    source, texts = corpus.read_file(
        str(path), config(path, text_field="body", min_characters=2, max_characters=3)
    )
    assert texts == ["éé", "ééé"]
    assert (source.documents, source.text_bytes) == (2, 10)


BAD_FILES = {
    "bad JSON": (
        "a.jsonl",
        b'{"text": "x"}\n\n{"text": oops}\n',
        r"Every line must be JSON, but line 3 of .*a\.jsonl is not \(Expecting value\)",
    ),
    "missing field": (
        "a.jsonl",
        b'{"text": "x"}\n{"body": "y"}\n',
        r"must have text in 'text', but line 2 of .*a\.jsonl has not; set corpus\.text_field",
    ),
    "text is a number": ("a.jsonl", b'{"text": 5}\n', r"in 'text', but line 1 of .* has not"),
    "no object": ("a.jsonl", b'["x"]\n', r"in 'text', but line 1 of .* has not"),
    "bad UTF-8 in a line": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": "\xff"}\n',
        r"must be UTF-8, but line 2 of .*a\.jsonl is not at byte 10",
    ),
    "bad UTF-8 in a text": ("a.txt", b"ab\xe9", r"must be UTF-8, but .*a\.txt is not at byte 2"),
    "half a surrogate pair": (
        "a.jsonl",
        b'{"text": "\\ud83d"}',
        r"valid Unicode, but line 1 of .*a\.jsonl holds half a surrogate pair",
    ),
    "not gzip": ("a.jsonl.gz", b"plain", r"A \.gz file must be whole, but .*a\.jsonl\.gz is not"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b"x" * 99)[:-9], r"must be whole, but .*gz is not"),
    "damaged gzip": (
        "a.jsonl.gz",
        gzip.compress(b"x" * 99)[:10] + b"\xff" * 20,
        r"must be whole, but .*gz is not",
    ),
    "not Parquet": ("a.parquet", b"PAR0", r"A \.parquet file must be whole, but .*a\.parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, name: str) -> None:
    file, raw, message = BAD_FILES[name]
    path = tmp_path / file
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=message):
        corpus.read_file(str(path), config(path))


def test_a_parquet_file_without_the_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet")
    with pytest.raises(ConfigError, match=r"must have the column 'body', but .*a\.parquet has not"):
        corpus.read_file(str(path), config(path, text_field="body"))


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None]}), path)
    with pytest.raises(ConfigError, match=r"in 'text', but row 1 of .*a\.parquet has None"):
        corpus.read_file(str(path), config(path))


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path must exist, but .*absent does not; correct it"):
        corpus.list_files(config(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"must be readable, but .*absent\.txt is not"):
        corpus.read_file(str(tmp_path / "absent.txt"), config(tmp_path))


def test_an_unknown_kind_of_file_or_url_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"must end in one of \.txt, .*, but .*a\.pdf does not"):
        corpus.list_files(config(tmp_path / "a.pdf"))
    with pytest.raises(ConfigError, match=r"holds none that ends in \.txt"):
        corpus.list_files(config(tmp_path))
    with pytest.raises(ConfigError, match=r"a URL that fsspec reads, but nowhere://x is not"):
        corpus.list_files(config("nowhere://x"))
