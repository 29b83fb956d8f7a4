"""The inspector's pages without a browser: who is answered, with what headers, about what."""

import html
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import small_store
import web_server
from web_server import ask

from logit_store import writer
from logit_store.inspect.text import Pieces
from logit_store.inspect.web import server
from logit_store.inspect.web.safety import POLICY, is_loopback
from logit_store.ledger import Ledger, shard_spec
from schemas.errors import ConfigError

TOKEN = "a-token-of-a-test"
PAGES = [
    "/s/0",
    "/s/0/figures",
    "/s/0/shards",
    "/s/0/shards?by=entropy",
    "/s/0/shard/1",
    "/s/0/progress",
    "/s/0/sequence/1",
    "/s/0/sequence/1/position/2",
    "/s/0/search",
    "/s/0/search?text=word",
    "/s/0/find?by=surprise",
    "/s/0/find?by=entropy",
    "/s/0/find?by=mass",
    "/s/0/compare?sequence=1",
    "/s/0/compare/1/position/2",
]


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> list[str]:
    """Two stores over the same tokens; the second one's teacher said other things."""
    folder = tmp_path_factory.mktemp("stores")
    found = [str(folder / name / "s.zarr") for name in ("one", "two")]
    small_store.write_store(found[0])
    small_store.write_tokens(found[1])
    small_store.write_targets(found[1], seed=1)
    return found


@pytest.fixture(scope="module")
def address(urls):
    with web_server.serving(web_server.opened(*urls)) as found:
        yield found


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_there_with_its_headers(address, path):
    status, headers, text = ask(address, path)
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    # No inline script, style or handler, which the policy would refuse.
    assert not re.search(r"<script(?! src=)|<style|\sstyle=|\son[a-z]+=", _without_text(text))


def _without_text(page: str) -> str:
    """The tags of a page alone."""
    return "".join(re.findall(r"<[^>]*>", page))


def test_nothing_runs_or_loads_but_the_packages_own_files():
    directives = dict(part.split(" ", 1) for part in POLICY.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == "'self'"
    assert directives["frame-ancestors"] == directives["base-uri"] == "'none'"
    assert "unsafe" not in POLICY


def test_a_part_is_the_content_alone(address):
    _, _, page = ask(address, "/s/0/figures")
    _, _, part = ask(address, "/s/0/figures", x_part="1")
    assert "<html" in page
    assert "<html" not in part
    assert 'class="plots"' in part


@pytest.mark.parametrize("where", ["/s/0/sequence/{}", "/s/0/compare?sequence={}"])
def test_text_is_escaped_and_signs_stand_for_what_is_hidden(address, where):
    tokens, _ = small_store.token_rows()
    seen = ""
    for row in range(small_store.ROWS):
        seen += ask(address, where.format(row))[2]
    for piece in (web_server.SCRIPT, web_server.IMAGE):
        assert piece not in seen
        assert html.escape(piece, quote=False).replace("'", "&#39;") in seen
    assert "\x1b" not in seen
    assert "\u202e" not in seen
    assert "�[31m��" in seen
    assert "{{ 7*7 }}" in seen
    assert (tokens % 9 == 2).any()


def test_a_hidden_character_is_named(address):
    tokens, _ = small_store.token_rows()
    row, position = _first(tokens)
    _, _, text = ask(address, f"/s/0/sequence/{row}/position/{position}", x_part="1")
    assert "U+001B U+202E U+0007" in text


def _first(tokens) -> tuple[int, int]:
    rows, positions = (tokens % 9 == 2).nonzero()
    return int(rows[0]), int(positions[0])


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/s/2", 404),
        ("/s/-1", 404),
        ("/s/0/../../../etc/passwd", 404),
        ("/s/%2e%2e/x", 404),
        ("/s//etc/passwd", 404),
        ("/static/../app.py", 404),
        ("/static/..%2fapp.py", 404),
        ("/static/%2e%2e/templates/base.html", 404),
        ("/static//etc/passwd", 404),
        ("/s/0?targets=../../one", 404),
        ("/s/0?targets=/etc", 404),
        ("/s/0/sequence/5", 400),
        ("/s/0/sequence/99999999999999999999", 400),
        ("/s/0/sequence/1?position=16", 400),
        ("/s/0/shard/3", 400),
        ("/s/0/shards?segment=1", 400),
        ("/s/0/shards?by=secrets", 400),
        ("/s/0/find?by=secrets", 400),
        ("/s/0/search?text=a&from=x", 400),
        ("/s/0/compare?left=7.default", 400),
        ("/nowhere", 404),
    ],
)
def test_nothing_else_can_be_asked_for(address, path, status):
    found, headers, text = ask(address, path)
    assert found == status
    assert headers["content-security-policy"] == POLICY
    assert "root:" not in text
    assert "Traceback" not in text


def test_only_reading_is_answered(address):
    assert ask(address, "/s/0", "POST")[0] == 405
    assert ask(address, "/s/0", "DELETE")[0] == 405
    assert ask(address, "/s/0", "HEAD")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "retort.example", "127.0.0.1.evil.example", ""])
