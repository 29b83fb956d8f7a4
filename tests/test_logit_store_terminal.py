"""What a person sees: views fit 80 columns, are plain when piped, and obey no hostile text."""

import io
import json
from pathlib import Path

import pytest
import small_store
from rich.cells import cell_len
from rich.console import Console, RenderableType

from logit_store import reader, writer
from logit_store.inspect import terminal
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
    assert terminal.visible("a b\n\tc\r\x1b") == "a␣b⏎⇥c␍�"
    assert terminal.printable("a b\nc\x1b") == "a b�c�"


def test_show_lists_a_positions_entries_by_weight(store):
    batch = reader.TargetsReader(store, "default").rows([1])
    data = terminal.show_data(store, "default", 1, 2, 5, piece)
    assert [item["position"] for item in data["positions"]] == [2, 3, 4, 5, 6]
    shown = 0
    for item in data["positions"]:
        t = item["position"]
        assert item["token"] == batch.tokens[0, t]
        assert item["text"] == piece(item["token"])
        if batch.entry_count[0, t] == 0:
            assert "candidates" not in item
            continue
        shown += 1
        weights = [candidate["weight"] for candidate in item["candidates"]]
        assert weights == sorted(weights, reverse=True)
        slots = (batch.entry_position[0] == t) & (batch.entry_id[0] >= 0)
        assert {c["id"]: c["weight"] for c in item["candidates"]} == {
            int(i): float(w)
            for i, w in zip(batch.entry_id[0, slots], batch.entry_weight[0, slots], strict=True)
        }
        assert item["label"] == batch.tokens[0, t + 1]
    assert shown >= 2


def test_long_pieces_leave_room_for_the_numbers_and_the_candidates(store):
    data = terminal.show_data(store, "default", 1, 0, 16, lambda index: "x" * 60)
    lines = printed(terminal.show_view(data)).splitlines()
    assert lines[1].split() == ["pos", "token", "nats", "next", "p", "candidates"]
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
    (Path(store) / "targets/default/ledger/00000001.json").unlink()
    assert "no, 2 of 3 shards" in printed(terminal.inspect_view(terminal.inspect_data(store)))
    assert "; 1 shard is not committed yet" in printed(terminal.verify_view("s", verify(store)))


def test_verify_names_every_problem(store):
    (Path(store) / "targets/default/entry_id/c/2/0").write_bytes(b"")
    (Path(store) / "stray").write_bytes(b"")
    text = printed(terminal.verify_view("s", verify(store)), width=200)
    assert "s: 2 problems" in text
    assert "shard 2: targets/default/entry_id/c/2/0: it has 0 bytes" in text
    assert "stray: no manifest or ledger record knows this file" in text


def test_views_of_a_store_without_shards(tmp_path):
    url = str(tmp_path / "s")
    writer.create_tokens(url, small_store.tokens_manifest())
    writer.create_targets(url, "default", small_store.targets_manifest())
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
