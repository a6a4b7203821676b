"""The page in a real browser: no errors, no requests, hostile text stays text, search and keyboard work."""

from __future__ import annotations

import base64
import itertools
import json
import re
from pathlib import Path

import pytest

from stillhouse.console import visible
from stillhouse.report import write_report
from tests.report.browser import Page, browser, chromium
from tests.report.made_runs import HOSTILE, make_run

pytestmark = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")

SEARCH = """(() => {
  const box = document.getElementById("answer-search");
  box.value = %r;
  box.dispatchEvent(new Event("input"));
})()"""
COUNT = "document.getElementById('answer-count').textContent"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    for recipe in ("kd", "distillm2"):
        make_run(folder / "runs" / recipe, recipe, rows=2000, seeds=2, tasks=True)
    path = write_report([folder / "runs"], folder / "report.html")
    with browser(folder / "profile") as page:
        yield page, path


def search(page: Page, words: str, shown: str) -> None:
    page.do(SEARCH % words)
    page.until(f"{COUNT}.startsWith({shown!r})")


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1440, True), (390, False), (390, True)])
def test_it_opens_cleanly_and_fits(opened: tuple[Page, Path], width, dark):
    page, path = opened
    page.open(path, width=width, dark=dark)
    assert page.troubles == []
    assert page.do("document.documentElement.scrollWidth") == width
    assert page.do("document.querySelectorAll('.answer').length") == 10
    plots = "[...document.querySelectorAll('svg.plot')]"
    assert page.do(f"{plots}.length") >= 6
    assert page.do(f"{plots}.every(plot => plot.getBoundingClientRect().height > 100)")
    assert page.do(f"{plots}.every(plot => plot.querySelector('path, polyline, use'))")
    light = page.do("getComputedStyle(document.body).backgroundColor").startswith("rgb(250")
    assert light != dark


