"""The page of objectives says what the code does today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_objectives_and_its_plots_are_up_to_date() -> None:
    specification = importlib.util.spec_from_file_location("build_objectives", DOCS / "build_objectives.py")
    builder = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(builder)
    for name, text in builder.pages().items():
        written = (DOCS / name).read_text(encoding="utf-8")
        if name.endswith(".md"):
            assert written == text, f"docs/{name} is out of date: run `make docs`"
        else:
            assert len(written) > 1000, f"docs/{name} is missing its plot: run `make docs`"
