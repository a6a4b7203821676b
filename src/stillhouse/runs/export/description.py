"""The card of an export: the student's own, with what its folder holds and how that is called."""

from __future__ import annotations

import re
from pathlib import Path

from stillhouse import __version__
from stillhouse.files import atomic
from stillhouse.runs.export.student import FinishedStudent

FILE = "README.md"
LIBRARY = re.compile(r"^library_name: .*$", re.MULTILINE)
FENCE = re.compile(r"^(`{3,})", re.MULTILINE)


def write_description(
    folder: Path,
    student: FinishedStudent,
    usage: str | None,
    facts: dict[str, str],
    library: str = "transformers",
) -> None:
    """Write the card of an exported folder.

    Args:
        folder: where.
        student: has a card in its own folder, or gets a short one.
        usage: takes the place of the card's usage; None keeps that.
        facts: what the folder holds, in a section of its own behind the usage.
        library: what loads the folder, by the hub's name; a hub shows how that one is called.
    """
    card = student.folder / FILE
    short = f"---\nlibrary_name: {library}\n---\n\n# {student.name}\n\n"
    parts = sections(card.read_text(encoding="utf-8")) if card.is_file() else {"": short}
    listed = "".join(f"- {title}: {text}\n" for title, text in facts.items())
    usage = parts.get("Usage") if usage is None else f"## Usage\n\n{usage.strip()}\n\n"
    about = f"## Export\n\nWritten by Stillhouse {__version__}.\n\n{listed}\n"
    opening = LIBRARY.sub(f"library_name: {library}", parts.pop(""), count=1)
    rest = "".join(text for title, text in parts.items() if title not in ("Usage", "Export"))
    with atomic(folder / FILE) as handle:
        handle.write((opening + (usage or "") + about + rest).rstrip() + "\n")


def sections(text: str) -> dict[str, str]:
    """A Markdown text by its headings of the second level, what is before the first under "".

    A line in a block of code is no heading.
    """
    found, title, fence = {"": ""}, "", ""
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if mark and (not fence or line.strip() == fence):
            fence = "" if fence else mark[1]
        elif not fence and line.startswith("## "):
            title = line[3:].strip()
        found[title] = found.get(title, "") + line
    return found
