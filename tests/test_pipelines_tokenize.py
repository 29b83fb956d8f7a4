"""`retort tokenize`: what is poison, what is dropped, what is taken how often, and what is said."""

import gzip
import io
import json
import os
import random
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from dump_world import POISON, digest, make_tokenizer, rich_corpus, tokenize_config
from rich.console import Console

from logit_store import manifests, reader, statistics
from logit_store.ledger import Ledger
from logit_store.repair import repair
from logit_store.verify import verify
from pipelines import tokenize, tokenize_plan
from schemas.errors import ConfigError, CorruptStoreError, ManifestMismatchError
from schemas.manifest import CorpusReport
from schemas.runs import CorpusConfig, TokenizeConfig
from teacher_dump.tokenizer import Tokenizer

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("world"))


def config(world: Path, store: Path, corpus: object, **changes: object) -> TokenizeConfig:
    found = corpus if isinstance(corpus, CorpusConfig) else CorpusConfig.model_validate(corpus)
    return tokenize_config(world, store, corpus=found, **changes)


def run(
    world: Path, store: Path, corpus: object, **changes: object
) -> tuple[CorpusReport, list[str]]:
    """Tokenize; returns the report, and the texts of the store's documents in order."""
    tokenize.tokenize(config(world, store, corpus, **changes), QUIET)
    assert verify(str(store)).problems == []
    report = manifests.read_report(str(store))
    assert report is not None
    return report, texts(world, store)


def texts(world: Path, store: Path) -> list[str]:
    tokens = reader.TokensReader(str(store))
    tokenizer = Tokenizer.load(world / "tokenizer.model")
    rows = tokens.rows(np.arange(tokens.manifest.num_sequences))
    ids = rows.tokens[rows.segment_ids > 0]
    begins = np.flatnonzero(ids == tokenizer.info.bos_id)
    return [tokenizer.decode(piece) for piece in np.split(ids, begins[1:])]


def lines(path: Path, found: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))


