"""Which files a corpus has, how they are cut, and what the records in them are, good or bad."""

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zarr
import zstandard

from schemas.corpus import CorpusConfig
from schemas.errors import ConfigError
from schemas.manifest import DeadLetter, TokenizerInfo
from teacher_dump import corpus, documents
from teacher_dump.corpus import Part
from teacher_dump.records import PartReader, Poison, Record

TEXTS = ["first\r\nline", "zweiter Text, größer 😀", "\tthird\n"]
INFO = TokenizerInfo(sha256="", vocab_size=100, bos_id=2, eos_id=1, pad_id=0)


def config(*paths: Path | str, **settings: object) -> CorpusConfig:
    return CorpusConfig.model_validate({"paths": [str(path) for path in paths], **settings})


def read(path: Path | str, settings: CorpusConfig, part: Part | None = None) -> PartReader:
    """A reader that has read all, with what it found in `texts` and `letters`."""
    reader = PartReader(part or Part(path=str(path), size_bytes=0), settings, INFO)
    reader.texts, reader.letters = [], []
    for record in reader:
        try:
            reader.texts.append(decode(record, str(path), settings))
        except Poison as poison:
            reader.letters.append(record.place.letter(str(path), poison))
    return reader


def decode(record: Record, path: str, settings: CorpusConfig) -> object:
    if settings.ids_field is None:
        return documents.decode_text(record, path, settings)
    return documents.decode_ids(record, path, settings, INFO.vocab_size).tolist()