def test_hostile_text_stays_text(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    search(page, "window.hacked", "1 of 2006 prompts")
    assert page.do("typeof window.hacked") == "undefined"
    assert page.do("document.querySelectorAll('.answer img, .answer script, .answer b').length") == 0
    assert page.do("document.querySelector('.said .text').textContent.slice(0, 40)") == visible(HOSTILE)[:40]
    assert page.troubles == []


def test_search_order_and_filters(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    search(page, "no such words", "Nothing found")
    search(page, "ZIZZI", "238 of 2006 prompts, 10 shown")
    assert page.do("document.querySelectorAll('#answer-list mark').length") >= 10
    page.do("document.getElementById('answer-more').click()")
    assert page.do(COUNT) == "238 of 2006 prompts, 20 shown"
    page.do("document.querySelectorAll('#answer-systems input')[0].click()")
    assert page.do("document.querySelectorAll('.answer:first-child .said > div').length") == 3
    page.do("document.getElementById('answer-order').value = 'low'")
    page.do("document.getElementById('answer-order').dispatchEvent(new Event('change'))")
    scores = page.do(
        """[...document.querySelectorAll('.answer')].map(card => [...card.querySelectorAll('.who')]
        .filter(who => who.textContent.includes('after'))
        .map(who => Number(/of 2: ROUGE-L ([\\d.]+)/.exec(who.textContent)[1])).reduce((a, b) => a + b, 0))"""
    )
    assert all(before <= after + 0.11 for before, after in itertools.pairwise(scores))
    assert page.troubles == []


def press(page: Page, key: str, **more: object) -> None:
    text = {"text": key} if len(key) == 1 else {}
    page.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
    page.call("Input.dispatchKeyEvent", type="keyUp", key=key, **more)


FOCUS = "document.activeElement"
TAB = {"code": "Tab", "windowsVirtualKeyCode": 9}
ESCAPE = {"code": "Escape", "windowsVirtualKeyCode": 27}


def test_the_keyboard_is_enough(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    press(page, "Tab", **TAB)
    assert page.do(f"{FOCUS}.className") == "skip"
    press(page, "/")
    assert page.do(f"{FOCUS}.id") == "answer-search"
    assert page.do(f"{FOCUS}.value") == ""
    press(page, "j")
    assert page.do(f"{FOCUS}.value") == "j"
    press(page, "Escape", **ESCAPE)
    assert page.do("document.getElementById('answer-search').value") == ""
    at = "[...document.querySelectorAll('.answer')].indexOf(document.activeElement)"
    assert page.do(at) == 0
    for _ in range(10):
        press(page, "j")
    assert page.do(at) == 10
    assert page.do("document.querySelectorAll('.answer').length") == 20
    press(page, "k")
    assert page.do(at) == 9
    press(page, "m")
    assert page.do("document.querySelectorAll('.answer').length") == 30
    press(page, "?")
    assert page.do("document.getElementById('keys').open")
    press(page, "j")
    press(page, "Escape", **ESCAPE)
    assert not page.do("document.getElementById('keys').open")
    press(page, "t")
    assert page.do("window.scrollY") == 0
    assert page.troubles == []


HEAD = "document.querySelectorAll('.answer')[%d].querySelector('.steps span').textContent"
SAID = "document.querySelectorAll('.answer')[%d].querySelector('.said').innerText"


def test_the_answers_of_all_seeds_are_stepped_through(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    press(page, "/")
    press(page, "Escape", **ESCAPE)  # the first prompt has the focus
    assert page.do(HEAD % 0) == "seed 1 (1 of 2)"
    first, other = page.do(SAID % 0), page.do(SAID % 1)
    assert "mean of 2: ROUGE-L" in first  # the mean
    press(page, "l")
    assert page.do(HEAD % 0) == "seed 2 (2 of 2)"
    assert page.do(SAID % 0) != first
    assert (page.do(HEAD % 1), page.do(SAID % 1)) == ("seed 1 (1 of 2)", other)
    press(page, "l")
    assert (page.do(HEAD % 0), page.do(SAID % 0)) == ("seed 1 (1 of 2)", first)
    press(page, "j")
    press(page, "h")
    assert page.do(HEAD % 1) == "seed 2 (2 of 2)"
    buttons = "document.querySelectorAll('.answer')[1].querySelectorAll('.steps button')"
    page.do(f"{buttons}[0].click()")
    assert page.do(HEAD % 1) == "seed 1 (1 of 2)"
    assert page.troubles == []


def test_a_search_shows_the_answer_that_it_found(tmp_path: Path, opened: tuple[Page, Path]):
    page, _ = opened
    folder = make_run(tmp_path / "run", rows=6, seeds=3)
    path = folder / "evaluation/student_after.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2 * 6 + 4]["response"] = "Only the third seed speaks of zebras."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.open(write_report([folder], tmp_path / "report.html"))
    search(page, "zebra", "1 of 6 prompts")
    assert page.do(HEAD % 0) == "seed 3 (3 of 3)"
    assert page.do("document.querySelector('.said mark').textContent") == "zebra"
    assert page.troubles == []


def test_tab_visits_everything_in_the_order_of_the_page(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    visited = []
    for _ in range(40):
        press(page, "Tab", **TAB)
        top = page.do(f"{FOCUS}.getBoundingClientRect().top + window.scrollY")
        visited.append((page.do(f"{FOCUS}.matches('nav *, .skip')"), top))
    tops = [top for fixed, top in visited if not fixed]
    assert len(tops) > 20
    assert all(later >= earlier - 60 for earlier, later in itertools.pairwise(tops))
    unnamed = page.do(
        """[...document.querySelectorAll('input, select, button, [role=region]')].filter(one => !(
        one.textContent.trim() || one.getAttribute('aria-label') || one.closest('label'))).length"""
    )
    assert unnamed == 0


def test_only_what_is_looked_at_is_built(opened: tuple[Page, Path]):
    """2,000 prompts are text in the page, not elements; what a reader asks for is built then."""
    page, path = opened
    page.open(path)
    before = page.do("document.querySelectorAll('*').length")
    assert before < 6000
    assert page.do("JSON.parse(document.getElementById('answer-data').textContent).rows.length") == 2006
    press(page, "m")
    assert page.do("document.querySelectorAll('*').length") - before < 600


def test_hostile_names_stay_names(opened: tuple[Page, Path], tmp_path: Path):
    page, _ = opened
    folder = make_run(tmp_path / "run", rows=4, tasks=True)
    for name in ("state", "data", "models", "environment", "provenance"):
        text = (folder / f"{name}.json").read_text()
        mark = json.dumps(HOSTILE)[1:-1]
        (folder / f"{name}.json").write_text(
            re.sub(r'"(kd|train|demo/teacher|teacher|3\.11\.9)"', f'"{mark}"'.replace("\\", "\\\\"), text)
        )
    for path in (folder / "evaluation").glob("*.json"):
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "label": HOSTILE, "task": HOSTILE + found["task"]}))
    page.open(write_report([folder], tmp_path / "report.html", HOSTILE))
    assert page.do("typeof window.hacked") == "undefined"
    assert (
        page.do("document.querySelectorAll('main img, main script, main a[href^=javascript], h1 *').length")
        == 0
    )
    assert page.do("document.querySelector('h1').textContent") == visible(HOSTILE)
    assert page.do("document.querySelector('.run bdi').textContent") == visible(HOSTILE)
    assert page.do("document.querySelectorAll('script').length") == 2
    assert page.troubles == []


@pytest.mark.parametrize("width", [390, 1440])
def test_it_prints(opened: tuple[Page, Path], width):
    page, path = opened
    page.open(path, width=width, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print", features=[])
    shown = (
        "[...document.querySelectorAll('nav, .controls, .more, dialog, .skip')].some(one => one.offsetParent)"
    )
    assert not page.do(shown)
    assert page.do("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = base64.b64decode(page.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 30_000


def test_defaults_are_hidden_until_asked_for(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    page.do("document.querySelectorAll('#config details').forEach(details => { details.open = true; })")
    shown = "[...document.querySelectorAll('tr.default')].filter(row => row.offsetParent).length"
    assert page.do(shown) == 0
    page.do("document.getElementById('config-defaults').click()")
    assert page.do(shown) == 4
