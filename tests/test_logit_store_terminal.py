"""What a person sees: views fit 80 columns, are plain when piped, and obey no hostile text."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_store
from rich.cells import cell_len
from rich.console import Console, RenderableType

from logit_store import codec, manifests, writer
from logit_store.codec import RowEntries
from logit_store.inspect import terminal
from logit_store.inspect.text import printable, visible
from logit_store.ledger import Ledger
from logit_store.verify import verify
from schemas.errors import ConfigError
from schemas.manifest import TeacherInfo

HOSTILE = "\x1b[31m[red]\x07\u202e"


def piece(index: int) -> str:
    special = {0: HOSTILE, 1: "\n\n", 2: " " * 31, 3: "語" * 12, 4: "x" * 60, 5: "\t"}
    return special.get(index % 9, f" piece{index}")


@pytest.fixture
def store(tmp_path) -> str:
    url = str(tmp_path / "s")
    small_store.write_tokens(url)
    teacher = TeacherInfo(
        name=f"evil{HOSTILE}", config_sha256="0" * 64, weights_sha256="1" * 64, vocab_size=300
    )
    small_store.write_targets(url, teacher=teacher)
    return url


def printed(view: RenderableType, width: int = 80, is_terminal: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=is_terminal).print(view)
    return file.getvalue()


def views(url: str) -> dict[str, RenderableType]:
    return {
        "inspect": terminal.inspect_view(terminal.inspect_data(url)),
        "show": terminal.show_view(terminal.show_data(url, "default", 1, None, 16, piece)),
        "show tokens": terminal.show_view(terminal.show_data(url, None, 4, 3, 99, piece)),
        "stats": terminal.stats_view(terminal.stats_data(url, "default", 99)),
        "verify": terminal.verify_view(url, verify(url)),
    }


@pytest.mark.parametrize("name", ["inspect", "show", "show tokens", "stats", "verify"])
def test_a_view_fits_80_columns_and_is_plain_when_piped(store, name):
    (Path(store) / f"stray{HOSTILE}").write_bytes(b"?")
    text = printed(views(store)[name])
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert not [c for c in text if c < " " and c != "\n"]
    assert "\u202e" not in text
    assert len(text.splitlines()) > 1


def test_hostile_text_is_shown_and_not_obeyed(store):
    (Path(store) / f"stray{HOSTILE}").write_bytes(b"?")
    for name in ("inspect", "verify"):
        assert "�[31m[red]��" in printed(views(store)[name])
    # On a terminal the views use bold and nothing else.
    for view in views(store).values():
        text = printed(view, is_terminal=True)
        assert text.replace("\x1b[1m", "").replace("\x1b[0m", "").count("\x1b") == 0


def test_white_space_is_visible():
    assert visible("a b\n\tc\r\x1b") == "a␣b⏎⇥c␍�"
    assert printable("a b\nc\x1b") == "a b�c�"


def test_show_lists_a_positions_entries_by_weight(store):
    """Of row 1, whose second block has fewer points; positions 9 and 15 have no next token."""
    tokens, _ = small_store.token_rows()
    rows, block_points = small_store.row_entries()
    nats = codec.decode_nats(small_store.target_rows().teacher_nats)[1]
    data = terminal.show_data(store, "default", 1, 2, 99, piece)
    assert [item["position"] for item in data["positions"]] == list(range(2, 16))
    assert data["text"] == "".join(piece(int(token)) for token in tokens[1, 2:])
    for item in data["positions"]:
        t = item["position"]
        assert (item["token"], item["text"]) == (tokens[1, t], piece(item["token"]))
        if t in (9, 15):
            assert "candidates" not in item
            continue
        mine = rows[1].position == t
        expected = {
            int(i): int(p) / int(block_points[1, t // small_store.BLOCK])
            for i, p in zip(rows[1].id[mine], rows[1].points[mine], strict=True)
        }
        weights = [candidate["weight"] for candidate in item["candidates"]]
        assert weights == sorted(weights, reverse=True)
        assert {c["id"]: c["weight"] for c in item["candidates"]} == pytest.approx(expected)
        assert {c["id"]: c["text"] for c in item["candidates"]} == {i: piece(i) for i in expected}
        assert item["entropy_nats"] == nats[0, t]
        label = int(tokens[1, t + 1])
        assert (item["label"], item["label_text"]) == (label, piece(label))
        assert item["label_probability"] == pytest.approx(np.exp(-nats[1, t]))
        if label not in expected:
            assert (item["label_weight"], item["label_rank_among_stored"]) == (0, None)


def _with_ids(monkeypatch, change) -> None:
    """The small store's rows with other ids at each position: change(row, its entries)."""
    whole = small_store.target_rows()
    encoded = []
    for row, entries in enumerate(small_store.row_entries()[0]):
        changed = RowEntries(entries.position, change(row, entries), entries.points)
        slots = small_store.LENGTH * small_store.PER_TOKEN
        vocabulary = small_store.tables().vocabulary
        encoded.append(codec.encode_row(vocabulary, changed, small_store.LENGTH, slots, 10))
    columns = {name: np.stack([row[name] for row in encoded]) for name in encoded[0]}
    targets = replace(whole, **columns)
    monkeypatch.setattr(small_store, "target_rows", lambda: targets)


