"""The comparison in other programs' formats: the same numbers, and names that stay names."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from stillhouse.report import load_runs
from stillhouse.report.comparison import comparison_text
from tests.report.made_runs import make_run

NASTY = '=1+1|a_b*c`d`<b>&\\x{y}$5% #"q",\n~^\x00\x1b[2J\u202e'


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run")
    for path in ("state.json", "evaluation/student_after.json", "evaluation/teacher.json"):
        found = json.loads((folder / path).read_text())
        found |= {"name": NASTY} if path == "state.json" else {"label": NASTY, "task": NASTY}
        (folder / path).write_text(json.dumps(found))
    return folder


def test_csv_holds_raw_values(three_runs):
    rows = list(csv.DictReader(io.StringIO(comparison_text(load_runs([three_runs]), "csv"))))
    assert [row["system"] for row in rows][:3] == ["teacher", "student before", "student after kd"]
    assert [float(rows[2][name]) for name in ("rouge_l", "rouge_l_std", "kl_to_teacher", "prompts")] == [
        55.2,
        0.3,
        0.21,
        12,
    ]
    assert rows[0]["run"] == ""


def test_csv_names_are_no_formulas_and_no_further_rows(nasty):
    rows = list(csv.reader(io.StringIO(comparison_text(load_runs([nasty]), "csv"))))
    assert len({len(row) for row in rows}) == 1
    assert not [cell for row in rows for cell in row if cell.startswith("=")]
    assert any(cell.startswith("'=1+1|a_b") for row in rows for cell in row)
    assert not re.search("[\x00\x1b\u202e]", "".join(cell for row in rows for cell in row))


def test_json_is_strict_and_tells_what_differs(three_runs):
    path = three_runs / "kd" / "evaluation" / "student_after.json"
    path.write_text(path.read_text().replace('"tvd": 0.2', '"tvd": NaN'))
    found = json.loads(comparison_text(load_runs([three_runs]), "json"), parse_constant=pytest.fail)
    by_name = {row["system"]: row for row in found["systems"]}
    assert by_name["student after kd"]["tvd"] is None
    assert by_name["student after gkd"]["rouge_l"] == 56.9
    assert found["differences"]["recipe"][0] == {"run": "kd", "value": "kd"}
    assert "train.lr" not in found["differences"]


def test_markdown_marks_the_best_and_gives_the_spread(three_runs):
    text = comparison_text(load_runs([three_runs]), "markdown")
    assert "**e2e (12 prompts, 3 responses each)**" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "ROUGE-L ↑" in rows[0]
    assert any(
        re.search(r"student after distillm2 \| \*\*58.3\*\* ± \d.\d \| \*\*0.160", row) for row in rows
    )
    assert any(re.search(r"student after gkd \| 56.9 ± \d.\d \| \*\*0.160\*\*", row) for row in rows)
    assert any(re.search(r"student after kd \| 55.2 ± \d.\d \| 0.210", row) for row in rows)
    assert len({row.count("|") for row in rows}) == 1
    more = comparison_text(load_runs([three_runs]), "markdown", everything=True)
    assert "TVD" in more
    assert "TVD" not in text
    assert "ROUGE-L against student after distillm2, prompt by prompt" in more
    assert "tokens/s" not in more.lower()  # nobody measured these for their own sake


def test_markdown_names_stay_in_their_cells(nasty):
    text = comparison_text(load_runs([nasty]), "markdown")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for row in rows[:1] + rows[2:]:
        assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"\|", rows[1])), row
    assert "<b>" not in text
    assert "\\`d\\`" in text
    assert "\x1b" not in text


def test_latex_is_balanced_and_marks_the_best(three_runs):
    text = comparison_text(load_runs([three_runs]), "latex")
    assert re.search(r"distillm2 & \\textbf\{58.3\} \$\\pm\$ \d.\d & \\textbf\{0.160\}", text)
    assert r"Top-1 agreement $\uparrow$" in text
    assert r"99.0\%" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"begin\{tabular\}\{(l?r+)\}", text)
    assert columns
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns[1])}


def test_latex_names_are_text(nasty):
    text = comparison_text(load_runs([nasty]), "latex")
    wanted = r"=1+1\textbar{}a\_b*c`d`\textless{}b\textgreater{}\&\textbackslash{}x\{y\}\$5\% \#"
    assert wanted in text
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert not re.search("[\x00\x1b\u202e]", text)
