"""Answers of several seeds side by side, and that unlike things are neither joined nor ranked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.report import load_run, load_runs
from stillhouse.report import responses as responses_module
from stillhouse.report.comparison import comparison_text
from stillhouse.report.responses import side_by_side
from stillhouse.report.systems import gather
from tests.report.made_runs import make_run
from tests.report.reading import answers, page


def test_every_seed_is_there_and_the_mean_beside_them(tmp_path):
    folder = make_run(tmp_path / "run", rows=4, seeds=3)
    found = answers(page([folder], tmp_path / "report.html")[0])
    assert found["labels"] == ["seed 1", "seed 2", "seed 3"]
    mean, told, said = found["rows"][2]["responses"]["2"]
    (after,) = (one for one in load_run(folder).evaluations if one.system == "student after")
    rows = [row for row in after.rows if row["id"] == "e2e:2"]
    assert [[text, label] for text, _, label in said] == [[row["response"], n] for n, row in enumerate(rows)]
    assert mean == pytest.approx(sum(row["rouge_l"] for row in rows) / 3, abs=1e-4)
    assert told == f"mean of 3: ROUGE-L {mean:.1f}"


def test_what_is_too_much_for_a_page_is_cut_evenly_and_counted(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", rows=4, seeds=3)
    systems = gather([load_run(folder)])
    whole = side_by_side(systems)
    assert (whole.prompts, whole.left_out) == (4, 0)
    second = sum(len(row["response"]) for one in systems for row in one.rows if row["seed"] == 2)
    monkeypatch.setattr(responses_module, "MAX_CHARACTERS", second)
    cut = side_by_side(systems)
    assert cut.left_out == 4 * 3
    rows = json.loads(cut.data)["rows"]
    assert {len(own[2]) for row in rows for own in row["responses"].values()} == {2}
    assert [own[:2] for row in rows for own in row["responses"].values()] == [
        own[:2] for row in json.loads(whole.data)["rows"] for own in row["responses"].values()
    ]
    monkeypatch.setattr(responses_module, "MAX_CHARACTERS", 0)
    text = page([folder], tmp_path / "report.html")[1].text
    assert "24 further responses (other seeds, temperatures or samples) are left out" in text


def test_rows_of_one_id_that_ask_something_else_are_not_put_together(tmp_path):
    for name in ("kd", "gkd"):
        make_run(tmp_path / "runs" / name, name, rows=2)
    path = tmp_path / "runs/gkd/evaluation/student_after.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"prompt": "Something else?", "references": ["Other."]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = answers(page([tmp_path / "runs"], tmp_path / "report.html")[0])
    asked = [(row["id"], row["prompt"][:9], sorted(row["responses"])) for row in found["rows"]]
    gkd = str([one["label"] for one in found["systems"]].index("student after gkd"))
    assert asked[-1] == ("e2e:0", "Something", [gkd])
    assert gkd not in asked[0][2]
    assert gkd in asked[1][2]
    # A template of its own makes no other question of it.
    rows[0] |= {"prompt": "<user>Something else?</user>", "references": rows[1]["references"], "id": "e2e:1"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(answers(page([tmp_path / "runs"], tmp_path / "report.html")[0])["rows"]) == 2


def changed(path: Path, **settings: object) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "settings": {**found["settings"], **settings}}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"seeds": [1]}, "seeds [1, 2, 3] (teacher, student before, student after kd, student after gkd"),
        ({"prompts": 5, "questions_digest": "b"}, "prompts 12 (teacher"),
        ({"questions_digest": "b"}, "other questions or references"),
        ({"sampling": {"temperature": 1.0}}, "sampling.temperature 0 (student after gkd), 1 (student after"),
    ],
)
def test_what_was_not_measured_alike_is_told_and_not_ranked(three_runs, tmp_path, settings, told):
    assert "Not measured alike" not in page([three_runs], tmp_path / "alike.html")[1].text
    for path in three_runs.glob("*/evaluation/*.json"):
        changed(path, **({"questions_digest": "a"} if "questions_digest" in settings else {}))
    changed(three_runs / "gkd/evaluation/student_after.json", sampling={"temperature": 0})
    changed(three_runs / "distillm2/evaluation/student_after.json", **settings)
    html, tags = page([three_runs], tmp_path / "report.html")
    assert "Not measured alike" in tags.text
    assert told in tags.text
    assert 'class="best"' not in html
    assert "of the gap closed" not in tags.text
    runs = load_runs([three_runs])
    assert "Not measured alike" in comparison_text(runs, "markdown")
    assert "**58" not in comparison_text(runs, "markdown")
    assert "Not measured alike" in comparison_text(runs, "latex")
    assert json.loads(comparison_text(runs, "json"))["measured_differently"]["e2e"]


def test_where_rows_lie_or_what_a_model_needs_is_no_difference(three_runs):
    changed(three_runs / "gkd/evaluation/student_after.json", data="/elsewhere/e2e.jsonl", dtype="bfloat16")
    for name in ("kd", "gkd", "distillm2"):
        changed(three_runs / name / "evaluation/teacher.json", template="chat")
        changed(three_runs / name / "evaluation/student_after.json", template="plain", data="e2e.jsonl")
    runs = load_runs([three_runs])
    assert json.loads(comparison_text(runs, "json"))["measured_differently"] == {}
    assert "**58.3**" in comparison_text(runs, "markdown")
