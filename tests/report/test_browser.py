"""The page in a real browser: no errors, no requests, hostile text stays text, search and keyboard work."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

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
        make_run(folder / "runs" / recipe, recipe, rows=2000)
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
    assert page.do("document.querySelectorAll('.answer').length") == 20
    plots = "[...document.querySelectorAll('svg.plot')]"
    assert page.do(f"{plots}.length") >= 6
    assert page.do(f"{plots}.every(plot => plot.getBoundingClientRect().height > 100)")
    light = page.do("getComputedStyle(document.body).backgroundColor").startswith("rgb(250")
    assert light != dark


def test_hostile_text_stays_text(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    search(page, "window.hacked", "1 of 2000 prompts")
    assert page.do("typeof window.hacked") == "undefined"
    assert page.do("document.querySelectorAll('.answer img, .answer script, .answer b').length") == 0
    assert page.do("document.querySelector('.said .text').textContent.slice(0, 40)") == HOSTILE[:40]
    assert page.troubles == []


def test_search_order_and_filters(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    search(page, "no such words", "Nothing found")
    search(page, "ZIZZI", "238 of 2000 prompts, 20 shown")
    assert page.do("document.querySelectorAll('#answer-list mark').length") >= 20
    page.do("document.getElementById('answer-more').click()")
    assert page.do(COUNT) == "238 of 2000 prompts, 40 shown"
    page.do("document.querySelectorAll('#answer-systems input')[0].click()")
    assert page.do("document.querySelectorAll('.answer:first-child .said > div').length") == 3
    page.do("document.getElementById('answer-order').value = 'low'")
    page.do("document.getElementById('answer-order').dispatchEvent(new Event('change'))")
    scores = page.do(
        """[...document.querySelectorAll('.answer')].map(card => [...card.querySelectorAll('.who')]
        .filter(who => who.textContent.includes('after'))
        .map(who => Number(/ROUGE-L ([\\d.]+)/.exec(who.textContent)[1])).reduce((a, b) => a + b, 0))"""
    )
    assert all(before <= after + 0.11 for before, after in itertools.pairwise(scores))
    assert page.troubles == []


def test_the_keyboard_is_enough(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert page.do("document.activeElement.className") == "skip"
    page.call("Input.dispatchKeyEvent", type="keyDown", key="/", text="/")
    assert page.do("document.activeElement.id") == "answer-search"
    assert page.do("document.activeElement.value") == ""


def test_defaults_are_hidden_until_asked_for(opened: tuple[Page, Path]):
    page, path = opened
    page.open(path)
    page.do("document.querySelectorAll('#config details').forEach(details => { details.open = true; })")
    shown = "[...document.querySelectorAll('tr.default')].filter(row => row.offsetParent).length"
    assert page.do(shown) == 0
    page.do("document.getElementById('config-defaults').click()")
    assert page.do(shown) == 4
