"""The inspector as a person meets it: headless Chromium opens, points, searches, follows links.

Debian's Chromium is driven by Playwright, which downloads none. Without one these tests are skipped
or, where RETORT_REQUIRE_BROWSER is 1 as in `.ci/run`, fail.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_store
import web_server
from playwright.sync_api import Browser, Page, expect, sync_playwright

from logit_store import writer
from logit_store.ledger import Ledger, shard_spec

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


_PATH = next((found for name in _NAMES if (found := shutil.which(name))), None)
_MISSING = "there is no Chromium; install Debian's package chromium"

# Where it is required, as in `.ci/run`, what is missing fails every test.
pytestmark = pytest.mark.skipif(
    _PATH is None and os.environ.get("RETORT_REQUIRE_BROWSER") != "1", reason=_MISSING
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert _PATH is not None, _MISSING
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=_PATH, args=list(_ARGUMENTS))
        yield found
        found.close()


class Visit:
    """A page, and all that must not happen on it."""

    def __init__(self, page: Page):
        self.page = page
        self.dialogs: list[str] = []
        self.messages: list[str] = []
        self.strangers: list[str] = []
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))

        def note(request) -> None:
            if not request.url.startswith("http://127.0.0.1:"):
                self.strangers.append(request.url)

        page.on("request", note)

    def check(self) -> None:
        """No script of the corpus ran, nothing was refused by the policy or asked of others."""
        assert self.dialogs == []
        assert [m for m in self.messages if "404" not in m] == []
        assert self.strangers == []


@pytest.fixture
def visit(browser) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(20_000)
    found = Visit(context.new_page())
    yield found
    context.close()
    found.check()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Two stores over the same tokens, full of what an attacker would write."""
    folder = tmp_path_factory.mktemp("stores")
    urls = [str(folder / name) for name in ("one", "two")]
    for url in urls:
        small_store.write_store(url)
    with web_server.serving(web_server.opened(*urls)) as found:
        yield found


def test_an_overview_opens_with_its_plots(visit, address):
    page = visit.page
    page.goto(f"{address}/")
    page.get_by_role("link", name="store 0").click()
    expect(page.get_by_role("heading", name="store 0")).to_be_visible()
    expect(page.locator(".plots figure")).to_have_count(4)
    expect(page.locator("svg.map a")).to_have_count(3)
    expect(page.locator("#progress")).to_contain_text("Complete")
    # The map changes its colours in place.
    page.locator("#shards").get_by_role("link", name="teacher entropy").click()
    expect(page.locator("#shards .legend")).to_contain_text("greatest: shard")
    assert page.url == f"{address}/s/0"
    page.locator("svg.map a").nth(1).click()
    expect(page.get_by_role("heading", name="Shard 1")).to_be_visible()


def test_pointing_at_a_token_shows_the_candidates(visit, address):
    page = visit.page
    page.goto(f"{address}/s/0/sequence/1")
    rows, block_points = small_store.row_entries()
    mine = rows[1].position == 3
    points = sorted(rows[1].points[mine].tolist(), reverse=True)
    page.locator("#t3").hover()
    expect(page.locator(".candidates li")).to_have_count(int(mine.sum()))
    weights = page.locator(".candidates .weight").all_inner_texts()
    assert weights == [f"{point / block_points[1, 0]:.3f}" for point in points]
    bars = page.locator(".candidates .fill")
    assert float(bars.first.get_attribute("width")) == 100 * points[0] / block_points[1, 0]
    # Another token, another answer; the one that was pointed at is marked.
    page.locator("#t5").hover()
    expect(page.locator("#t5")).to_have_class(re.compile(r"\bopen\b"))
    expect(page.locator(".answer .line").first).to_contain_text("5")
    # Not after the end of a document.
    page.locator("#t9").hover()
    expect(page.locator(".panel")).to_contain_text("No target here")


def test_the_colour_of_the_tokens_can_be_chosen(visit, address):
    page = visit.page
    page.goto(f"{address}/s/0/sequence/1")

    def colours() -> list[str]:
        return page.eval_on_selector_all(
            ".text .t", "tokens => tokens.map(t => getComputedStyle(t).backgroundColor)"
        )

    before = colours()
    assert len(set(before)) > 3
    page.get_by_role("radio", name="surprise").click()
    after = colours()
    assert before != after
    assert len(set(after)) > 3
    # It is kept from one sequence to the next.
    page.keyboard.press("]")
    expect(page.get_by_role("heading", name="Sequence 2")).to_be_visible()
    expect(page.get_by_role("radio", name="surprise")).to_have_attribute("aria-checked", "true")


