"""The page in a real browser, as a visitor uses it: headless Chromium on a page that this process serves.

Screenshots go to pytest's temporary folder, or to the folder that VLMEFF_SCREENSHOTS names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs the extra demo")
playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

from vlmeff.demo.engine import Choice, Done, Engine, user_turn  # noqa: E402
from vlmeff.demo.serving import serve_demo  # noqa: E402
from vlmeff.demo.sweep import BUDGETS  # noqa: E402

expect = playwright_api.expect
pytestmark = pytest.mark.slow

PICTURE = Path(__file__).resolve().parents[2] / "demos" / "pictures" / "four-shapes.png"
QUESTION = "describe the picture."
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE_MS = 60_000  # other tests share the cores
WIDTHS = (390, 768, 1280)
TABS = {"Compare", "Chat", "Sweep", "Video", "Generate", "About"}
YELLOW = (255, 255, 0)  # the circle of the picture; no part of the page is as yellow


# -- the page, the browser and what the answers must be


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        log = tmp_path_factory.mktemp("log")
        demo = serve_demo(port=0, block=False, say=lambda line: None, log_dir=log)
        yield demo.local_url
        demo.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        programs = [*filter(None, map(shutil.which, BROWSERS)), *([own] if os.path.exists(own) else [])]
        program = next(filter(runs, programs), None)
        if program is None:
            pytest.skip("no Chromium that runs (Debian: apt-get install chromium)")
        # The sandbox needs rights that containers rarely have; the only page opened is ours.
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


def runs(program: str) -> bool:
    """A program of that name may be a stub that only says how to install it."""
    return subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode == 0


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page for a new visitor; at the end no console may have shown an error."""
    errors: list[str] = []
    contexts = []

    def opened(width: int = 1280, theme: str = "light", language: str = "en") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, locale=language))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}?__theme={theme}")
        expect(page.locator("#compare-run")).to_be_visible(timeout=PATIENCE_MS)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="module")
def said() -> Callable[..., str]:
    """What an engine of our own answers about the picture, away from the page."""
    engine = Engine("tiny-llava")

    def answer(choice: Choice, *, question: str = QUESTION, longest: int = 64) -> str:
        turn = user_turn(question, [Image.open(PICTURE).convert("RGB")])
        *_, done = engine.answer([turn], choice, max_new_tokens=longest)
        assert isinstance(done, Done)
        return done.text

    return answer


# -- what a visitor does


def show_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def upload(page: Any, tab: str, question: str = QUESTION) -> None:
    page.set_input_files(f"#{tab}-picture input[type=file]", PICTURE)
    expect(page.locator(f"#{tab}-picture img")).to_be_visible(timeout=PATIENCE_MS)
    page.fill(f"#{tab}-question textarea", question)


def choose(page: Any, dropdown: str, value: str) -> None:
    page.click(f"{dropdown} input")
    page.get_by_role("option", name=value, exact=True).click()


def cell(page: Any, table: str, row: str, column: int) -> Any:
    """The ``column``-th figure of the row with that heading."""
    heading = page.get_by_role("rowheader", name=row, exact=True)
    return page.locator(f"{table} tr", has=heading).locator("td").nth(column)


def compare(page: Any, kept: int) -> None:
    """Run both, until the figures of both are there; ``kept``: visual tokens that the preset leaves."""
    page.click("#compare-run")
    expect(cell(page, "#compare-figures", "visual tokens", 1)).to_have_text(str(kept), timeout=PATIENCE_MS)
    expect(cell(page, "#compare-figures", "same answer", 1)).to_have_text(re.compile("yes|no"), timeout=PATIENCE_MS)