def test_show_says_where_the_label_is_among_the_candidates(tmp_path, monkeypatch):
    tokens, _ = small_store.token_rows()

    def labels_last(row: int, entries: RowEntries) -> np.ndarray:
        """The lightest of a position's entries is the token that follows."""
        ids = np.empty_like(entries.id)
        for t in np.unique(entries.position):
            mine = np.flatnonzero(entries.position == t)
            mine = mine[np.argsort(-entries.points[mine], kind="stable")]
            ids[mine] = (tokens[row, t + 1] + 1 + np.arange(len(mine))) % small_store.VOCAB
            ids[mine[-1]] = tokens[row, t + 1]
        return ids

    _with_ids(monkeypatch, labels_last)
    url = str(tmp_path / "s")
    small_store.write_store(url)
    items = terminal.show_data(url, "default", 0, 0, 9, piece)["positions"]
    assert {len(item["candidates"]) for item in items} == {1, 2, 3}
    for item in items:
        weights = {c["id"]: c["weight"] for c in item["candidates"]}
        assert item["label_weight"] == weights[item["label"]] == min(weights.values())
        place = [c["id"] for c in item["candidates"]].index(item["label"])
        assert item["label_rank_among_stored"] == place + 1


def test_show_names_what_stands_for_all_other_ids(tmp_path, monkeypatch):
    """The rest has no piece; the tokenizer is not asked for one."""

    def with_rest(row: int, entries: RowEntries) -> np.ndarray:
        first = np.flatnonzero(np.diff(entries.position, prepend=-1))
        ids = entries.id.copy()
        ids[first] = small_store.VOCAB
        return ids

    def known_piece(index: int) -> str:
        assert 0 <= index < small_store.VOCAB
        return piece(index)

    _with_ids(monkeypatch, with_rest)
    url = str(tmp_path / "s")
    small_store.write_tokens(url)
    sampler = small_store.targets_manifest().sampler.model_copy(update={"name": "top_k"})
    small_store.write_targets(url, sampler=sampler)
    data = terminal.show_data(url, "default", 0, 0, 9, known_piece)
    for item in data["positions"]:
        (rest,) = [c for c in item["candidates"] if c["id"] == small_store.VOCAB]
        assert rest["text"] == "(all others)"
    assert "(all␣others)" in printed(terminal.show_view(data), width=200)


def test_long_pieces_leave_room_for_the_numbers_and_the_candidates(store):
    data = terminal.show_data(store, "default", 1, 0, 16, lambda index: "x" * 60)
    lines = printed(terminal.show_view(data)).splitlines()
    # Behind the title, which a long path makes two lines.
    headings = ["pos", "token", "nats", "next", "p", "rank", "candidates"]
    assert headings in [line.split() for line in lines[1:3]]
    text = "\n".join(lines)
    for item in data["positions"]:
        assert f"\n{item['position']:3}  xxx" in text
        if "candidates" in item:
            assert f"{item['entropy_nats']:.2f}" in text
            assert f"{item['label_probability']:.3f}" in text
            assert all(f"{c['weight']:.3f}" in text for c in item["candidates"])


def test_show_counts_the_candidates_that_it_leaves_out(store):
    data = terminal.show_data(store, "default", 1, 0, 8, piece)
    item = next(item for item in data["positions"] if "candidates" in item)
    item["candidates"] = [{"id": i, "text": f"c{i}", "weight": 0.1} for i in range(9)]
    text = printed(terminal.show_view({**data, "positions": [item]}), width=200)
    assert "c5 0.100  +3" in text
    assert "c6" not in text


@pytest.mark.parametrize(
    ("sequence", "position", "message"),
    [
        (5, None, r"--sequence must be in \[0, 5\), but it is 5"),
        (0, 16, r"--position must be in \[0, 16\), but it is 16"),
    ],
)
def test_show_refuses_what_is_not_there(store, sequence, position, message):
    with pytest.raises(ConfigError, match=message):
        terminal.show_data(store, "default", sequence, position, 4, piece)


def test_inspect_says_how_complete_a_store_is(store):
    assert "yes, 3 shards" in printed(views(store)["inspect"])
    Ledger(store, "default", manifests.read_manifest(store, "default")).withdraw([1])
    assert "no, 2 of 3 shards" in printed(terminal.inspect_view(terminal.inspect_data(store)))
    assert "; 1 shard is not committed yet" in printed(terminal.verify_view("s", verify(store)))


def test_verify_names_every_problem(store):
    (Path(store) / "targets/default/entry_bucket/c/2/0").write_bytes(b"")
    (Path(store) / "stray").write_bytes(b"")
    text = printed(terminal.verify_view("s", verify(store)), width=200)
    assert "s: 2 problems" in text
    expected = "the file is missing or shorter than recorded"
    assert f"shard 2: targets/default/entry_bucket/c/2/0: {expected}" in text
    assert "stray: no manifest or ledger record knows this file" in text


def test_views_of_a_store_without_shards(tmp_path):
    url = str(tmp_path / "s")
    writer.create_tokens(url, small_store.tokens_manifest(), small_store.CORPUS)
    manifest = small_store.targets_manifest()
    writer.create_targets(url, "default", manifest, small_store.tables())
    assert "no, 0 of 3 shards" in printed(terminal.inspect_view(terminal.inspect_data(url)))
    assert printed(terminal.stats_view(terminal.stats_data(url, "default", 9)))


def test_each_views_data_is_json(store):
    report = verify(store)
    for data in (
        terminal.inspect_data(store),
        terminal.show_data(store, "default", 0, 0, 4, piece),
        terminal.stats_data(store, "default", 9),
        terminal.verify_data(store, report),
    ):
        assert json.loads(json.dumps(data, allow_nan=False))["store"] == store
