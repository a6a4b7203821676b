"""What docs/preferences.md shows is true: its rows are read, its commands run, its tables are up to date."""

from __future__ import annotations

import json
import re
import shlex

from stillhouse.data.formats import read_row
from stillhouse.data.rows import Fields
from tests.conftest import ROOT, script
from tests.workshop import Workshop

PAGE = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_tables_are_up_to_date() -> None:
    assert script(ROOT / "docs" / "build_preferences.py").pages() == {"preferences.md": PAGE}, (
        "run: make docs"
    )


def test_its_rows_are_pairs() -> None:
    rows = [read_row(json.loads(line), Fields(), "page:1") for line in blocks("json")[0].splitlines()]
    assert [row.response for row in rows] == ["Fig"] * 3
    assert all(row.is_pair for row in rows)
    assert [row.extra.get("margin") for row in rows] == [5.0, None, 7.0]


def test_the_commands_run_in_order(workshop: Workshop) -> None:
    (workshop.folder / "pairs.jsonl").unlink()  # the page makes its own
    for yaml in blocks("yaml"):
        name = yaml.splitlines()[0].removeprefix("# ")
        text = yaml.replace("limit: 64", "limit: 16").replace("max_steps: 8", "max_steps: 2")
        text = text.replace("{limit: 8, valid_limit: 8}", "{limit: 2, valid_limit: 2, teacher: false}")
        text = text.replace("limit: 8, before", "limit: 2, before")
        (workshop.folder / name).write_text(text, encoding="utf-8")
    for command in (line for block in blocks("console") for line in block.splitlines()):
        arguments = shlex.split(command.replace("--limit 32 --max-tokens 64", "--limit 10 --max-tokens 24"))
        quiet = ("output.report=false", "train.validate_every=never") if arguments[1] == "run" else ()
        said = workshop.stillhouse(*arguments[1:], *quiet)
        assert said.code == 0, said.err
    measured = {
        name: json.loads(
            (workshop.folder / "runs/aligned" / name / "evaluation/student-after.preference.json").read_text(
                encoding="utf-8"
            )
        )["metrics"]
        for name in ("distilled", "dpo", "simper")
    }
    assert all(0 <= one["preference_accuracy"] <= 1 for one in measured.values())
    assert "reward_accuracy" not in measured["distilled"]
    assert measured["dpo"]["kl_to_reference"] > 0