def test_a_visitor_uploads_asks_moves_the_handle_and_changes_the_preset(
    visit: Callable[..., Any], said: Callable[..., str]
) -> None:
    page = visit()
    upload(page, "compare")
    compare(page, kept=108)
    baseline, preset = page.locator("#compare-baseline textarea"), page.locator("#compare-answer textarea")
    expect(baseline).to_have_value(said(Choice()))
    expect(preset).to_have_value(said(Choice(preset="fast")))
    expect(cell(page, "#compare-figures", "visual tokens", 0)).to_have_text("324")
    expect(page.locator("#compare-legend")).to_contain_text("108 of 324")

    picture, overlay = page.locator("#compare-map img").all()
    expect(picture).to_be_visible()
    handle = page.locator("#compare-map [data-testid=slider] .inner")
    assert shown_from(overlay) == pytest.approx(50, abs=1), "at first the handle is in the middle"
    handle.scroll_into_view_if_needed()
    box, grip = picture.bounding_box(), handle.bounding_box()
    x, y = grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 100, y, steps=5)
    page.mouse.up()
    assert shown_from(overlay) == pytest.approx(100 * (x - 100 - box["x"]) / box["width"], abs=1)
    assert handle.bounding_box()["x"] == pytest.approx(grip["x"] - 100, abs=5)

    page.click("#compare-save")
    expect(page.locator("#compare-saved")).to_contain_text("Saved as", timeout=PATIENCE_MS)
    page.click("#compare-save")
    expect(page.locator("#compare-saved")).to_contain_text("no finished comparison", timeout=PATIENCE_MS)

    choose(page, "#compare-preset", "smallest")
    compare(page, kept=36)
    expect(baseline).to_have_value(said(Choice()))
    expect(preset).to_have_value(said(Choice(preset="smallest")))
    expect(cell(page, "#compare-figures", "same answer", 1)).to_have_text("no")
    expect(page.locator("#compare-legend")).to_contain_text("36 of 324")


def shown_from(overlay: Any) -> float:
    """Where the overlay begins, in percent of its width: its left part is clipped off at the handle."""
    insets = re.findall(r"[\d.]+", overlay.evaluate("image => getComputedStyle(image).clipPath"))
    return float(insets[-1])


def test_an_example_is_one_click(visit: Callable[..., Any]) -> None:
    page = visit()
    page.get_by_text("how many purple shapes are there?").first.click()
    expect(page.locator("#compare-question textarea")).to_have_value("how many purple shapes are there?")
    picture = page.locator("#compare-picture img")
    expect(picture).to_be_visible(timeout=PATIENCE_MS)
    page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())


def test_a_sweep_runs_to_its_end(visit: Callable[..., Any], said: Callable[..., str]) -> None:
    page = visit()
    show_tab(page, "Sweep")
    upload(page, "sweep", "how many shapes are there?")
    page.fill("#sweep-known input, #sweep-known textarea", "four")
    page.click("#sweep-run")
    rows = page.locator("#sweep-table tbody tr")
    expect(rows).to_have_count(len(BUDGETS), timeout=PATIENCE_MS)
    cells = [row.locator("th, td").all_inner_texts() for row in rows.all()]
    assert [row[0] for row in cells] == ["100%", "75%", "50%", "35%", "25%", "15%", "10%", "5%"]
    assert [int(row[1]) for row in cells] == [324, 243, 162, 113, 81, 49, 32, 16]
    for budget, row in zip(BUDGETS, cells, strict=True):
        choice = Choice() if budget == 1 else Choice(tokens="hiprune", keep=budget)
        answer = said(choice, question="how many shapes are there?", longest=32)
        assert row[2] == answer
        assert row[3] == ("yes" if answer == "four" else "no")
    expect(page.locator("#sweep-plot canvas, #sweep-plot svg").first).to_be_visible(timeout=PATIENCE_MS)