def test_the_keyboard_is_enough(visit, address):
    page = visit.page
    page.goto(f"{address}/s/0/sequence/1")
    page.locator(".text").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#t2")).to_have_attribute("aria-selected", "true")
    assert page.url.endswith("#t2")
    expect(page.locator(".candidates li").first).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#t1")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Escape")
    expect(page.locator(".candidates")).to_have_count(0)
    page.keyboard.press("[")
    expect(page.get_by_role("heading", name="Sequence 0")).to_be_visible()
    page.keyboard.press("]")
    expect(page.get_by_role("heading", name="Sequence 1")).to_be_visible()


@pytest.mark.parametrize("link", ["#t12", "?position=12"])
def test_a_link_leads_to_a_token(visit, address, link):
    page = visit.page
    page.set_viewport_size({"width": 400, "height": 240})
    page.goto(f"{address}/s/0/sequence/1{link}")
    expect(page.locator("#t12")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#t12")).to_be_in_viewport()
    expect(page.locator(".answer .line").first).to_contain_text("12")


def test_on_a_phone_a_tap_opens_the_candidates_and_they_can_be_closed(browser, address):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    found = Visit(context.new_page())
    page = found.page
    page.goto(f"{address}/s/0/sequence/1")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#t3").tap()
    expect(page.locator(".candidates li").first).to_be_in_viewport()
    page.get_by_role("button", name="close").tap()
    expect(page.locator(".candidates")).to_have_count(0)
    page.goto(f"{address}/s/0")
    expect(page.locator(".plots figure")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found.check()
    context.close()


def test_text_is_searched_and_a_match_is_followed(visit, address, monkeypatch):
    # However slow the machine, one answer is of the whole store.
    monkeypatch.setattr("logit_store.inspect.web.pages._SEARCH_SECONDS", 60)
    page = visit.page
    tokens, _ = small_store.token_rows()
    word = next(int(t) for t in tokens[3] if t % 9 > 5)
    page.goto(f"{address}/s/0/search")
    page.get_by_role("searchbox", name="text to search for").fill(f" word{word}")
    page.keyboard.press("Enter")
    expect(page.locator("mark").first).to_have_text(f"␣word{word}")
    expect(page.locator("#results")).to_contain_text("That is the end of the store.")
    place = page.locator(".matches .place").first.inner_text()
    sequence, position = map(int, place.split(":"))
    assert tokens[sequence, position] == word or str(tokens[sequence, position]).startswith(
        str(word)
    )
    page.locator(".matches a").first.click()
    expect(page.locator(f"#t{position}")).to_have_attribute("aria-selected", "true")


def test_what_stands_out_leads_to_its_token(visit, address):
    page = visit.page
    further = page.get_by_role("link", name="Look further")

    def means() -> list[float]:
        while further.count():
            further.click()
        return [float(cell) for cell in page.locator("td:nth-child(2)").all_inner_texts()]

    page.goto(f"{address}/s/0/find")
    assert len(means()) == small_store.ROWS
    assert means() == sorted(means(), reverse=True)
    page.get_by_role("link", name="worst captured mass").click()
    assert means() == sorted(means())
    page.locator("td.wide a").first.click()
    expect(page.locator(".text .open")).to_have_count(1)


def test_scripts_of_a_corpus_are_text(visit, address):
    """Of every sequence's tokens each hostile one is opened, and searched for."""
    page = visit.page
    tokens, _ = small_store.token_rows()
    opened = 0
    for row in range(small_store.ROWS):
        page.goto(f"{address}/s/0/sequence/{row}")
        for position in (tokens[row, :-4] % 9 == 0).nonzero()[0].tolist():
            token = page.locator(f"#t{position}")
            expect(token).to_have_text(web_server.SCRIPT)
            token.click()
            expect(page.locator(".answer .token").first).to_have_text(
                web_server.SCRIPT.replace(" ", "␣")
            )
            opened += 1
    assert opened >= 5
    page.goto(f"{address}/s/0/search")
    page.get_by_role("searchbox").fill(web_server.SCRIPT)
    page.keyboard.press("Enter")
    expect(page.locator("mark").first).to_have_text(web_server.SCRIPT)
    assert page.get_by_role("searchbox").input_value() == web_server.SCRIPT
    assert page.locator("main script, main img").count() == 0


def test_a_damaged_shard_is_told_and_the_rest_can_be_read(visit, tmp_path):
    page = visit.page
    url = str(tmp_path / "s")
    small_store.write_store(url)
    path = Path(url) / "targets/default/entry_bucket/c/1/0"
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with web_server.serving(web_server.opened(url)) as address:
        page.goto(f"{address}/s/0/sequence/2")
        expect(page.get_by_role("alert")).to_contain_text("entry_bucket in shards [1]")
        expect(page.locator("#t3")).to_be_visible()
        page.keyboard.press("[")
        expect(page.get_by_role("heading", name="Sequence 1")).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)
        page.goto(f"{address}/s/0")
        expect(page.locator("#shards .legend")).to_contain_text("1 damaged")
        expect(page.locator("svg.map .h-damaged")).to_have_count(1)
    visit.messages.clear()  # the distributions of a damaged store are an error, which is logged


def test_a_store_that_is_being_written_moves_on_by_itself(visit, tmp_path):
    page = visit.page
    url = str(tmp_path / "s")
    small_store.write_store(url)
    manifest = small_store.targets_manifest()
    ledger = Ledger(url, "default", manifest)
    ledger.withdraw([1, 2])
    with web_server.serving(web_server.opened(url)) as address:
        page.goto(f"{address}/s/0")
        expect(page.locator("#progress")).to_contain_text("1 of 3 shards")
        expect(page.locator("svg.map .h-missing")).to_have_count(2)
        tokens, segments = small_store.token_rows()
        for index in (1, 2):
            spec = shard_spec(manifest, index)
            rows = slice(spec.first_row, spec.stop_row)
            part = small_store.part(small_store.target_rows(), spec)
            writer.TargetsWriter(url, "default").write(spec, tokens[rows], segments[rows], part)
        expect(page.locator("#progress")).to_contain_text("Complete", timeout=10_000)
        expect(page.locator("svg.map .h-missing")).to_have_count(0)
        page.goto(f"{address}/s/0/sequence/4")
        expect(page.get_by_role("alert")).to_have_count(0)


def test_two_stores_are_compared_on_the_same_text(visit, address):
    page = visit.page
    page.goto(f"{address}/s/0/compare?sequence=1")
    expect(page.locator(".tiles")).to_contain_text("same heaviest id")
    page.locator("#t3").click()
    expect(page.locator(".candidates.two li").first).to_be_visible()
    expect(page.locator(".panel")).to_contain_text("KL 0.000")
    page.keyboard.press("]")
    expect(page.get_by_role("heading")).to_contain_text("sequence 2")


def test_a_token_lets_a_browser_in_and_leaves_the_address(visit, tmp_path):
    page = visit.page
    url = str(tmp_path / "s")
    small_store.write_store(url)
    with web_server.serving(web_server.opened(url), "secret-of-a-test") as address:
        assert page.goto(f"{address}/s/0").status == 401
        assert page.goto(f"{address}/s/0/sequence/1?token=secret-of-a-test").status == 200
        assert page.url == f"{address}/s/0/sequence/1"
        page.locator("#t3").hover()
        expect(page.locator(".candidates li").first).to_be_visible()
    visit.messages.clear()  # the refusal is logged


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_can_be_read_on_every_colour(browser, address, scheme):
    """Text keeps a contrast of 4.5 to 1 (WCAG AA) on all steps of all scales."""
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{address}/s/0/sequence/1")
    found = page.evaluate(_CONTRAST)
    context.close()
    assert len(found) == 45
    assert min(found.values()) >= 4.5, sorted(found.items(), key=lambda item: item[1])[:5]


_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => {
      const c = v / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const reader = document.querySelector(".reader");
  const text = document.querySelector(".text");
  const found = {};
  const kinds = { entropy: "e", surprise: "s", difference: "d", left: "l", right: "r" };
  for (const [kind, letter] of Object.entries(kinds)) {
    reader.dataset.colour = kind;
    for (let step = 0; step < 9; step++) {
      const token = document.createElement("span");
      token.className = "t " + letter + step;
      text.append(token);
      const style = getComputedStyle(token);
      const sides = [light(style.color), light(style.backgroundColor)].sort((a, b) => b - a);
      found[letter + step] = (sides[0] + 0.05) / (sides[1] + 0.05);
      token.remove();
    }
  }
  return found;
}"""
