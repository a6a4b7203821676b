"""What docs/evaluation.md shows is true: its commands run, its tasks exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex

from tests.conftest import ROOT, script
from tests.workshop import Workshop

from stillhouse.evaluate.tasks import REGISTRY

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_table_of_tasks_is_that_of_the_classes() -> None:
    built = script(ROOT / "docs" / "build_evaluation.py").pages()["evaluation.md"]
    assert built == PAGE, "run: make docs"
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == set(REGISTRY.kinds())


def test_the_python_example_runs() -> None:
    (python,) = blocks("python")
    try:
        exec(
            compile(python, "<docs/evaluation.md>", "exec", dont_inherit=True), {"__name__": "documentation"}
        )
        assert "politeness" in REGISTRY.kinds()
    finally:
        REGISTRY._classes.pop("politeness", None)


def test_the_commands_run(workshop: Workshop) -> None:
    tasks = re.sub(r"limit: 20", "limit: 2", re.sub(r"max_tokens: \d+", "max_tokens: 6", blocks("yaml")[0]))
    tasks = tasks.replace("- cost", "- {kind: cost, repeats: 1, batch_size: 1, new_tokens: 2}")
    tasks = re.sub(r"kind: speculative", "kind: speculative, gammas: [1], sampling: {max_tokens: 6}", tasks)
    (workshop.folder / "tasks.yaml").write_text(tasks, "utf-8")
    for name, model in (("kd", "student"), ("distillm2", "teacher")):
        (workshop.folder / "runs" / name).mkdir(parents=True)
        (workshop.folder / "runs" / name / "student").symlink_to(workshop.folder / model)
        (workshop.folder / "runs" / name / "state.json").write_text('{"state": "done"}', "utf-8")
    commands = [line for block in blocks("console")[:2] for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        said = workshop.stillhouse(*shlex.split(command)[1:])
        assert said.code == 0, said.err
    results = {path.name for path in (workshop.folder / "runs/comparison/kd/evaluation").glob("*.json")}
    names = ("e2e_eval", "e2e_dev", "exact", "fidelity", "curve", "cost")
    both = {f"{system}.{name}.json" for system in ("teacher", "student-after") for name in names}
    assert results == {*both, "student-after.speculative.json"}