def test_the_stop_button_ends_a_sweep(visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The third run is held back until the button's flag is up, so the sweep cannot end by itself."""
    real, begun, released = Engine.answer, [], threading.Event()

    def held(self: Engine, turns: Any, choice: Choice, **options: Any) -> Iterator[Any]:
        begun.append(choice)
        stop = options["stop"]
        while len(begun) == 3 and not stop.asked and not released.wait(0.02):
            pass
        yield from real(self, turns, choice, **options)

    monkeypatch.setattr(Engine, "answer", held)
    page = visit()
    show_tab(page, "Sweep")
    upload(page, "sweep")
    page.click("#sweep-run")
    rows = page.locator("#sweep-table tbody tr")
    try:
        expect(rows).to_have_count(2, timeout=PATIENCE_MS)
        page.click("#sweep-stop")
        expect(page.locator("#sweep-status")).to_contain_text("stopped", timeout=PATIENCE_MS)
    finally:
        released.set()
    # The queue runs one model event at a time: a comparison that ends shows that the sweep has.
    show_tab(page, "Compare")
    upload(page, "compare", "how many shapes are there?")
    compare(page, kept=108)
    assert len(begun) == 5  # three of the sweep, two of the comparison
    show_tab(page, "Sweep")
    expect(rows).to_have_count(2)
    expect(page.locator("#sweep-status")).to_contain_text("stopped")


def test_a_turn_of_chat(visit: Callable[..., Any], said: Callable[..., str]) -> None:
    page = visit()
    show_tab(page, "Chat")
    choose(page, "#chat-preset", "quality")
    page.set_input_files("#chat-box input[type=file]", PICTURE)
    expect(page.locator("#chat-box img")).to_be_visible(timeout=PATIENCE_MS)
    page.fill("#chat-box textarea", QUESTION)
    page.press("#chat-box textarea", "Enter")
    answer = page.locator("#chat-log [data-testid=bot]").last
    expect(answer).to_contain_text(said(Choice(preset="quality")), timeout=PATIENCE_MS)
    expect(page.locator("#chat-log [data-testid=user]").last).to_contain_text(QUESTION)
    expect(page.locator("#chat-box textarea")).to_be_editable(timeout=PATIENCE_MS)


def test_a_picture_in_a_conversation_has_a_text_and_no_button_that_sends_it_away(visit: Callable[..., Any]) -> None:
    page = visit(language="de")
    show_tab(page, "Chat")
    page.set_input_files("#chat-box input[type=file]", PICTURE)
    expect(page.locator("#chat-box img")).to_be_visible(timeout=PATIENCE_MS)
    page.fill("#chat-box textarea", QUESTION)
    page.press("#chat-box textarea", "Enter")
    sent = page.locator("#chat-log [data-testid=user] img")
    expect(sent).to_have_attribute("alt", "Picture that was sent", timeout=PATIENCE_MS)
    expect(page.locator("#chat-box textarea")).to_be_editable(timeout=PATIENCE_MS)
    assert unnamed(page) == []
    buttons = page.locator("#chat-log").get_by_role("button").all()
    named = [button.get_attribute("aria-label") for button in buttons if button.is_visible()]
    assert sorted(filter(None, named)) == ["Chat leeren", "Fullscreen", "Herunterladen"]


# -- how it looks

CONTROLS = {"textbox", "combobox", "spinbutton", "slider", "button", "checkbox", "radio", "tab", "link"}


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("VLMEFF_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_every_tab_fits_every_width_and_names_what_it_shows(visit: Callable[..., Any], shots: Path) -> None:
    page = visit()
    show_tab(page, "Sweep")
    upload(page, "sweep")
    page.click("#sweep-run")
    expect(page.locator("#sweep-table tbody tr")).to_have_count(len(BUDGETS), timeout=PATIENCE_MS)
    show_tab(page, "Compare")
    upload(page, "compare")
    compare(page, kept=108)
    expect(page.locator("#compare-map img").first).to_be_visible()
    tabs = page.get_by_role("tablist").first.get_by_role("tab").all_inner_texts()  # at 1280 px all have room
    assert set(tabs) == TABS
    faults: list[str] = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for tab in tabs:
            open_at_any_width(page, tab)
            # Two frames, so that what Gradio measures by ResizeObserver has been laid out again.
            page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            over = page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
            if over > 0:
                faults.append(f"{tab} is {over} px wider than {width} px")
            found = [*unnamed(page), *broken_words(page), *(cut_off(page) if tab == "Compare" else [])]
            faults += [f"{tab} at {width} px: {fault}" for fault in found]
            shot = shots / f"{tab.lower()}-{width}.png"
            page.screenshot(path=shot, full_page=True)
            check_picture(shot, yellow=tab == "Compare")
    assert not faults, "\n".join(faults)


def test_the_dark_page_is_dark(visit: Callable[..., Any], shots: Path) -> None:
    page = visit(theme="dark")
    shot = shots / "compare-1280-dark.png"
    page.screenshot(path=shot, full_page=True)
    grey = Image.open(shot).convert("L")
    histogram = grey.histogram()
    assert sum(histogram[:96]) > 0.8 * grey.width * grey.height
    assert sum(histogram[192:]) > 1000, "nothing is written on it"


def open_at_any_width(page: Any, tab: str) -> None:
    """On a narrow page the tabs that have no room are in a menu; the tab list holds those that have."""
    button = page.get_by_role("tablist").first.get_by_role("tab", name=tab, exact=True)
    if not button.count():
        page.get_by_role("button", name="More tabs").first.click()
        button = page.get_by_role("button", name=tab, exact=True)
    button.click()


def unnamed(page: Any) -> list[str]:
    """Controls without an accessible name, as Chromium's accessibility tree has them, and pictures without a text."""
    devtools = page.context.new_cdp_session(page)
    nodes = devtools.send("Accessibility.getFullAXTree")["nodes"]
    devtools.detach()
    roles = [node["role"]["value"] for node in nodes if not node["ignored"] and not names(node)]
    pictures = page.evaluate(
        "() => [...document.images].filter(i => i.checkVisibility() && !i.alt.trim())"
        ".map(i => i.closest('[id]')?.id + ' ' + i.src.split('/').pop())"
    )
    return [f"a {role} without a name" for role in roles if role in CONTROLS] + [f"no text for {p}" for p in pictures]


def broken_words(page: Any) -> list[str]:
    """Cells of tables that are too narrow for a word; only long ones (a hash, a call) may be broken anywhere."""
    texts = page.evaluate("""() => [...document.querySelectorAll('th, td')].filter(cell => {
        if (!cell.checkVisibility() || cell.children.length) return false;
        const style = getComputedStyle(cell), pen = document.createElement('canvas').getContext('2d');
        pen.font = style.font;
        const room = cell.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
        const words = cell.innerText.split(/[\\s/-]+/).filter(word => word.length <= 14);
        return words.some(word => pen.measureText(word).width > room + 1);
    }).map(cell => cell.innerText)""")
    return [f"no room for {text!r}" for text in texts]


def cut_off(page: Any) -> list[str]:
    """The map must be seen to its lower end."""
    frame, picture = (page.locator(f"#compare-map{part}").first.bounding_box() for part in ("", " img"))
    over = picture["y"] + picture["height"] - frame["y"] - frame["height"]
    return [f"the map loses {over:.0f} px at its lower end"] if over > 1 else []


def names(node: dict[str, Any]) -> bool:
    return bool(node.get("name", {}).get("value", "").strip())


def check_picture(path: Path, *, yellow: bool) -> None:
    """A screenshot shows something: it has many colours, and the picture where it must."""
    shot = Image.open(path).convert("RGB")
    assert shot.height >= 500
    colors = {color: count for count, color in shot.getcolors(maxcolors=1 << 24)}
    assert len(colors) > 100
    assert max(colors.values()) < 0.98 * shot.width * shot.height
    assert (colors.get(YELLOW, 0) > 200) or not yellow