def test_another_sites_name_is_refused_on_loopback(address, host):
    assert ask(address, "/s/0", host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:99", "LOCALHOST"])
def test_names_of_loopback_are_answered(address, host):
    assert ask(address, "/s/0", host=host)[0] == 200


def test_a_token_is_asked_for_once_and_then_kept_in_a_cookie(urls):
    with web_server.serving(web_server.opened(urls[0]), TOKEN) as address:
        for path in ("/s/0", "/static/retort.css", "/nowhere"):
            status, headers, text = ask(address, path)
            assert status == 401
            assert "store 0" not in text
            assert headers["content-security-policy"] == POLICY
        assert ask(address, f"/s/0?token={TOKEN}x")[0] == 403
        assert ask(address, "/s/0", cookie=f"retort_{_port(address)}=wrong")[0] == 401
        status, headers, _ = ask(address, f"/s/0/search?text=a+b&token={TOKEN}")
        assert (status, headers["location"]) == (303, "/s/0/search?text=a+b")
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=lax" in cookie.lower()
        assert ask(address, "/s/0", cookie=cookie.split(";")[0])[0] == 200
        # With a token addresses and the names that were given are answered, and no others.
        kept = {"cookie": cookie.split(";")[0]}
        assert ask(address, "/s/0", host="192.0.2.7:80", **kept)[0] == 200
        assert ask(address, "/s/0", host="retort.example", **kept)[0] == 200
        assert ask(address, "/s/0", host="evil.example", **kept)[0] == 421
        # Not to another site, whatever the path looks like.
        _, headers, _ = ask(address, f"//evil.example/?token={TOKEN}")
        assert headers["location"] == "/evil.example/"


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def test_an_address_that_others_can_reach_has_a_token():
    assert server.needed_token("127.0.0.1", None) is None
    assert server.needed_token("localhost", None) is None
    assert server.needed_token("::1", None) is None
    assert server.needed_token("127.0.0.1", "given-token") == "given-token"
    for host in ("0.0.0.0", "::", "192.0.2.7", "retort.example", "localhost.evil.example"):
        assert not is_loopback(host)
        found = server.needed_token(host, None)
        assert found is not None
        assert len(found) >= 32
        assert found != server.needed_token(host, None)
    assert server.address("::1", 80, "t") == "http://[::1]:80/?token=t"


def test_a_port_that_is_taken_is_one_sentence():
    with (
        server.listen("127.0.0.1", 0) as taken,
        pytest.raises(ConfigError, match="choose another --port, or 0 for any"),
    ):
        server.listen("127.0.0.1", taken.getsockname()[1])


def test_a_store_that_grows_is_seen_to(tmp_path, monkeypatch):
    url = str(tmp_path / "s")
    small_store.write_store(url)
    Ledger(url, "default", small_store.targets_manifest()).withdraw([1])
    stores = web_server.opened(url)
    monkeypatch.setattr("logit_store.inspect.web.stores._LOOK_AGAIN_SECONDS", 0.0)
    with web_server.serving(stores) as address:
        assert "2 of 3 shards" in ask(address, "/s/0/progress")[2]
        status, _, text = ask(address, "/s/0/sequence/2")
        assert status == 200
        assert "are not; run the job" in text
        assert 'id="t3"' in text
        assert ask(address, "/s/0/sequence/2/position/3")[0] == 404
        _write_again(url, 1)
        assert "Complete" in ask(address, "/s/0/progress")[2]
        assert ask(address, "/s/0/sequence/2/position/3")[0] == 200


def _write_again(url: str, index: int) -> None:
    tokens, segments = small_store.token_rows()
    spec = shard_spec(small_store.targets_manifest(), index)
    rows = slice(spec.first_row, spec.stop_row)
    part = small_store.part(small_store.target_rows(), spec)
    writer.TargetsWriter(url, "default").write(spec, tokens[rows], segments[rows], part)


def test_damage_is_told_where_it_is_met(tmp_path):
    url = str(tmp_path / "s")
    small_store.write_store(url)
    path = Path(url) / "targets/default/entry_bucket/c/1/0"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 255
    path.write_bytes(raw)
    with web_server.serving(web_server.opened(url)) as address:
        assert "1 damaged" not in ask(address, "/s/0/shards")[2]
        status, _, text = ask(address, "/s/0/sequence/2")
        assert status == 200
        assert "entry_bucket in shards [1]" in text
        # The text is whole, and so are the sequences around it.
        assert 'id="t3"' in text
        assert "entry_bucket" not in ask(address, "/s/0/sequence/0")[2]
        page = ask(address, "/s/0/shards")[2]
        assert "1 damaged" in page
        assert "1 read here without fault" in page
        assert "entry_bucket in shards [1]" in ask(address, "/s/0/shard/1")[2]
        assert ask(address, "/s/0/find?by=entropy")[0] == 200
        status, _, text = ask(address, "/s/0/figures")
        assert status == 500
        assert "retort verify" in text


def test_a_store_without_targets_and_tokenizer_is_read_by_numbers(tmp_path):
    url = str(tmp_path / "s")
    small_store.write_tokens(url)
    stores = web_server.opened(url)
    stores[0].pieces, stores[0].has_text = Pieces.numbers(small_store.VOCAB), False
    tokens, _ = small_store.token_rows()
    with web_server.serving(stores) as address:
        for path in ("/s/0", "/s/0/shards", "/s/0/search", "/s/0/find", "/s/0/compare"):
            assert ask(address, path)[0] == 200
        assert f"⟨{tokens[1, 0]}⟩" in ask(address, "/s/0/sequence/1")[2]
        assert "no tokens" not in ask(address, "/s/0/figures")[2]


def test_what_a_user_installs_has_the_pages(tmp_path):
    """A wheel holds the templates and static files, and nothing of them is fetched elsewhere."""
    root = Path(__file__).parents[1]
    # A build leaves folders beside its sources.
    copy = tmp_path / "copy"
    shutil.copytree(root / "logit_store", copy / "logit_store")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(copy)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = root / "logit_store/inspect/web"
    for kind in ("templates", "static"):
        for path in (folder / kind).iterdir():
            assert f"logit_store/inspect/web/{kind}/{path.name}" in names
            outside = re.findall(r"https?://(?!www\.w3\.org)", path.read_text())
            assert not outside, path
