"""The page of objectives says what the code does today."""

from __future__ import annotations

from tests.conftest import ROOT, script

DOCS = ROOT / "docs"


def test_the_page_of_objectives_and_its_plots_are_up_to_date() -> None:
    builder = script(DOCS / "build_objectives.py")
    for name, text in builder.pages().items():
        written = (DOCS / name).read_text(encoding="utf-8")
        if name.endswith(".md"):
            assert written == text, f"docs/{name} is out of date: run `make docs`"
        else:
            assert len(written) > 1000, f"docs/{name} is missing its plot: run `make docs`"
