"""Fills the generated parts of README.md: the table of methods and the table of the quickstart.

python docs/readme.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import with_table

from stillhouse.recipes import all_recipes

ROOT = Path(__file__).resolve().parent.parent
RECIPES = "src/stillhouse/recipes"


def methods() -> str:
    """One row for each recipe."""
    rows = [f"| [`{r.name}`]({RECIPES}/{r.name}.yaml) | {r.summary} | {r.paper} |" for r in all_recipes()]
    return "\n".join(["| method | what it does | paper |", "|---|---|---|", *rows])


def quickstart() -> str:
    """The committed result of `benchmarks/quickstart.py`."""
    result = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    counts = {row["prompts"] for row in result["rows"]}
    lines = ["| system | ROUGE-L | KL to teacher | parameters |", "|---|---|---|---|"]
    for row in result["rows"]:
        cells = [_with_interval(row, "rouge_l", 1), _with_interval(row, "kl_to_teacher", 3)]
        lines.append(f"| {row['system']} | {' | '.join(cells)} | {row['parameters']:,} |")
    lines += [
        "",
        f"{', '.join(map(str, sorted(counts)))} prompts; ±: 95 % interval by bootstrap over them"
        f" ({result['date']}).",
    ]
    return "\n".join(lines)


def _with_interval(row: dict[str, Any], name: str, digits: int) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return ""
    spread = "" if low is None else f" ± {(high - low) / 2:.{digits}f}"
    return f"{value:.{digits}f}{spread}"


def filled(text: str) -> str:
    """README.md with both tables as they are now."""
    for name, table in (("quickstart", quickstart()), ("methods", methods())):
        text = with_table(text, name, table)
    return text


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