def test_poison_is_written_down_and_stops_nothing(world: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    good = [f"document {number} of the corpus" for number in range(20)]
    lines(corpus / "a.jsonl", good[:10])
    (corpus / "b.jsonl").write_bytes(POISON)
    noise = random.Random(0).randbytes(1_000_000).hex()
    seen = [{"text": noise[at : at + 1000]} for at in range(0, len(noise), 1000)]
    whole = gzip.compress("\n".join(map(json.dumps, seen)).encode())
    (corpus / "c.jsonl.gz").write_bytes(whole[:-20])
    (corpus / "d.txt").write_bytes(b"\xff")
    lines(corpus / "e.jsonl", good[10:])
    (corpus / "f.parquet").write_bytes(b"PAR1 no")
    store = tmp_path / "store"
    settings = {"paths": [str(corpus)], "max_document_bytes": 20_000}
    report, found = run(world, store, settings, split_bytes=10**6)
    assert found == good
    assert report.dead_letters == {
        "empty": 1,
        "no_text": 1,
        "not_json": 1,
        "not_utf8": 2,
        "nul_bytes": 1,
        "surrogate": 1,
        "too_long": 1,
        "unreadable": 2,
    }
    # The lines before the damage are lost with the file, and are told.
    assert set(report.dropped) == {"unreadable_file"}
    assert 0 < report.dropped["unreadable_file"] < 2000
    assert (report.documents_kept, report.documents, report.files) == (20, 20, 6)
    assert report.documents_read == 28 + report.dropped["unreadable_file"]
    letters = list(manifests.read_dead_letters(str(store)))
    places = [(Path(x.path).name, x.reason, x.line, x.byte) for x in letters]
    assert places[:3] == [
        ("b.jsonl", "not_utf8", 1, 0),
        ("b.jsonl", "not_json", 2, POISON.index(b"\n") + 1),
        ("b.jsonl", "no_text", 3, POISON.index(b'{"body"')),
    ]
    assert places[-3:] == [
        ("c.jsonl.gz", "unreadable", None, None),
        ("d.txt", "not_utf8", None, None),
        ("f.parquet", "unreadable", None, None),
    ]
    assert not [path for path in (store / "plan").rglob("*") if path.is_file()]


def test_a_corpus_of_poison_alone_is_an_error_that_says_so(world: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(ConfigError, match=r"none of the 1 files of .*filters \(no_text 3\); check"):
        run(world, tmp_path / "store", {"paths": [str(tmp_path / "corpus")]})


def test_listed_dead_letters_have_an_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_dump.documents.MOST_LETTERS", 3)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"body": "x"}\n' * 10 + '{"text": "good"}')
    report, _ = run(world, tmp_path / "store", {"paths": [str(tmp_path / "corpus")]})
    assert (report.dead_letters, report.unlisted_dead_letters) == ({"no_text": 10}, 7)
    assert len(list(manifests.read_dead_letters(str(tmp_path / "store")))) == 3


def test_filters_are_counted_and_the_first_of_copies_is_kept(world: Path, tmp_path: Path) -> None:
    base = [" ".join(f"word{n}{i}" for i in range(60)) for n in range(3)]
    near = base[1].replace("word17", "other")
    mails = ["write to a.b@example.org now", "write to c@example.org now"]
    lines(tmp_path / "corpus" / "a.jsonl", [*base, "blocked", "tiny", mails[0]])
    lines(tmp_path / "corpus" / "b.jsonl", [near, base[0], "new text here", mails[1], base[0]])
    (tmp_path / "words.txt").write_text("blocked\n")
    corpus = {
        "paths": [str(tmp_path / "corpus")],
        "min_characters": 5,
        "blocklist": {"file": str(tmp_path / "words.txt")},
        "duplicates": {"exact": True, "near": True},
        "masking": {"kinds": ["email"]},
    }
    for split_bytes in (10**6, 500):
        store = tmp_path / f"store{split_bytes}"
        report, found = run(world, store, corpus, split_bytes=split_bytes)
        assert found == [*base, "write to [EMAIL] now", "new text here"]
        assert report.dropped == {
            "blocklist": 1,
            "duplicates.exact": 3,
            "duplicates.near": 1,
            "min_characters": 1,
        }
        assert report.masked == {"email": 2}
    assert report.splits > 4


def test_every_position_is_told_from_which_file_it_is(world: Path, tmp_path: Path) -> None:
    """Three files in one split, an empty one among them, one of them taken more than once."""
    corpus = tmp_path / "corpus"
    letters = {"a": "abc", "c": "xyz"}
    draw = random.Random(0)
    for name, few in letters.items():
        made = ("".join(draw.choice(few) for _ in range(draw.randrange(1, 40))) for _ in range(30))
        lines(corpus / f"{name}.jsonl", list(made))
    lines(corpus / "b.jsonl", [])
    groups = [
        {"paths": [str(corpus / "a.jsonl")], "weight": 1},
        {"paths": [str(corpus / "[bc].jsonl")], "weight": 4},
    ]
    store = tmp_path / "store"
    given = {"mixture": groups, "mixture_epochs": 2.5}
    run(world, store, given, shard_sequences=4)
    found = manifests.read_corpus(str(store), reader.TokensReader(str(store)).manifest)
    assert max(split.stop_file - split.first_file for split in found.splits) > 1
    assert max(source.documents for source in found.sources) > 60
    tokenizer = Tokenizer.load(world / "tokenizer.model")
    tokens = reader.TokensReader(str(store))
    rows = tokens.rows(np.arange(tokens.manifest.num_sequences))
    finder = statistics.SourcesOfPositions(str(store), found)
    seen = set()
    for row, (ids, segments) in enumerate(zip(rows.tokens, rows.segment_ids, strict=True)):
        labels = finder.of(row, segments > 0)
        # A document's first token, which is the same of all, is of the file of its second.
        starts = np.flatnonzero((ids[:-1] == tokenizer.info.bos_id) & (segments[1:] > 0))
        np.testing.assert_array_equal(labels[starts], labels[starts + 1])
        for token, label in zip(ids[segments > 0], labels, strict=True):
            text = set(tokenizer.decode(np.array([token])).strip())
            path, files = finder.name(int(label))
            assert files == 1
            assert text <= set(letters[Path(path).stem]), (row, token, path)
            seen.add(Path(path).stem)
    assert seen == {"a", "c"}


def test_a_mixture_has_its_weights_whatever_the_splits(world: Path, tmp_path: Path) -> None:
    # What is taken depends on paths: in memory they are the same wherever the test runs.
    groups = {name: f"memory://mixture/{name}/x.jsonl" for name in "ab"}
    for name, count in (("a", 400), ("b", 300)):
        seen = [json.dumps({"text": f"{name} {n} text of a group"}) for n in range(count)]
        with fsspec.open(groups[name], "w") as file:
            file.write("\n".join(seen))
    corpus = {
        "mixture": [
            {"paths": [groups["a"]], "weight": 1},
            {"paths": [groups["b"]], "weight": 3},
        ],
        "mixture_seed": 3,
        "mixture_epochs": 1.5,
    }
    report, found = run(world, tmp_path / "s", corpus)
    a, b = ([text for text in found if text.startswith(name)] for name in "ab")
    assert report.mixture is not None
    assert [group.epochs for group in report.mixture] == pytest.approx([0.375, 1.5], rel=0.02)
    assert report.mixture[1].tokens / report.tokens == pytest.approx(0.75, abs=0.03)
    assert len(set(b)) == 300
    assert len(a) == len(set(a))
    # Second copies come after all the first ones of their split.
    first = b[:300]
    assert b[300:] == [text for text in first if text in set(b[300:])]
    assert report.dropped == {"mixture": 400 - len(a)}
    cut, again = run(world, tmp_path / "cut", corpus, split_bytes=3000)
    assert sorted(again) == sorted(found)
    assert cut.splits > 3
    corpus["mixture_seed"] = 4
    assert sorted(run(world, tmp_path / "other", corpus)[1]) != sorted(found)


def test_a_group_without_documents_is_an_error(world: Path, tmp_path: Path) -> None:
    lines(tmp_path / "a" / "x.jsonl", ["text"])
    lines(tmp_path / "b" / "x.jsonl", [""])
    groups = [{"paths": [str(tmp_path / name)], "weight": 1} for name in "ab"]
    with pytest.raises(ConfigError, match=r"must hold documents, but none of .*b passes"):
        run(world, tmp_path / "store", {"mixture": groups})


def test_a_tokenized_corpus_is_taken_as_it_is(world: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(world / "tokenizer.model")
    wanted = [f"text number {n}, of ids" for n in range(9)]
    ids = np.concatenate([tokenizer.encode_document(text) for text in wanted])
    zarr.create_array(tmp_path / "ids.zarr", data=ids.astype(np.uint16))
    report, found = run(
        world, tmp_path / "s", {"paths": [str(tmp_path / "ids.zarr")], "ids_field": "ids"}
    )
    assert found == wanted
    assert report.tokens == len(ids)
    assert report.text_bytes == sum(map(len, wanted))


def test_rows_do_not_depend_on_how_shards_cut_a_split(world: Path, tmp_path: Path) -> None:
    corpus = rich_corpus(world)
    _, found = run(world, tmp_path / "a", corpus, shard_sequences=1000)
    run(world, tmp_path / "b", corpus, shard_sequences=30)
    rows = [reader.TokensReader(str(tmp_path / name)) for name in "ab"]
    every = np.arange(rows[0].manifest.num_sequences)
    for name in ("tokens", "segment_ids"):
        one, two = (getattr(one.rows(every), name) for one in rows)
        np.testing.assert_array_equal(one, two)
    assert len(found) > 40


def test_what_lies_beside_the_sources_is_verified_and_written_again(
    world: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    settings = config(world, store, rich_corpus(world))
    tokenize.tokenize(settings, QUIET)
    whole = digest(store)
    for name in ("documents/00000000.bin", "corpus_report.json", "dead_letters/00000001.jsonl"):
        name = name if (store / name).exists() else next(n for n in whole if "dead_letters" in n)
        path = store / name
        path.write_bytes(path.read_bytes()[:-1])
        assert [problem.file for problem in verify(str(store)).problems] == [name]
        assert "`retort tokenize` writes it" in repair(str(store), apply=True)[1].left[0]
        tokenize.tokenize(settings, QUIET)
        assert digest(store) == whole
    shutil.rmtree(store / "documents")
    Ledger(str(store), None, manifests.read_manifest(str(store), None)).withdraw([1])
    tokenize.tokenize(settings, QUIET)
    assert digest(store) == whole


def test_documents_and_dead_letters_are_in_a_stores_bytes(world: Path, tmp_path: Path) -> None:
    lines(tmp_path / "a" / "x.jsonl", [f"text {n}" for n in range(40)])
    for name in ("poison", "z"):
        (tmp_path / "a" / f"{name}.jsonl").write_bytes(POISON)
    store = tmp_path / "s"
    run(world, store, {"paths": [str(tmp_path / "a")]}, split_bytes=300)
    on_disk = {path: path.stat().st_size for path in store.rglob("*") if path.is_file()}
    found = statistics.summary(str(store), None)
    for folder, size in (
        ("documents", found.documents_bytes),
        ("dead_letters", found.dead_letters_bytes),
    ):
        files = [path for path in on_disk if path.parent.name == folder]
        assert len(files) > 1
        assert size == sum(on_disk[path] for path in files)
    assert sum(found.sizes.values()) == sum(on_disk.values())
    assert found.bytes_per_token == sum(on_disk.values()) / found.tokens
    report = json.loads((store / "corpus_report.json").read_text())
    del report["dead_letter_bytes"]
    (store / "corpus_report.json").write_text(json.dumps(report))
    older = statistics.summary(str(store), None)
    assert (older.documents_bytes, older.dead_letters_bytes) == (found.documents_bytes, None)
    (store / "corpus_report.json").write_text("{")
    damaged = statistics.summary(str(store), None)
    assert (damaged.documents_bytes, damaged.dead_letters_bytes) == (None, None)
    with pytest.raises(CorruptStoreError, match="run `retort tokenize` again, which writes it"):
        manifests.read_report(str(store))


def test_other_settings_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    lines(tmp_path / "a" / "x.jsonl", ["one text", "another text"])
    words = tmp_path / "words.txt"
    words.write_text("nothing\n")
    corpus = {"paths": [str(tmp_path / "a")], "blocklist": {"file": str(words)}}
    run(world, tmp_path / "s", corpus)
    before = digest(tmp_path / "s")
    with pytest.raises(ManifestMismatchError, match=r"recipe\.min_characters is None there and 2"):
        run(world, tmp_path / "s", corpus | {"min_characters": 2})
    assert not [path for path in (tmp_path / "s" / "plan").rglob("*") if path.is_file()]
    words.write_text("text\n")
    with pytest.raises(ManifestMismatchError, match=r"recipe\.files\.\S*words.txt is \w+ there"):
        run(world, tmp_path / "s", corpus)
    words.write_text("nothing\n")
    run(world, tmp_path / "s", corpus)
    assert digest(tmp_path / "s") == before


def test_a_part_that_changes_between_the_passes_is_told(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.jsonl"
    lines(path, [f"text {n}" for n in range(100)])
    settings = config(world, tmp_path / "s", {"paths": [str(path)]}, split_bytes=500)
    tokenize.tokenize(settings, QUIET)
    ledger = Ledger(settings.store, None, manifests.read_manifest(settings.store, None))
    ledger.withdraw([0])
    path.write_text(path.read_text().replace("text 3", "next 3"))
    from logit_store.ledger import plan_shards

    spec = plan_shards(reader.TokensReader(settings.store).manifest)[0]
    with pytest.raises(ConfigError, match="Inputs must not change while they are tokenized"):
        tokenize.write_shard(settings, spec)


def test_an_error_of_a_worker_is_the_users_sentence_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").symlink_to(tmp_path / "absent")
    with pytest.raises(
        ConfigError, match=r"^Every corpus file must be readable, but .*; check it\.$"
    ):
        run(world, tmp_path / "s", {"paths": [str(tmp_path / "a")]})


@pytest.mark.parametrize(("split_bytes", "is_told"), [(100, True), (10**6, False)])
def test_a_large_file_that_cannot_be_cut_is_told(
    world: Path, tmp_path: Path, split_bytes: int, is_told: bool
) -> None:
    texts = [random.Random(n).randbytes(n).hex() for n in range(60)]
    for name in ("cut", "[whole]"):
        lines(tmp_path / "a" / f"{name}.jsonl", texts)
    path = tmp_path / "a" / "[whole].jsonl"
    compressed = gzip.compress(path.read_bytes())
    path.unlink()
    for name, some in (("[whole].jsonl.gz", compressed), ("small.jsonl.gz", compressed[:450])):
        (tmp_path / "a" / name).write_bytes(some)
    (tmp_path / "a" / "one.txt").write_text("a document " * 500)
    out = io.StringIO()
    settings = config(world, tmp_path / "s", {"paths": [str(tmp_path / "a")]})
    settings = settings.model_copy(update={"split_bytes": split_bytes})
    tokenize.tokenize(settings, Console(file=out, width=80, soft_wrap=True))
    sentence = (
        "tokenize: a compressed or Arrow file and a Parquet row group should be under 400 bytes, "
        "as one worker reads all of it, again for each shard of its rows, but "
        f"{tmp_path}/a/[whole].jsonl.gz has {len(compressed) / 1000:.2f} kB, the largest of 2; "
        "decompress it or cut it up.\n"
    )
    assert (sentence in out.getvalue()) == is_told
    assert ("should be under" in out.getvalue()) == is_told


def test_specs_are_small_however_many_files_there_are(world: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(500):
        (tmp_path / "a" / f"{number}{'x' * 100}.txt").write_text("x")
    settings = config(world, tmp_path / "s", {"paths": [str(tmp_path / "a")]})
    (spec,) = tokenize_plan.Desk(settings).lay_out(tokenize_plan.cut(settings))
    assert len(spec.canonical_json()) < 1024


def test_tokens_a_second_are_beside_a_bar_whose_numbers_are_whole(
    world: Path, tmp_path: Path
) -> None:
    """On a terminal of 80 columns, while the shards are written."""
    lines(tmp_path / "a" / "x.jsonl", [f"text {n} of the corpus" for n in range(300)])
    out = io.StringIO()
    settings = config(world, tmp_path / "s", {"paths": [str(tmp_path / "a")]})
    tokenize.tokenize(settings, Console(file=out, force_terminal=True, width=80))
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
    bar = r"tokenize: writing ━+ (\d+)/\1 shards [\d,.]+/s 0:00:\d\d left 0:00:00 *\n"
    assert re.search(rf"{bar}  [\d,]+ tokens/s\n", said), said[-400:]


def test_the_summary_says_it_all(world: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    settings = config(world, tmp_path / "s", rich_corpus(world))
    tokenize.tokenize(settings, Console(file=out, width=500))
    report = manifests.read_report(settings.store)
    said = out.getvalue()
    assert report is not None
    for piece in (
        f"documents: {report.documents_read:,} read, {report.documents_kept:,} kept",
        f"duplicates.exact {report.dropped['duplicates.exact']}",
        "surrogate 1",
        f"tokens: {report.tokens:,} in {report.rows:,} rows",
        "masked: email",
        "group 1: weight 1,",
        "tokens/s",
    ):
        assert piece in said, said
    assert {"blocklist", "decontamination", "duplicates.near", "scorer"} <= set(report.dropped)
    assert os.path.getsize(tmp_path / "s" / "corpus_report.json") < 4096
