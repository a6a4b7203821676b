"""What the README shows is true: its YAML runs, its Python runs, its tables are up to date."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT, script

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def tables() -> ModuleType:
    return script(ROOT / "docs" / "readme.py")


def test_the_yaml_and_the_python_example_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (yaml,), (python,) = blocks("yaml"), blocks("python")
    (tmp_path / "run.yaml").write_text(yaml, encoding="utf-8")
    names: dict[str, object] = {}
    exec(compile(python, "README.md", "exec"), names)
    result = names["result"]
    assert result.state == "done"  # type: ignore[attr-defined]
    assert (tmp_path / "runs" / "small" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "runs" / "small" / "student" / "model.safetensors").exists()


def test_the_tables_are_up_to_date() -> None:
    assert tables().filled(README) == README, "run: python docs/readme.py"


def test_every_command_that_the_readme_names_exists() -> None:
    import typer.main

    from stillhouse.commands.app import app

    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"^stillhouse (\w+)", "\n".join(blocks("console")), flags=re.MULTILINE))
    assert named
    assert named <= verbs