def write(folder: Path, name: str) -> Path:
    """A file of TEXTS in the format that its name says, the text in `text` and in `a.b`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"other": [1, 2, 3], "text": TEXTS, "a": [{"b": t, "c": 0} for t in TEXTS]})
    lines = "\n".join(json.dumps({"text": t, "other": 1, "a": {"b": t}}) for t in TEXTS).encode()
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=2)
    elif name.endswith(".feather"):
        feather.write_feather(table, path, chunksize=2)
    elif name.endswith(".arrow"):
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:50]) + gzip.compress(lines[50:]))
    elif name.endswith(".zst"):
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:50]) + compress(lines[50:]))
    else:
        path.write_bytes(lines + b"\n\n")
    return path


MANY = ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.feather", "a.arrow"]


@pytest.mark.parametrize("field", ["text", "a.b"])
@pytest.mark.parametrize("name", MANY)
def test_files_of_many_documents(tmp_path: Path, name: str, field: str) -> None:
    path = write(tmp_path, name)
    reader = read(path, config(path, text_field=field))
    assert (reader.texts, reader.letters, reader.fault) == (TEXTS, [], None)
    assert reader.size_bytes == path.stat().st_size
    if "json" in name:
        assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [*corpus.TEXT_SUFFIXES, ".txt.gz", ".md.zst"])
def test_a_text_file_is_one_document_as_it_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    raw = TEXTS[0].encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(packed.get(path.suffix, bytes)(raw))
    reader = read(path, config(path))
    assert reader.texts == [TEXTS[0]]
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_are_listed_once_sorted_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.md", "a.py", "skip.bin", "b/c/d.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    zarr.create_array(tmp_path / "b/ids.zarr", data=np.zeros((2, 3), np.int32))
    files = corpus.list_files(config(tmp_path / "b", tmp_path, tmp_path / "a.py"))
    assert [Path(f.path).relative_to(tmp_path).as_posix() for f in files] == [
        "a.py",
        "b/a.md",
        "b/c/d.jsonl.gz",
        "b/ids.zarr",
        "b/z.txt",
    ]
    assert {f.size_bytes for f in files if not f.path.endswith("zarr")} == {5}
    found = corpus.list_files(config(f"{tmp_path}/b/?.*", f"{tmp_path}/*/c"))
    assert [Path(f.path).name for f in found] == ["a.md", "d.jsonl.gz", "z.txt"]


def test_urls_are_read_and_stay_urls() -> None:
    import fsspec

    with fsspec.open("memory://corpus/x/a.txt", "wb") as file:
        file.write(b"remote")
    (found,) = corpus.list_files(config("memory://corpus"))
    assert found.path == "memory:///corpus/x/a.txt"
    assert read(found.path, config("memory://corpus")).texts == ["remote"]
    assert corpus.list_files(config("memory://corpus/*/a.txt")) == [found]


def lines_with_marks(path: Path) -> list[str]:
    """A file whose lines have all lengths, blank ones among them, the last without an end."""
    texts = [f"{number}-" + "x" * (number * 37 % 211) for number in range(300)]
    with path.open("wb") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"text": text}).encode())
            file.write(b"\r\n" if number % 7 == 0 else b"\n\n" if number % 5 == 0 else b"\n")
        file.write(b'{"text": "last"}')
    return [*texts, "last"]


@pytest.mark.parametrize("split_bytes", [1, 17, 1000, 4096])
def test_a_large_file_of_lines_is_cut_without_losing_one(tmp_path: Path, split_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    texts = lines_with_marks(path)
    settings = config(path)
    if split_bytes == 1:
        path.write_bytes(path.read_bytes()[:700])
        texts = read(path, settings).texts
    splits = corpus.split(corpus.list_files(settings), settings, split_bytes)
    assert len(splits) > 3
    readers = [read(path, settings, part) for parts in splits for part in parts]
    assert [text for reader in readers for text in reader.texts] == texts
    assert sum(reader.size_bytes for reader in readers) == path.stat().st_size
    # What a part read is all that its hash is of: another line changes it, and no other part's.
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"0-', b'"1-'))
    again = [read(path, settings, part) for parts in splits for part in parts]
    changed = [a.sha256 != b.sha256 for a, b in zip(readers, again, strict=True)]
    assert changed == [True] + [False] * (len(readers) - 1)


def test_a_large_parquet_file_is_cut_by_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{number} " * 50 for number in range(100)]
    table = pa.table({"text": texts, "wide": ["y" * 5000] * 100})
    pq.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    settings = config(path)
    splits = corpus.split(corpus.list_files(settings), settings, 4000)
    parts = [part for some in splits for part in some]
    # By the bytes of the texts: the other column is not read.
    assert [part.part for part in parts] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    readers = [read(path, settings, part) for part in parts]
    assert [text for reader in readers for text in reader.texts] == texts
    letters = [r.place.row for part in parts for r in PartReader(part, settings, INFO)]
    assert letters == list(range(100))
    assert len({reader.sha256 for reader in readers}) == 5


def test_many_small_files_spread_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MOST_FILES", 4)
    for number in range(10):
        (tmp_path / f"{number}.txt").write_bytes(b"" if number < 5 else b"x" * 30)
    settings = config(tmp_path)
    splits = corpus.split(corpus.list_files(settings), settings, 60)
    assert [len(parts) for parts in splits] == [4, 3, 2, 1]


BAD_LINES = {
    "not_json": (b'{"text": oops}', "the line is not JSON (Expecting value)"),
    "not_json ": (b"[" * 100_000, "the line is not JSON (too deep, or a number too large)"),
    "not_json  ": (b'{"text": ' + b"1" * 5000 + b"}", "(too deep, or a number too large)"),
    "no_text": (b'{"body": "y"}', "there is no text in 'text'"),
    "no_text ": (b'{"text": 5}', "there is no text in 'text'"),
    "no_text  ": (b'["x"]', "there is no text in 'text'"),
    "not_utf8": (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
    "surrogate": (b'{"text": "\\ud83d"}', "half a surrogate pair is no character"),
    "nul_bytes": (b'{"text": "ab\\u0000"}', "there is a NUL at character 2"),
    "empty": (b'{"text": ""}', "the text is empty"),
    "too_long": (b'{"text": "' + b"x" * 200_000 + b'"}', "longer than max_document_bytes, 150000"),
}


@pytest.mark.parametrize("code", BAD_LINES)
def test_a_bad_line_is_a_dead_letter_and_the_others_are_read(tmp_path: Path, code: str) -> None:
    line, detail = BAD_LINES[code]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n' + line + b'\n{"text": "z"}\n')
    reader = read(path, config(path, max_document_bytes=150_000))
    assert reader.texts == ["x", "z"]
    assert reader.fault is None
    (letter,) = reader.letters
    assert (letter.path, letter.line, letter.byte) == (str(path), 3, 15)
    assert letter.reason == code.strip()
    assert detail in letter.detail
    assert letter.excerpt is None or (len(letter.excerpt) <= 80 and letter.excerpt.isascii())
    assert DeadLetter.model_validate_json(letter.canonical_json()) == letter


BAD_TEXTS = {"not_utf8": b"ab\xe9", "nul_bytes": b"a\0b", "empty": b"", "too_long": b"x" * 1001}


@pytest.mark.parametrize("code", BAD_TEXTS)
def test_a_bad_text_is_a_dead_letter(tmp_path: Path, code: str) -> None:
    (tmp_path / "a.txt").write_bytes(BAD_TEXTS[code])
    reader = read(tmp_path / "a.txt", config(tmp_path, max_document_bytes=1000))
    assert [letter.reason for letter in reader.letters] == [code]
    assert reader.texts == []


def test_a_long_line_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 50_000_000 + b'"}\n{"text": "y"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    tracemalloc.start()
    for name in ("a.jsonl", "b.jsonl.gz"):
        reader = read(tmp_path / name, config(tmp_path, max_document_bytes=1_000_000))
        assert reader.texts == ["y"]
        assert reader.letters[0].reason == "too_long"
    assert tracemalloc.get_traced_memory()[1] < 15_000_000
    tracemalloc.stop()


BAD_FILES = {
    "not gzip": ("a.jsonl.gz", b"plain"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9]),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(b"x" * 99)[:10] + b"\xff" * 20),
    "gzip of another sum": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-8] + b"12345678"),
    "not zstd": ("a.jsonl.zst", b"plain text"),
    "cut zstd": ("a.jsonl.zst", zstandard.ZstdCompressor().compress(b"x\n" * 9999)[:-5]),
    "cut text": ("a.txt.gz", gzip.compress(b"x" * 99)[:-9]),
    "not Parquet": ("a.parquet", b"PAR0"),
    "not Arrow": ("a.arrow", b"ARROW?"),
    "empty Feather": ("a.feather", b""),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_told_and_no_error(tmp_path: Path, name: str) -> None:
    file, raw = BAD_FILES[name]
    (tmp_path / file).write_bytes(raw)
    reader = read(tmp_path / file, config(tmp_path))
    assert reader.fault is not None
    assert reader.fault.reason == "unreadable"
    assert reader.fault.detail.startswith("the file is damaged or another kind")


def test_damage_inside_a_parquet_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet")
    raw = bytearray(path.read_bytes())
    raw[4:200] = b"\xff" * 196
    path.write_bytes(raw)
    assert read(path, config(path)).fault.reason == "unreadable"


def test_a_column_that_is_missing_or_holds_no_text(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.feather"):
        path = write(tmp_path, name)
        for field in ("body", "a.z"):
            fault = read(path, config(path, text_field=field)).fault
            assert (fault.reason, fault.detail) == ("no_field", f"the file has no column '{field}'")
        letters = read(path, config(path, text_field="other")).letters
        assert [(letter.reason, letter.row) for letter in letters] == [
            ("no_text", 0),
            ("no_text", 1),
            ("no_text", 2),
        ]
    values = [b"x", None, b"\xff", b"", b"a\0"]
    pq.write_table(pa.table({"text": values}), tmp_path / "b.parquet")
    reader = read(tmp_path / "b.parquet", config(tmp_path))
    assert reader.texts == ["x"]
    found = [(letter.row, letter.reason) for letter in reader.letters]
    assert found == [(1, "no_text"), (2, "not_utf8"), (3, "empty"), (4, "nul_bytes")]


IDS = [[2, 5, 6, 1], [2, 7, 1], [2, 99, 1]]


def write_ids(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "rows.zarr":
        rows = np.asarray([ids + [0] * (6 - len(ids)) for ids in IDS], np.uint16)
        zarr.create_array(path, data=rows, chunks=(2, 6))
    elif name == "stream.zarr":
        zarr.create_array(path, data=np.concatenate(IDS).astype(np.int32), chunks=(3,))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"ids": IDS}), path, row_group_size=1)
    elif name.endswith(".feather"):
        feather.write_feather(pa.table({"ids": pa.array(IDS, pa.list_(pa.uint16()))}), path)
    else:
        path.write_text("\n".join(json.dumps({"ids": ids}) for ids in IDS))
    return path


@pytest.mark.parametrize("split_bytes", [10**9, 1])
@pytest.mark.parametrize("name", ["rows.zarr", "stream.zarr", "a.parquet", "a.feather", "a.jsonl"])
def test_token_ids_are_taken_as_they_are(tmp_path: Path, name: str, split_bytes: int) -> None:
    path = write_ids(tmp_path, name)
    settings = config(path, ids_field="ids")
    splits = corpus.split(corpus.list_files(settings), settings, split_bytes)
    readers = [read(path, settings, part) for parts in splits for part in parts]
    assert [ids for reader in readers for ids in reader.texts] == IDS
    if split_bytes == 1 and not name.endswith(".feather"):
        assert len(readers) >= 3


def test_ids_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    bad = [[2, 100], [-1], [], [5], None, [10**30]]
    lines = "\n".join(json.dumps({"ids": ids}) for ids in [*bad, [2, 5.0], [True]])
    (tmp_path / "a.jsonl").write_text(lines)
    pq.write_table(pa.table({"ids": bad[:-1]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        reader = read(tmp_path / name, config(tmp_path, ids_field="ids"))
        assert reader.texts == [[5]]
        assert [letter.reason for letter in reader.letters][:4] == [
            "bad_ids",
            "bad_ids",
            "empty",
            "no_text",
        ]
        assert "the id at 1 is not one of the tokenizer's 100" in reader.letters[0].detail
    found = [
        letter.reason for letter in read(tmp_path / "a.jsonl", config("x", ids_field="ids")).letters
    ]
    assert found[4:] == ["bad_ids", "no_text", "no_text"]
    text = write(tmp_path, "t.parquet")
    assert {x.reason for x in read(text, config(text, ids_field="text")).letters} == {"no_text"}
    array = write_ids(tmp_path, "rows.zarr")
    assert read(array, config(array)).fault.reason == "no_field"


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path must exist, but .*absent does not; correct it"):
        corpus.list_files(config(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"path must exist, but .*\*\.txt does not"):
        corpus.list_files(config(tmp_path / "*.txt"))
    for name in ("absent.txt", "absent.jsonl.gz", "absent.parquet", "absent.arrow", "absent.zarr"):
        with pytest.raises(ConfigError, match=r"must be readable, but .*absent\.\w+.* is not"):
            read(tmp_path / name, config(tmp_path, ids_field="x"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.feather"])
def test_a_file_that_fails_while_it_is_read_is_an_error(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, name)

    def fail(self: object, size: int = -1) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileOpener.read", fail, raising=False)
    with pytest.raises(ConfigError, match=rf"must be readable, but .*{name} is not .*Input/output"):
        read(path, config(path))


def test_an_unknown_kind_of_file_or_url_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"must end in one of \.txt, .*, but .*a\.pdf does not"):
        corpus.list_files(config(tmp_path / "a.pdf"))
    with pytest.raises(ConfigError, match=r"holds none that ends in \.txt"):
        corpus.list_files(config(tmp_path))
    with pytest.raises(ConfigError, match=r"a URL that fsspec reads, but nowhere://x is not"):
        corpus.list_files(config("nowhere://x"))


def test_a_corpus_has_paths_or_a_mixture() -> None:
    group = {"paths": ["a"], "weight": 1}
    for paths, mixture in (((), ()), (("a",), (group,))):
        with pytest.raises(ConfigError, match="must have either paths or a mixture"):
            CorpusConfig.parse({"paths": paths, "mixture": mixture}, "config")
    with pytest.raises(ConfigError, match=r"ids_field goes with none of quality, masking; leave"):
        CorpusConfig.parse(
            {
                "paths": ["a"],
                "ids_field": "x",
                "quality": {"preset": "gopher"},
                "masking": {"kinds": ["ip"]},
            },
            "config",
        )
