"""Fills the generated parts of README.md: the table of methods and the table of the quickstart.

python docs/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    lines = ["| system | ROUGE-L | KL to teacher | parameters | tokens/s |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        divergence = "" if row["kl_to_teacher"] is None else f"{row['kl_to_teacher']:.3f}"
        numbers = (
            f"{row['rouge_l']:.1f} | {divergence} | {row['parameters']:,} | {row['tokens_per_second']:,.0f}"
        )
        lines.append(f"| {row['system']} | {numbers} |")
    lines.append("")
    lines.append(f"({result['seconds']:.0f} s of work; threads: {result['threads']}; {result['date']}.)")
    return "\n".join(lines)


def filled(text: str) -> str:
    """README.md with both tables as they are now."""
    for name, table in (("quickstart", quickstart()), ("methods", methods())):
        pattern = rf"(<!-- {name} table -->\n).*?(<!-- end of table -->)"
        text = re.sub(
            pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL
        )
    return text


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
