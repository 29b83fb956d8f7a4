"""What is asked of a store: search, what stands out, differences, shards, chosen rows."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_store
import web_server
from rich.cells import cell_len
from rich.console import Console

from logit_store import chosen_rows, layout, reader, statistics, writer
from logit_store.entries import Entries, by_position
from logit_store.inspect import search, shards, terminal, terminal_compare
from logit_store.inspect.compare import cross_entropy, difference, divergence
from logit_store.inspect.queries import targets_row
from logit_store.inspect.text import Pieces, hidden, readable
from logit_store.ledger import Ledger
from logit_store.verify import metadata_problems, verify
from schemas.errors import ConfigError, IncompleteStoreError, ManifestMismatchError
from schemas.manifest import Corpus, SourceFile, Split, identity


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("store") / "s")
    small_store.write_store(url)
    return url


# Text


def test_pieces_spell_bytes_and_nothing_is_found_across_what_has_none():
    pieces = Pieces([b"", "ä".encode(), b"\xc3", b"bc"], ["<bos>", "ä", "<0xC3>", "bc"])
    data, begins = pieces.spell(np.array([1, 0, 3, 2, 9]))
    assert data == "ä".encode() + b"\xff" + b"bc" + b"\xc3" + b"\xff"
    assert begins.tolist() == [0, 2, 3, 5, 6, 7]
    assert pieces.text(9) == "⟨9⟩"


def test_text_is_made_harmless_and_what_was_hidden_is_named():
    assert readable("a\n\tb\u2028\x9b\u200f") == "a⏎\n⇥\tb���"
    assert hidden("a\u202e b\x1b") == ["U+202E", "U+001B"]
    assert hidden("plain ä 語\n") == ["U+000A"]


def found_by_force(text: str, ignore_case: bool = False) -> list[tuple[int, int]]:
    """Sequence and token of each match, by looking at every place of every row."""
    pieces = web_server.pieces()
    found = []
    for row, ids in enumerate(small_store.token_rows()[0]):
        texts = [pieces.text(int(i)) for i in ids]
        whole, wanted = "".join(texts), text
        if ignore_case:
            whole, wanted = whole.lower(), wanted.lower()
        owner = [t for t, piece in enumerate(texts) for _ in piece]
        at = whole.find(wanted)
        while at >= 0:
            found.append((row, owner[at]))
            at = whole.find(wanted, at + len(wanted))
    return found


@pytest.mark.parametrize("text", ["word", " word1", "d1", "script", "\n", "1 w", "no such text"])
@pytest.mark.parametrize("ignore_case", [False, True])
def test_text_is_found_however_it_was_cut_into_tokens(store, text, ignore_case):
    tokens, pieces = reader.TokensReader(store), web_server.pieces()
    wanted = text.upper() if ignore_case else text
    found = search.find_text(
        tokens, pieces, wanted, ignore_case=ignore_case, most=10**6, seconds=60
    )
    assert found.next is None
    assert [(m.sequence, m.position) for m in found.matches] == found_by_force(wanted, ignore_case)
    for match in found.matches:
        ids = tokens.rows([match.sequence]).tokens[0, match.position : match.stop]
        assert match.hit in "".join(pieces.text(int(i)) for i in ids)
        assert match.hit.lower() == text.lower()


def test_pages_of_a_search_have_each_match_once(store):
    tokens, pieces = reader.TokensReader(store), web_server.pieces()
    places, first = [], 0
    for _ in range(99):
        found = search.find_text(tokens, pieces, "word", first, most=12, seconds=60)
        places += [(m.sequence, m.position) for m in found.matches]
        if found.next is None:
            break
        assert found.next > first
        first = found.next
    assert places == found_by_force("word")


def test_a_search_ends_when_its_time_does_and_goes_on_from_there(store, monkeypatch):
    monkeypatch.setattr(search, "_TOKENS_AT_ONCE", small_store.LENGTH)
    tokens, pieces = reader.TokensReader(store), web_server.pieces()
    first, stops = 0, []
    while first is not None:
        first = search.find_text(tokens, pieces, "nowhere", first, seconds=0).next
        stops.append(first)
    assert stops == [1, 2, 3, 4, None]


def test_a_search_counts_what_it_could_not_read(tmp_path):
    url = str(tmp_path / "s")
    small_store.write_store(url)
    (Path(url) / "tokens/c/0/0").write_bytes(b"?")
    found = search.find_text(reader.TokensReader(url), web_server.pieces(), "word", seconds=60)
    assert found.unread == 2
    assert {m.sequence for m in found.matches} == {2, 3, 4}
    with pytest.raises(ConfigError, match="give at least a sign"):
        search.find_text(reader.TokensReader(url), web_server.pieces(), "")


@pytest.mark.parametrize("by", ["surprise", "entropy", "mass"])
def test_what_stands_out_is_the_worst_first(store, by):
    targets = reader.TargetsReader(store, "default")
    ranking = search.Ranking(targets, by)
    for _ in range(20):
        ranking.advance(0)
    assert ranking.is_complete
    expected = []
    for row in range(small_store.ROWS):
        found = targets_row(targets, row)
        assert found.predictions is not None
        values = {
            "surprise": found.predictions.surprise_nats,
            "entropy": found.predictions.entropy_nats,
            "mass": statistics.stored_mass(targets, targets.rows([row]))[0],
        }[by]
        expected.append((float(values[found.predicted].mean()), row))
    expected.sort(key=lambda item: (item[0] if by == "mass" else -item[0], item[1]))
    assert [s.mean for s in ranking.best] == pytest.approx([mean for mean, _ in expected])
    if by != "mass":
        assert [s.sequence for s in ranking.best] == [row for _, row in expected]
        row = targets_row(targets, ranking.best[0].sequence)
        assert row.predictions is not None
        values = getattr(row.predictions, f"{by}_nats")
        assert ranking.best[0].peak == values[row.predicted].max()
        assert ranking.best[0].label == row.tokens[ranking.best[0].position + 1]


def test_ranking_begins_with_the_shards_that_stand_out(store):
    """After one shard's rows the best are of the shard whose mean is largest."""
    targets = reader.TargetsReader(store, "default")
    ranking = search.Ranking(targets, "entropy")
    ranking.advance(0)
    assert ranking.shards_read == 1
    measure = shards.MEASURES["entropy"]
    found = shards.segment(targets.ledger, targets.manifest, 0)
    means = [measure.of(shard, shard.statistics) for shard in found]
    assert {s.sequence // 2 for s in ranking.best} == {int(np.argmax(means))}


# Shards


def test_shards_are_told_with_and_without_a_segment(tmp_path):
    url = str(tmp_path / "s")
    small_store.write_store(url)
    manifest = small_store.targets_manifest()
    ledger = Ledger(url, "default", manifest)
    before = shards.segment(ledger, manifest, 0)
    assert [shard.state for shard in before] == ["committed"] * 3
    assert sum(s.size_bytes for s in before) == sum(
        statistics.summary(url, "default").array_bytes[name] for name in layout.row_arrays(manifest)
    )
    ledger.withdraw([1])
    after = shards.segment(ledger, manifest, 0)
    assert [shard.state for shard in after] == ["committed", "missing", "committed"]
    assert [after[0], after[2]] == [before[0], before[2]]
    path = Path(url) / "targets/default/ledger/00000002.json"
    path.write_bytes(path.read_bytes().replace(b'"entries"', b'"Entries"'))
    assert shards.segment(ledger, manifest, 0)[2].state == "damaged"


# Differences


def entries(*positions: dict[int, float]) -> Entries:
    order = [sorted(p.items(), key=lambda item: (-item[1], item[0])) for p in positions]
    flat = [item for some in order for item in some]
    return Entries(
        np.cumsum([0, *map(len, positions)]),
        np.array([i for i, _ in flat], np.int32),
        np.array([w for _, w in flat], np.float32),
    )


def test_divergences_are_those_of_the_definition():
    left = entries({1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.25, 3: 0.25}, {1: 1.0}, {4: 1.0}, {})
    right = entries({2: 0.5, 1: 0.5}, {1: 0.25, 5: 0.75}, {2: 1.0}, {4: 0.5, 9: 0.5}, {})
    floor = 0.05
    found = divergence(left, right, 9, floor)
    ln = math.log
    # Of disjoint ones all is 'others' on both sides. Id 9 is the rest, which no side shares.
    kl = [0, 0.5 * ln(0.5 / 0.25) + 0.5 * ln(0.5 / 0.75), 0, ln(1 / 0.5), 0]
    assert found.kl == pytest.approx(kl)
    m = [(0.5, 0.375), (0.25, 0.125), (0.25, 0.125)]
    p = sum(a * ln(a / b) for a, b in m)
    q = 0.25 * ln(0.25 / 0.375) + 0.75 * ln(0.75 / 0.375)
    assert found.js == pytest.approx(
        [0, (p + q) / 2, ln(2), (ln(1 / 0.75) + 0.5 * ln(0.5 / 0.75) + 0.5 * ln(0.5 / 0.25)) / 2, 0]
    )
    assert found.same_top.tolist() == [True, False, False, True, True]
    assert found.identical.tolist() == [True, False, False, False, True]
    # Where the right has no mass on the others, it is given half a point.
    bare = divergence(entries({1: 0.5, 2: 0.5}), entries({1: 1.0}), 9, floor)
    assert bare.kl == pytest.approx([0.5 * ln(0.5 * 1.05) + 0.5 * ln(0.5 / (0.05 / 1.05))])


def test_a_cross_entropy_is_of_the_lefts_ids():
    left = entries({1: 0.5, 2: 0.5}, {3: 1.0})
    right = entries({1: 0.25, 2: 0.125, 7: 0.6}, {3: 0.5, 9: 0.5})
    assert cross_entropy(left, right, 9) == pytest.approx(
        [0.5 * math.log(4) + 0.5 * math.log(8), math.log(2)]
    )


def test_a_difference_to_itself_is_none_and_to_another_is_told_where(store, tmp_path, monkeypatch):
    a = reader.TargetsReader(store, "default")
    same = difference(a, a, np.arange(small_store.ROWS))
    predicted = layout.predicted_mask(small_store.token_rows()[1])
    assert same.positions == predicted.sum()
    assert (same.identical, same.top1_agreement) == (1, 1)
    assert (same.kl_nats, same.js_nats, same.entropy_difference_nats) == (0, 0, 0)
    assert same.largest == []
    other = small_store.target_rows(seed=12)
    monkeypatch.setattr(small_store, "target_rows", lambda: other)
    url = str(tmp_path / "s")
    small_store.write_store(url)
    b = reader.TargetsReader(url, "default")
    found = difference(a, b, np.arange(small_store.ROWS), most=7)
    batches = [t.rows(np.arange(small_store.ROWS)) for t in (a, b)]
    sides = [by_position(x, t.positions(x)) for x, t in zip(batches, (a, b), strict=True)]
    kl = divergence(*sides, small_store.VOCAB, 0.05).kl.reshape(predicted.shape)
    assert found.kl_nats == pytest.approx(kl[predicted].mean())
    assert 0 < found.js_nats <= math.log(2)
    assert [p.kl_nats for p in found.largest] == pytest.approx(sorted(kl.ravel())[::-1][:7])
    assert all(kl[p.sequence, p.position] == pytest.approx(p.kl_nats) for p in found.largest)
    entropy = [float(x.teacher_entropy[predicted].mean()) for x in batches]
    assert found.entropy_nats == pytest.approx(entropy)


def test_other_tokens_are_not_compared(store, tmp_path):
    url = str(tmp_path / "s")
    tokens = small_store.tokens_manifest(
        corpus=Corpus(
            sources=(SourceFile(path="x", size_bytes=1, sha256="0", documents=1, text_bytes=1),),
            splits=(),
        )
    )
    writer.create_tokens(
        url,
        tokens,
        Corpus(
            sources=(SourceFile(path="x", size_bytes=1, sha256="0", documents=1, text_bytes=1),),
            splits=(),
        ),
    )
    manifest = small_store.targets_manifest(tokens_fingerprint=identity(tokens))
    writer.create_targets(url, "default", manifest, small_store.tables())
    with pytest.raises(ManifestMismatchError, match="name stores of the same tokens"):
        terminal_compare.diff_data((store, "default"), (url, "default"), 9)


def test_a_diff_is_of_rows_that_both_have(store, tmp_path):
    url = str(tmp_path / "s")
    small_store.write_store(url)
    ledger = Ledger(url, "default", small_store.targets_manifest())
    ledger.withdraw([0])
    data = terminal_compare.diff_data((store, "default"), (url, "default"), 99)
    assert data["sequences"] == 3
    text = printed(terminal_compare.diff_view(data))
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "the same entries" in text
    ledger.withdraw([1, 2])
    with pytest.raises(IncompleteStoreError, match="none in common yet"):
        terminal_compare.diff_data((store, "default"), (url, "default"), 99)


def printed(view) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(view)
    return file.getvalue()


# Figures


def test_rows_are_thinned_evenly_over_what_is_committed():
    manifest = small_store.targets_manifest()
    committed = np.array([True, False, True])
    assert statistics.thinned(manifest, committed, 99).tolist() == [0, 1, 4]
    assert statistics.thinned(manifest, committed, 2).tolist() == [0, 4]
    assert statistics.thinned(manifest, np.zeros(3, bool), 9).tolist() == []
    large = manifest.model_copy(update={"num_sequences": 10**9, "shard_sequences": 10**6})
    rows = statistics.thinned(large, np.ones(1000, bool), 1000)
    assert len(rows) == 1000
    assert (rows[0], rows[-1]) == (0, 10**9 - 1)


def test_histograms_count_every_position_once(store):
    targets = reader.TargetsReader(store, "default")
    predicted = layout.predicted_mask(small_store.token_rows()[1]).sum()
    found = statistics.histograms(targets)
    columns = statistics.columns(targets, targets.rows(np.arange(small_store.ROWS)))
    for key, values in columns.items():
        assert found[key].counts.sum() == predicted
        assert found[key].mean == pytest.approx(values.mean())
        assert len(found[key].edges) == len(found[key].counts) + 1
    entries_of = found["entries per token"]
    values = columns["entries per token"]
    assert entries_of.counts.tolist() == [(values == n).sum() for n in range(1, values.max() + 1)]


def test_the_rank_of_the_label_is_its_place_by_weight(store):
    targets = reader.TargetsReader(store, "default")
    ranks = statistics.columns(targets, targets.rows(np.arange(small_store.ROWS)))[
        "rank of the label"
    ]
    expected = []
    for row in range(small_store.ROWS):
        found = targets_row(targets, row)
        for t in np.flatnonzero(found.predicted):
            answer = found.answer(int(t), str)
            assert answer is not None
            expected.append(answer.rank or 0)
    assert ranks.tolist() == expected


def test_stats_are_told_by_source(tmp_path):
    sources = tuple(
        SourceFile(
            path=f"/a/long/way/{name}\x1b.jsonl",
            size_bytes=1,
            sha256="0",
            documents=1,
            text_bytes=1,
        )
        for name in ("first", "second", "third")
    )
    corpus = Corpus(
        sources=sources,
        splits=(
            Split(first_file=0, stop_file=1, first_row=0, stop_row=3, tokens=1),
            Split(first_file=1, stop_file=3, first_row=3, stop_row=5, tokens=1),
        ),
    )
    url = str(tmp_path / "s")
    manifest = small_store.tokens_manifest(corpus=corpus)
    tokens, segments = small_store.token_rows()
    writer.create_tokens(url, manifest, corpus)
    for spec in Ledger(url, None, manifest).pending():
        rows = slice(spec.first_row, spec.stop_row)
        writer.TokensWriter(url).write(spec, tokens[rows], segments[rows])
    small_store.write_targets(url, tokens_fingerprint=identity(manifest))
    data = terminal.stats_data(url, "default", 99)
    assert [(s["sequences"], s["files"]) for s in data["sources"]] == [(3, 1), (2, 2)]
    targets = reader.TargetsReader(url, "default")
    for source, rows in zip(data["sources"], ([0, 1, 2], [3, 4]), strict=True):
        expected = statistics.columns(targets, targets.rows(rows))
        assert source["means"] == pytest.approx({k: v.mean() for k, v in expected.items()})
    text = printed(terminal.stats_view(data))
    assert "first�.jsonl" in text
    assert "second�.jsonl +1" in text
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert json.loads(json.dumps(data))["sources"]


def test_inspect_fits_a_screen_and_tells_damage(tmp_path):
    url = str(tmp_path / "s")
    small_store.write_store(url)
    text = printed(terminal.inspect_view(terminal.inspect_data(url)))
    assert len(text.splitlines()) <= 40
    assert "manifests, ledger and tables are whole" in text
    assert metadata_problems(url) == []
    path = Path(url) / "copies/targets/default/bucket_bits"
    path.write_bytes(b"?" + path.read_bytes()[1:])
    text = printed(terminal.inspect_view(terminal.inspect_data(url)))
    assert "copies/targets/default/bucket_bits: its values are not the manifest's" in text


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_verify_finds_the_same_with_any_number_of_threads(tmp_path, workers):
    url = str(tmp_path / "s")
    small_store.write_store(url)
    for key in ("targets/default/head_count/c/0/0", "tokens/c/2/0"):
        path = Path(url) / key
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    seen: list[int] = []
    report = verify(url, lambda done, note: seen.append(done), workers)
    assert seen == list(range(1, 7))
    assert [(p.file, p.shard) for p in report.problems] == [
        ("tokens/c/2/0", 2),
        ("targets/default/head_count/c/0/0", 0),
    ]


# Chosen rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", [3]), ("0:2", [0, 1]), (":2", [0, 1]), ("3:", [3, 4]), ("4,0:2, 3", [4, 0, 1, 3])],
)
def test_rows_are_chosen_by_numbers_and_ranges(text, expected):
    assert chosen_rows.parse_rows(text, 5).tolist() == expected


