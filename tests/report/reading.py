"""Reads a page: its elements, its words, and the answers that it holds as data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from stillhouse.report import write_report


class Tags(HTMLParser):
    """Collects the elements, their ids and addresses, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(value or "")

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(folders: list[Path], output: Path, title: str | None = None) -> tuple[str, Tags]:
    html = write_report(folders, output, title).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    return html, tags


def answers(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="answer-data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])
