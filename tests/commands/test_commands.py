"""Every command, as a friendly user has it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
import yaml

from stillhouse import __version__, commands, recipes
from stillhouse.commands.app import app
from tests.workshop import Workshop

NAMES = [recipe.name for recipe in recipes.all_recipes()]
COMMANDS = (
    "init", "methods", "quickstart", "align", "cache", "check", "reward", "run", "serve", "sweep", "curate",
    "generate", "merge", "pairs", "show", "chat", "compare", "eval", "export", "judge", "quantise", "report",
    "runs",
)  # fmt: skip


def test_help_names_every_command_and_every_option_is_explained(workshop: Workshop) -> None:
    said = workshop.stillhouse("--help")
    assert said.code == 0
    group = typer.main.get_command(app)
    assert tuple(group.list_commands(typer.Context(group))) == COMMANDS  # type: ignore[attr-defined]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert re.search(rf"\b{name}\b", said.out)
        assert command.help
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"


def test_each_file_is_a_command_of_its_name() -> None:
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")}
    assert files - {"__init__", "app", "options"} == set(COMMANDS)


def test_version_is_the_packages(workshop: Workshop) -> None:
    said = workshop.stillhouse("--version")
    assert said.out.strip() == f"stillhouse {__version__}"
    assert said.code == 0


def test_a_mistyped_command_gets_a_suggestion(workshop: Workshop) -> None:
    said = workshop.stillhouse("rum")
    assert said.code == 2
    assert "'run'" in said.err


def test_methods_lists_every_recipe_with_its_summary(workshop: Workshop) -> None:
    said = workshop.stillhouse("methods")
    for recipe in recipes.all_recipes():
        assert recipe.summary
        assert recipe.paper, recipe.name
        assert re.search(rf"^ *{recipe.name} .*{re.escape(recipe.summary)}", said.out, flags=re.MULTILINE)


@pytest.mark.parametrize("method", NAMES)
def test_what_init_writes_passes_check_once_the_paths_are_set(workshop: Workshop, method: str) -> None:
    assert workshop.stillhouse("init", method, "-o", "new.yaml").code == 0
    path = workshop.folder / "new.yaml"
    text = path.read_text(encoding="utf-8")
    for model in ("student", "teacher", *recipes.find(method).teachers):
        text = text.replace(
            f"path/or/hub-name/of/the/{model}", "student" if model == "student" else "teacher"
        )
    path.write_text(text, encoding="utf-8")
    assert yaml.safe_load(text)["recipe"] == method
    said = workshop.stillhouse("check", "new.yaml")
    assert said.code == 0, said.err
    assert re.search(
        r"^ *data\.train\.path +(train|pairs|chains)\.jsonl +new\.yaml:\d+", said.out, flags=re.MULTILINE
    )
    assert "peak memory, estimated (GB)" in said.out


def test_init_prints_the_same_text_and_never_overwrites_unasked(workshop: Workshop) -> None:
    printed = workshop.stillhouse("init", "kd").out
    (workshop.folder / "mine.yaml").write_text("precious", encoding="utf-8")
    assert "--force" in workshop.refused("init", "kd", "-o", "mine.yaml")
    assert (workshop.folder / "mine.yaml").read_text(encoding="utf-8") == "precious"
    assert workshop.stillhouse("init", "kd", "-o", "mine.yaml", "--force").code == 0
    assert (workshop.folder / "mine.yaml").read_text(encoding="utf-8") == printed


def test_init_suggests_the_method_that_was_meant(workshop: Workshop) -> None:
    assert "did you mean 'distillm2'" in workshop.refused("init", "distilm2")


def test_check_shows_where_each_value_comes_from(workshop: Workshop) -> None:
    said = workshop.stillhouse("check", "run.yaml", "--no-sizes", "train.lr=1e-3", "data.train.limit=3")
    rows = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if len(line.split()) > 2}
    assert rows["train.lr"] == ["0.001", "command", "line"]
    assert rows["data.train.limit"] == ["3", "command", "line"]
    assert rows["data.train.path"] == ["train.jsonl", "run.yaml:6"]
    assert rows["objective.kind"] == ["forward_kl", "recipe", "kd"]
    assert rows["engine.sampling.max_tokens"] == ["8", "data.max_response"]
    assert "train.epochs" not in rows
    assert re.search(r"^\d+ more values are defaults; --all shows them\.$", said.out, flags=re.MULTILINE)
    whole = workshop.stillhouse("check", "run.yaml", "--no-sizes", "--all")
    assert re.search(r"^ *train\.epochs +1\.0 +default", whole.out, flags=re.MULTILINE)
    assert "more values" not in whole.out


def test_check_says_what_is_wrong_before_anything_else(workshop: Workshop) -> None:
    said = workshop.stillhouse("check", "run.yaml", "teacher.path=nowhere")
    assert (said.code, said.out) == (2, "")
    assert "teacher.path" in said.err
    # What only the sizes find out is said first, too.
    said = workshop.stillhouse("check", "run.yaml", "data.max_response=600")
    assert (said.code, said.out) == (2, "")


def test_check_counts_what_is_dropped_even_if_it_is_little(workshop: Workshop) -> None:
    rows = (workshop.folder / "train.jsonl").read_text("utf-8") + '{"prompt": "", "response": "x"}\n'
    (workshop.folder / "train.jsonl").write_text(rows, "utf-8")
    said = workshop.stillhouse("check", "run.yaml")
    assert re.search(r"train: dropped, of 25 rows +1 x empty prompt", said.out), said.out


def test_check_writes_nothing(workshop: Workshop) -> None:
    before = workshop.listing()
    assert workshop.stillhouse("check", "run.yaml").code == 0
    assert workshop.listing() == before


def test_run_eval_and_report_on_a_whole_run(workshop: Workshop) -> None:
    said = workshop.stillhouse("run", "run.yaml", "train.max_steps=2", "evaluate.before=true", "name=one")
    assert said.code == 0, said.err
    assert "student before" in said.out
    assert "Student: runs/one/student" in said.out
    assert workshop.state("one")["state"] == "done"
    evaluated = (
        "eval",
        "runs/one/student",
        "--data",
        "valid.jsonl",
        "--teacher",
        "teacher",
        "-o",
        "found.json",
    )
    said = workshop.stillhouse(*evaluated, "--template", "plain", "--max-tokens", "8", "--seeds", "3,4")
    assert said.code == 0, said.err
    found = json.loads((workshop.folder / "found.json").read_text(encoding="utf-8"))
    assert found["settings"]["seeds"] == [3, 4]
    low, high = found["intervals"]["kl_to_teacher"]
    assert low < found["metrics"]["kl_to_teacher"] < high
    assert re.search(r"^ *kl_to_teacher +[\d.]+ +[\d.]+ to [\d.]+ *$", said.out, flags=re.MULTILINE), said.out
    assert "4 prompts" in said.out
    assert "tokens_per_second" not in said.out
    assert found["settings"]["sampling"]["max_tokens"] == 8
    own = json.loads((workshop.folder / "runs/one/evaluation/student-after.json").read_text(encoding="utf-8"))
    for name in ("rouge_l", "kl_to_teacher", "top1_agreement", "mean_length"):
        assert found["metrics"][name] == pytest.approx(own["metrics"][name], rel=1e-5), name
    answers = (workshop.folder / "found.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 2 * 4
    assert workshop.stillhouse("run", "run.yaml", "train.max_steps=1", "name=two").code == 0
    said = workshop.stillhouse("report", "runs", "-o", "both.html", "--title", "One against two")
    assert said.out.strip() == "both.html"
    assert workshop.stillhouse("report", "runs/one", "runs/two").code == 0
    assert [path.name for path in workshop.folder.rglob("report.html")] == ["report.html"]
    assert (workshop.folder / "runs/report.html").exists()
    page = (workshop.folder / "both.html").read_text(encoding="utf-8")
    assert "One against two" in page
    assert "<script src" not in page


def test_runs_and_compare_tell_the_same_as_the_folders(workshop: Workshop) -> None:
    assert "holds no run" in workshop.refused("runs", ".")
    assert "runs: is not a folder" in workshop.refused("runs")
    for name in ("one", "two"):
        assert workshop.stillhouse("run", "run.yaml", "train.max_steps=2", f"name={name}").code == 0
    (listed,) = [line for line in workshop.stillhouse("runs").out.splitlines() if "runs/two" in line]
    assert listed.split()[:4] == ["runs/two", "done", "kd", "2/2"]
    lines = json.loads(workshop.stillhouse("runs", "--json").out)
    assert [line["name"] for line in lines] == ["one", "two"]
    after = json.loads(
        (workshop.folder / "runs/two/evaluation/student-after.json").read_text(encoding="utf-8")
    )
    assert lines[1]["score"]["value"] == after["metrics"]["rouge_l"]
    assert re.search(
        r"^ *two +[\d.]+ ± [\d.]+ +[\d.]+ ", workshop.stillhouse("compare", "runs").out, flags=re.MULTILINE
    )
    said = workshop.stillhouse("compare", "runs", "--format", "latex", "-o", "table.tex")
    assert (said.code, said.out) == (0, "")
    assert "\\toprule" in (workshop.folder / "table.tex").read_text(encoding="utf-8")
    found = json.loads(workshop.stillhouse("compare", "runs", "-f", "json").out)
    assert found["systems"][-1]["rouge_l"] == after["metrics"]["rouge_l"]
    assert "csv" in workshop.stillhouse("compare", "runs", "--format", "excel").err


def test_a_finished_run_is_not_overwritten(workshop: Workshop) -> None:
    assert workshop.stillhouse("run", "run.yaml", "train.max_steps=1").code == 0
    state = workshop.state()
    assert "--resume" in workshop.refused("run", "run.yaml", "train.max_steps=1")
    assert workshop.state() == state


def test_resuming_with_other_values_is_told(workshop: Workshop) -> None:
    assert workshop.stillhouse("run", "run.yaml", "train.max_steps=2").code == 0
    said = workshop.stillhouse("run", "run.yaml", "train.max_steps=3", "--resume")
    assert said.code == 0
    assert "train.max_steps (2 -> 3)" in said.err
    assert workshop.stillhouse("run", "run.yaml", "train.max_steps=3", "--resume").code == 0
    assert workshop.stillhouse("run", "run.yaml", "train.max_steps=3", "train.lr=1", "--resume").code == 2
    kept = [one["changed"] for one in workshop.state()["segments"]]
    assert kept == [{}, {"train.max_steps": [2, 3]}, {}]