@pytest.mark.parametrize("text", ["", "x", "5", "2:2", "3:1", "0:6", "-1", "1-2", "1,,2", ","])
def test_other_rows_are_refused(text):
    with pytest.raises(ConfigError, match="rows must be"):
        chosen_rows.parse_rows(text, 5)


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_chosen_rows_are_those_of_the_whole_export(tmp_path, to):
    """Also of a store that is still being written, of which what is missing is refused."""
    url = str(tmp_path / "s")
    small_store.write_store(url)
    Ledger(url, "default", small_store.targets_manifest()).withdraw([1])
    out = tmp_path / f"rows.{to}"
    assert chosen_rows.export(url, "default", "4,0:2", out, to) == 3
    if to == "parquet":
        rows = pq.read_table(out).to_pylist()
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["sequence"] for row in rows] == [4, 0, 1]
    tokens, _ = small_store.token_rows()
    for row in rows:
        assert row["tokens"] == tokens[row["sequence"]].tolist()
        found = targets_row(reader.TargetsReader(url, "default"), row["sequence"])
        for t, (ids, weights) in enumerate(
            zip(row["entry_ids"], row["entry_weights"], strict=True)
        ):
            answer = found.answer(t, str)
            assert ids == [c.id for c in answer.candidates] if answer else ids == []
            assert weights == pytest.approx([c.weight for c in answer.candidates] if answer else [])
    with pytest.raises(ConfigError, match="exists; name another"):
        chosen_rows.export(url, "default", "0", out, to)
    with pytest.raises(IncompleteStoreError):
        chosen_rows.export(url, "default", "0:4", tmp_path / "more", to)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"rows.{to}", "s"]
