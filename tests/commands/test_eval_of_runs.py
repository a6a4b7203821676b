"""A run folder, its student's and a copy of that are asked as the run asked; dropped rows are counted."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.workshop import Workshop

TEMPLATE = {"kind": "custom", "without_input": "Facts: {instruction}\nText: "}
YAML = """\
name: own
student: {path: student}
teacher: {kind: live, path: teacher}
data:
  train: train.jsonl
  template: {kind: custom, without_input: "Facts: {instruction}\\nText: "}
  max_prompt: 48
  max_response: 12
objective: forward_kl
train: {max_steps: 1, batch_size: 8, lr: 1.0e-4}
evaluate:
  data: held.jsonl
  sampling: {temperature: 0.9, top_p: 0.95}
  seeds: [3, 4]
  before: false
  teacher: false
"""


@pytest.fixture
def ready(workshop: Workshop) -> Workshop:
    """A run of one step with settings of its own; of its six held-out rows two have long prompts."""
    rows = [json.loads(line) for line in (workshop.folder / "valid.jsonl").read_text("utf-8").splitlines()]
    short = [
        {"prompt": f"name[{word}], food[Thai]", "response": f"{word} serves Thai food."} for word in "ABCD"
    ]
    long = [{**row, "prompt": " ".join([row["prompt"]] * 9)} for row in rows[:2]]
    text = "".join(json.dumps(row) + "\n" for row in [*short, *long])
    (workshop.folder / "held.jsonl").write_text(text, "utf-8")
    (workshop.folder / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in short * 2), "utf-8"
    )
    (workshop.folder / "own.yaml").write_text(YAML, "utf-8")
    said = workshop.stillhouse("run", "own.yaml")
    assert said.code == 0, said.err
    assert "2 of 6 rows left out (2 prompt too long)" in said.out
    return workshop


def result(workshop: Workshop, model: str, *options: str) -> dict[str, Any]:
    said = workshop.stillhouse("eval", model, "--data", "held.jsonl", "-o", "out.json", *options)
    assert said.code == 0, said.err
    return json.loads((workshop.folder / "out.json").read_text("utf-8")) | {"said": said.out}


def measured(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in metrics.items()
        if name != "tokens_per_second" and not name.endswith(("_on_own_text", "_teacher", "tvd", "agreement"))
    }


def test_every_way_to_name_a_student_gives_the_numbers_of_its_run(ready: Workshop) -> None:
    shutil.copytree(ready.folder / "runs/own/student", ready.folder / "copy")
    run = json.loads((ready.folder / "runs/own/evaluation/student-after.json").read_text("utf-8"))
    (ready.folder / "old/student").parent.mkdir()
    shutil.copytree(ready.folder / "runs/own", ready.folder / "old/run")
    (ready.folder / "old/run/student/stillhouse.json").unlink()  # as a run of before has none
    for model in ("runs/own", "runs/own/student", "copy", "old/run", "old/run/student"):
        found = result(ready, model)
        assert measured(found["metrics"]) == pytest.approx(measured(run["metrics"])), model
        assert found["settings"]["sampling"] == run["settings"]["sampling"]
        assert found["settings"]["seeds"] == [3, 4]
    # Several at once, with a teacher, which is asked alike.
    command = ("--data", "held.jsonl", "--teacher", "teacher", "-o", "both")
    said = ready.stillhouse("eval", "runs/own", "copy", *command)
    assert said.code == 0, said.err
    for name in ("own", "copy"):
        both = json.loads((ready.folder / f"both/{name}/evaluation/student-after.json").read_text("utf-8"))
        assert both["metrics"]["rouge_l"] == run["metrics"]["rouge_l"]
    asked = (ready.folder / "both/own/evaluation/teacher.jsonl").read_text("utf-8").splitlines()
    assert all(json.loads(line)["prompt"].startswith("Facts: ") for line in asked)
    # What is said on the command line holds.
    greedy = result(ready, "runs/own", "--temperature", "0", "--seeds", "1", "--max-tokens", "5")
    assert greedy["settings"]["seeds"] == [1]
    assert greedy["settings"]["sampling"] == run["settings"]["sampling"] | {"temperature": 0, "max_tokens": 5}
    plain = result(ready, "runs/own", "--template", "plain")
    assert plain["metrics"]["loss"] != pytest.approx(run["metrics"]["loss"])


def test_a_template_with_options_can_be_given_for_any_model(ready: Workshop) -> None:
    ready.folder.joinpath("custom.yaml").write_text(json.dumps({"template": TEMPLATE}), "utf-8")
    for given in (json.dumps(TEMPLATE), "custom.yaml"):
        found = result(ready, "teacher", "--template", given, "--max-tokens", "4")
        assert found["settings"]["rows"] == 6
        rows = (ready.folder / "out.jsonl").read_text("utf-8").splitlines()
        assert json.loads(rows[0])["prompt"] == "Facts: name[A], food[Thai]\nText: "
    wrong = ("eval", "teacher", "--data", "held.jsonl", "--template")
    assert "--template" in ready.refused(*wrong, '{kind: custom, without_input: "no place"}')
    assert "--template" in ready.refused(*wrong, "chatt")
    assert "--template: is not YAML" in ready.refused(*wrong, "{kind: custom")
    asked = (
        "generate",
        "--model",
        "runs/own",
        "--data",
        "held.jsonl",
        "--max-tokens",
        "4",
        "-o",
        "text.jsonl",
    )
    said = ready.stillhouse(*asked)
    assert said.code == 0, said.err
    told = "warning: --data (held.jsonl): of 6 rows 6 x response cut. See --max-prompt, --max-tokens"
    assert told in said.err, "in the words of the command, not of a configuration that nobody wrote"
    text = (ready.folder / "text.jsonl").read_text("utf-8")
    assert "A" in text


def test_dropped_and_cut_rows_are_counted_wherever_a_score_is_shown(ready: Workshop) -> None:
    words = "2 of 6 rows left out (2 prompt too long)"
    run = ready.folder / "runs/own"
    settings = json.loads((run / "evaluation/student-after.json").read_text("utf-8"))["settings"]
    assert (settings["data"], settings["rows"], settings["prompts"]) == ("held.jsonl", 6, 4)
    assert settings["dropped"] == {"prompt too long": 2}
    assert len(settings["sha256"]) >= 16
    held = json.loads((run / "data.json").read_text("utf-8"))["eval"]
    assert (held["path"], held["rows"], held["kept"], held["dropped"]) == (
        "held.jsonl", 6, 4, {"prompt too long": 2},
    )  # fmt: skip
    card = (run / "student/README.md").read_text("utf-8")
    assert words in card
    assert "| evaluation: held-out prompts | held.jsonl | 6 | 4 | 2 prompt too long | none |" in card
    assert words in (run / "report.html").read_text("utf-8")
    alone = result(ready, "runs/own")
    assert f"4 prompts; {words}" in alone["said"]
    assert alone["settings"]["sha256"] == settings["sha256"]
    # A task with rows of its own counts them, too.
    tasks = "{tasks: [{kind: exact_match, data: held.jsonl, name: exact}]}"
    (ready.folder / "tasks.yaml").write_text(tasks, "utf-8")
    said = ready.stillhouse("eval", "runs/own", "--tasks", "tasks.yaml", "-o", "tasks")
    assert said.code == 0, said.err
    assert words in said.out
    task = json.loads((ready.folder / "tasks/own/evaluation/student-after.exact.json").read_text("utf-8"))
    assert (task["settings"]["rows"], task["settings"]["dropped"]) == (6, {"prompt too long": 2})
