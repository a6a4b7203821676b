"""docs/curation.md is true: its table is that of the classes, its commands and its YAML run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT, script

from stillhouse import commands
from stillhouse.config.strict_yaml import parse
from stillhouse.rollouts import REGISTRY
from stillhouse.rollouts.offline.stage_files import read_rows

PAGE = ROOT / "docs" / "curation.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_table_of_filters_is_up_to_date() -> None:
    assert script(ROOT / "docs" / "build_curation.py").pages()["curation.md"] == TEXT, "run: make docs"


def test_every_option_in_yaml_is_one() -> None:
    for text in blocks("yaml"):
        values, _ = parse(text, "docs/curation.md")
        assert REGISTRY.parse(values["responses"]).kind == "pairs"


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = next(text for text in blocks("yaml") if text.startswith("# rounds.yaml"))
    small = run.replace("limit: 48", "limit: 12").replace("batch_size: 16", "batch_size: 4")  # to be quick
    Path("rounds.yaml").write_text(small, encoding="utf-8")
    commands = [line for text in blocks("console") for line in text.splitlines()]
    assert len(commands) == 8
    for command in commands:
        assert code_of(command, monkeypatch) == 0, f"{command}\n{capfd.readouterr().err}"
    kept, dropped = (len(list(read_rows(Path(name)))) for name in ("kept.jsonl", "kept.dropped.jsonl"))
    assert (kept + dropped, kept > 0, dropped > 0) == (24, True, True)
    assert 0 < len(list(read_rows(Path("aggregation.jsonl")))) <= 8


def code_of(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    try:
        commands.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0
