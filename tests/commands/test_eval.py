"""One command evaluates a teacher and two students on four sets and writes the page."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from torch import nn

from stillhouse.files import locate
from stillhouse.models import fingerprint
from stillhouse.report.record import find_runs, load_run
from stillhouse.report.systems import gather
from stillhouse.runs import evaluation
from tests.workshop import Said, Workshop, sends

SETS = ("one", "two", "three", "four")
YAML = """\
sampling: {{temperature: 1.0, max_tokens: 8}}
tasks:
  - {{kind: instructions, template: plain, seeds: [10, 20], sets: {{{sets}}}}}
  - {{kind: cost, batch_size: 2, prompt_tokens: 8, new_tokens: 4, repeats: 1}}
"""
COMMAND = ("eval", "student", "runs/kd", "--teacher", "teacher", "--tasks", "tasks.yaml", "-o", "out")


@pytest.fixture
def ready(workshop: Workshop) -> Workshop:
    """Four sets of three rows, and a finished run whose student is the second one."""
    lines = (locate("package:stillhouse/demo/data") / "eval.jsonl").read_text("utf-8").splitlines()
    for index, name in enumerate(SETS):
        text = "\n".join(lines[3 * index : 3 * index + 3]) + "\n"
        (workshop.folder / f"{name}.jsonl").write_text(text, "utf-8")
    sets = ", ".join(f"{name}: {name}.jsonl" for name in SETS)
    (workshop.folder / "tasks.yaml").write_text(YAML.format(sets=sets), "utf-8")
    run = workshop.folder / "runs/kd"
    run.mkdir(parents=True)
    (run / "student").symlink_to(workshop.folder / "student")
    (run / "state.json").write_text('{"state": "done", "name": "kd", "recipe": "kd"}', "utf-8")
    (run / "metrics.jsonl").write_text('{"phase": "train", "step": 1, "loss": 2.0}\n', "utf-8")
    return workshop


def results(folder: Path) -> dict[str, Any]:
    """Everything that does not depend on the clock."""
    found = {}
    for path in sorted(folder.glob("*/evaluation/*.jsonl")):
        result = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if "cost" not in path.name:
            found[f"{path.parent.parent.name}/{path.name}"] = path.read_text("utf-8")
            metrics = {k: v for k, v in result["metrics"].items() if k != "tokens_per_second"}
            found[f"{path.parent.parent.name}/{path.stem}"] = metrics
    return found


def ok(said: Said) -> Said:
    assert said.code == 0, said.err
    return said


def test_teacher_and_two_students_on_four_sets(ready: Workshop) -> None:
    said = ok(ready.stillhouse(*COMMAND))
    assert said.out.strip().endswith("out/report.html")
    page = (ready.folder / "out/report.html").read_text("utf-8")
    runs = [load_run(folder) for folder in find_runs([ready.folder / "out"])]
    assert {run.name for run in runs} == {"student", "kd"}
    assert not [problem for run in runs for problem in run.problems]
    systems = {(system.task, system.label) for system in gather(runs)}
    assert systems == {(task, label) for task in (*SETS, "cost") for label in ("teacher", "student", "kd")}
    for name in SETS:
        assert name in said.out
        assert name in page
    kd = next(run for run in runs if run.name == "kd")
    assert kd.recipe == "kd"
    assert kd.log == [{"phase": "train", "step": 1, "loss": 2.0}]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for system in gather(runs):
        if system.task == "cost":
            continue
        assert len(system.rows) == 6
        best = [scorer.score_multi(r["references"], r["response"])["rougeL"].fmeasure for r in system.rows]
        assert system.metrics["rouge_l"] == pytest.approx(100 * fmean(best), abs=1e-3)
        assert ("kl_to_teacher" in system.metrics) == (system.role != "teacher")


def test_an_interrupted_comparison_goes_on(ready: Workshop) -> None:
    ok(ready.stillhouse(*COMMAND))
    straight = results(ready.folder / "out")
    broken = (*COMMAND[:-1], "broken")
    hook = sends(("student-after.three.jsonl", 1), sig=signal.SIGKILL)
    assert ready.in_child(*broken, hook=hook).code == -signal.SIGKILL
    done = ready.folder / "broken/student/evaluation/student-after.one.json"
    before = done.stat().st_mtime_ns
    assert not (ready.folder / "broken/kd").exists()
    ok(ready.stillhouse(*broken))
    assert done.stat().st_mtime_ns == before
    assert results(ready.folder / "broken") == straight
    assert len(straight) == 5 * 4 * 2  # (teacher in three folders, two students) x sets x (answers, metrics)


def test_weights_are_read_once_for_all_tasks(ready: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(model: nn.Module) -> str:
        read.append(model)
        return fingerprint(model)

    monkeypatch.setattr(evaluation, "fingerprint", counted)
    ok(ready.stillhouse(*COMMAND))
    assert len(read) == 5, "the teacher by itself, and each of two students with the teacher"


def test_other_rows_are_measured_again_on_the_teacher_too(ready: Workshop) -> None:
    """Results of other rows in the same folder are not taken for those of these."""
    command = (
        "eval",
        "student",
        "runs/kd",
        "--teacher",
        "teacher",
        "--max-tokens",
        "6",
        "--template",
        "plain",
    )
    for rows in ("one.jsonl", "two.jsonl"):
        ok(ready.stillhouse(*command, "--data", rows, "-o", "out"))
        runs = [load_run(folder) for folder in find_runs([ready.folder / "out"])]
        asked = [json.loads(line)["prompt"] for line in (ready.folder / rows).read_text("utf-8").splitlines()]
        for one in (result for run in runs for result in run.evaluations):
            assert [row["prompt"].strip() for row in one.rows] == asked, (rows, one.system)


def test_the_limit_holds_for_tasks_on_the_same_rows(ready: Workshop) -> None:
    command = ("eval", "student", "--tasks", "exact_match", "--data", "one.jsonl", "--limit", "2")
    ok(ready.stillhouse(*command, "--max-tokens", "4", "--template", "plain", "-o", "out"))
    (run,) = [load_run(folder) for folder in find_runs([ready.folder / "out"])]
    assert [(one.task, len(one.rows)) for one in run.evaluations] == [
        ("held-out prompts", 2), ("exact_match", 2),
    ]  # fmt: skip


def test_what_is_wrong_with_tasks_is_told_before_anything_loads(ready: Workshop) -> None:
    command = ("eval", "student", "--tasks")
    assert "--data: is missing" in ready.refused("eval", "student")
    assert "no task is called" in ready.refused(*command, "instruct", "--data", "valid.jsonl")
    (ready.folder / "bad.yaml").write_text("tasks: [{kind: exact_match, data: absent.jsonl}]", "utf-8")
    said = ready.refused(*command, "bad.yaml")
    assert "--tasks[0].data" in said
    assert "absent.jsonl" in said
    (ready.folder / "bad.yaml").write_text("seeds: [1]", "utf-8")
    assert "has no list of tasks" in ready.refused(*command, "bad.yaml")
    (ready.folder / "runs/empty").mkdir()
    (ready.folder / "runs/empty/state.json").write_text("{}", "utf-8")
    assert "without a finished student" in ready.refused("eval", "runs/empty", *command[1:], "tasks.yaml")
    assert "needs rows" in ready.stillhouse(*command, "exact_match").err
    said = ready.refused(*command, "speculative", "--data", "valid.jsonl")
    assert "--tasks[0]: kind speculative needs a model in this process from teacher" in said
    assert "Set --teacher FOLDER." in said


def test_models_keep_the_names_of_their_folders(ready: Workshop) -> None:
    command = ("--data", "valid.jsonl", "--template", "plain", "--max-tokens", "4", "-o")
    ok(ready.stillhouse("eval", "student", "teacher", *command, "alone"))
    assert {run.name for run in find_runs([ready.folder / "alone"])} == {"student", "teacher"}
    (ready.folder / "old").mkdir()
    (ready.folder / "old/teacher").symlink_to(ready.folder / "teacher")
    (ready.folder / "old/student").symlink_to(ready.folder / "student")
    both = ("eval", "student", "old/student", "old/teacher", *command, "beside", "--teacher", "teacher")
    ok(ready.stillhouse(*both))
    named = {run.name for run in find_runs([ready.folder / "beside"])}
    assert named == {"student", "old-student", "old-teacher"}


def test_another_teacher_is_evaluated_and_runs_are_not_overwritten(ready: Workshop) -> None:
    command = ("--data", "valid.jsonl", "--template", "plain", "--max-tokens", "4", "-o", "out", "--teacher")
    losses = []
    for teacher in ("teacher", "student", "teacher"):
        ok(ready.stillhouse("eval", "student", "runs/kd", *command, teacher))
        result = json.loads((ready.folder / "out/kd/evaluation/teacher.json").read_text("utf-8"))
        losses.append(result["metrics"]["loss"])
    assert losses[0] == losses[2] != losses[1]
    before = ready.listing()
    said = ready.refused("eval", "student", "runs/kd", *command[:-2], "runs")
    assert "--output: runs/kd is a training run" in said
    assert ready.listing() == before


def test_results_of_other_weights_do_not_stay_beside_the_new_ones(ready: Workshop) -> None:
    command = ("--data", "valid.jsonl", "--template", "plain", "--max-tokens", "4", "-o", "out")
    task = ("--tasks", "exact_match")
    ok(ready.stillhouse("eval", "student", "runs/kd", *command, *task))
    ok(ready.stillhouse("eval", "student", "runs/kd", *command))
    kept = ready.folder / "out/kd/evaluation/student-after.exact_match.json"
    assert kept.exists()
    (ready.folder / "runs/kd/student").unlink()
    (ready.folder / "runs/kd/student").symlink_to(ready.folder / "teacher")
    said = ok(ready.stillhouse("eval", "student", "runs/kd", *command))
    assert "out/kd: results of other weights were moved to" in said.err
    assert not kept.exists()
    assert len(list((ready.folder / "out/kd").glob(".evaluation-*/student-after*"))) == 4
    assert (ready.folder / "out/student/evaluation/student-after.exact_match.json").exists()
    run = next(one for one in map(load_run, find_runs([ready.folder / "out"])) if one.name == "kd")
    assert {one.task for one in run.evaluations} == {"held-out prompts"}
