"""Writes every generated page: each build_*.py beside this file has `pages()`, which gives texts by path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent


def pages() -> dict[str, str]:
    """All generated files by their path below docs/."""
    sys.path.insert(0, str(DOCS))
    try:
        found: dict[str, str] = {}
        for builder in sorted(DOCS.glob("build_*.py")):
            found.update(importlib.import_module(builder.stem).pages())
        return found
    finally:
        sys.path.remove(str(DOCS))


def main() -> None:
    """Write what differs."""
    for name, text in pages().items():
        path = DOCS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
