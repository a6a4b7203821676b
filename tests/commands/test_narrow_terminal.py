"""Every table that a command prints, on a real terminal of 80, 100 and 120 columns: no name and no number is
cut."""

from __future__ import annotations

import json
import re

import pytest

from stillhouse.files import STAGE, write_jsonl
from stillhouse.recipes import all_recipes
from stillhouse.runs.resolve import resolve
from tests.report.made_runs import make_run
from tests.workshop import Workshop

widths = pytest.mark.parametrize("columns", [80, 100, 120])
STUDENTS = (
    "student after distillm-2-without-its-curricula",
    "student after kd",
    "student after gkd-on-policy",
)
CACHE = ("train.max_steps=1", "teacher={kind: cache, of: {kind: live, path: teacher}, folder: cache}")


def shown(workshop: Workshop, columns: int, *command: str) -> list[str]:
    code, screens = workshop.in_terminal(*command, columns=columns, lines=200)
    lines = screens[-1]
    assert code == 0, lines
    assert not any("…" in line for line in lines), lines
    return lines


def whole(lines: list[str], *names: str) -> None:
    """Each name stands unbroken in a line of its own."""
    for name in names:
        found = [line for line in lines if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", line)]
        assert found, (name, lines)


@widths
def test_compare_and_runs_lose_no_name(workshop: Workshop, columns: int) -> None:
    for name, score in zip(STUDENTS, (58.3, 55.2, 56.9), strict=True):
        make_run(workshop.folder / "runs" / name.split()[-1], name.split()[-1], score=score, tasks=True)
    lines = shown(workshop, columns, "compare", "runs")
    whole(lines, "teacher", *STUDENTS, "objective.alpha", "e2e (12 prompts, 3 responses each)")
    (best,) = [line for line in lines if re.match(rf" *{STUDENTS[0]} +58.3 ± ", line)]
    # What has no room is named, and the pipe that is named has it.
    told = re.search(
        r"(\d+) more columns? in a wider terminal or a pipe \(\| less -S\): (.*?)\.", " ".join(lines)
    )
    headings = ("ROUGE-L", "KL to teacher", "Top-1 agreement", "Mean length", "Finished", "Parameters")
    numbers = len(re.findall(r"\d+\.\d+%?(?: ± \d+\.\d+%?)?|\d+k", best))
    missing = told[2].split(", ") if told else []
    assert numbers + len(missing) == len(headings), lines
    assert tuple(missing) == headings[len(headings) - len(missing) :]
    assert columns < 120 or len(missing) < 3
    piped = workshop.stillhouse("compare", "runs").out
    assert all(heading in piped for heading in headings)
    listed = shown(workshop, columns, "runs")
    whole(listed, *(f"runs/{name.split()[-1]}" for name in STUDENTS))


@widths
def test_run_eval_and_cache_lose_no_name(workshop: Workshop, columns: int) -> None:
    name = "a-run-with-a-name-of-some-length"
    lines = shown(workshop, columns, "run", "run.yaml", f"name={name}", *CACHE, "evaluate.before=true")
    whole(lines, name, "student before", "4 prompts")
    lines = shown(workshop, columns, "cache", "info", "cache")
    whole(lines, "sequences", "codec")
    data = ("--data", "valid.jsonl", "--template", "plain", "--max-tokens", "4")
    lines = shown(workshop, columns, "eval", "student", *data, "--teacher", "teacher")
    whole(lines, "reverse_kl_to_teacher_on_own_text", "parameters")


@widths
def test_check_and_methods_lose_no_name(workshop: Workshop, columns: int) -> None:
    values = [path for path, fact in resolve("run.yaml").provenance.items() if fact["origin"] != "default"]
    lines = shown(workshop, columns, "check", "run.yaml")
    whole(lines, *values, "peak memory, estimated (GB)", "run.yaml:2")
    whole(shown(workshop, columns, "methods"), *(recipe.name for recipe in all_recipes()))


@widths
def test_show_and_curate_lose_no_name(workshop: Workshop, columns: int) -> None:
    rows = [
        {"number": 0, "id": f"a-{source}", "prompt": "Where?", "response": "and " * 40, "source": source}
        for source in ("teacher", "student")
    ]
    for row in rows:
        write_jsonl(workshop.folder / f"{row['source']}.jsonl", [{STAGE: {"stage": "responses"}}, row])
    whole(shown(workshop, columns, "show", "responses", "teacher.jsonl"), "a-teacher", "teacher")
    kept = ("-o", "kept.jsonl", "-f", "repetition")
    whole(shown(workshop, columns, "curate", "teacher.jsonl", *kept), "teacher", "repetition")


def test_a_table_of_many_runs_is_turned_instead_of_squeezed(workshop: Workshop) -> None:
    """Eight runs differ in a path of 40 characters: no column of eight would hold it."""
    for number in range(8):
        folder = make_run(workshop.folder / "runs" / f"kd-{number}", "kd")
        found = json.loads((folder / "provenance.json").read_text())
        found["student.path"]["value"] = f"models/of/a/certain/length/student-{number}"
        (folder / "provenance.json").write_text(json.dumps(found))
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**state, "name": f"kd-{number}"}))
    lines = shown(workshop, 80, "compare", "runs")
    at = lines.index("student.path")
    assert lines[at + 1].split() == ["kd-0", "models/of/a/certain/length/student-0"]
    assert lines[at + 8].split() == ["kd-7", "models/of/a/certain/length/student-7"]
