"""Tables inside of pages that people write: each stands between two comments."""

from __future__ import annotations

import re


def with_table(text: str, name: str, table: str) -> str:
    """The text of a page with the table called `name` as it is now."""
    return re.sub(
        rf"(<!-- {name} table -->\n).*?(<!-- end of table -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )
