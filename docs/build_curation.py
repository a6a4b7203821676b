"""The table of filters in docs/curation.md, filled in from the classes."""

from __future__ import annotations

from pathlib import Path

from tables import with_table

from stillhouse.rollouts.offline.filters import REGISTRY

PAGE = Path(__file__).resolve().parent / "curation.md"


def table() -> str:
    """One row for each filter: its options with their defaults, and the first sentence about it."""
    lines = ["| filter | options | what it does |", "|---|---|---|"]
    for kind in REGISTRY.kinds():
        part = REGISTRY[kind]
        options = [
            f"`{name}`" if info.default is None else f"`{name}: {_shown(info.default)}`"
            for name, info in part.model_fields.items()
            if name not in ("kind", "source")
        ]
        words = " ".join((part.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| `{kind}` | {', '.join(options)} | {words} |")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """The page with the table as it is now."""
    return {PAGE.name: with_table(PAGE.read_text(encoding="utf-8"), "filters", table())}


def _shown(value: object) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)
