"""The commands and the YAML of docs/report.md do what the page says."""

from __future__ import annotations

import re
import shlex

import yaml

from tests.conftest import ROOT
from tests.workshop import Workshop

TEXT = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")


def test_the_page_about_runs_is_true(workshop: Workshop) -> None:
    (console,), (text,) = (
        re.findall(rf"```{name}\n(.*?)```", TEXT, flags=re.DOTALL) for name in ("console", "yaml")
    )
    path = workshop.folder / "run.yaml"
    output = yaml.safe_load(path.read_text())["output"] | yaml.safe_load(text)["output"]
    path.write_text(re.sub(r"output: .*", f"output: {output}".replace("False", "false"), path.read_text()))
    for name, recipe in {
        "kd": "kd",
        "distillm2": "distillm2_released",
    }.items():  # its alpha rule needs an epoch
        said = workshop.stillhouse("run", "run.yaml", f"name={name}", f"recipe={recipe}", "train.max_steps=1")
        assert said.code == 0, said.err
    commands = [shlex.split(line, comments=True)[1:] for line in console.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        said = workshop.stillhouse(*command)
        assert said.code == 0, said.err
    assert "toprule" in (workshop.folder / "table.tex").read_text(encoding="utf-8")
    card = (workshop.folder / "runs/kd/student/README.md").read_text(encoding="utf-8")
    assert "teacher: llama3.2" in card
