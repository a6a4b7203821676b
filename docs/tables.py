"""Tables inside of pages that people write: each stands between two comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def with_table(text: str, name: str, table: str) -> str:
    """The text of a page with the table called `name` as it is now."""
    return re.sub(
        rf"(<!-- {name} table -->\n).*?(<!-- end of table -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )


def with_tables(page: Path, tables: Mapping[str, str]) -> dict[str, str]:
    """A page below docs/ with each of its tables as it is now, by the name of its file."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = with_table(text, name, table)
    return {page.name: text}
