"""What docs/python.md shows runs, and it names exactly what is public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import stillhouse
from stillhouse.objectives import REGISTRY
from tests.conftest import ROOT, script

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_code_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
            exec(compile(block, "python.md", "exec", dont_inherit=True), names)
        assert "unsure_tokens" in REGISTRY.kinds()
    finally:
        REGISTRY._classes.pop("unsure_tokens", None)  # the other tests are about the package's own
    assert (tmp_path / "runs" / "small" / "student" / "config.json").exists()


def test_every_public_name_is_on_the_page_and_nothing_else_is_public() -> None:
    named = set(re.findall(r"^\| `stillhouse\.(\w+)", PAGE, flags=re.MULTILINE))
    assert named == set(dir(stillhouse)) - {"__version__"}
    assert all(getattr(stillhouse, name) is not None for name in named)


def test_the_page_of_public_names_is_as_the_docstrings_have_it() -> None:
    (page,) = script(ROOT / "docs" / "build_api.py").pages().values()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == page, "run: make docs"
    assert re.findall(r"^\| `\w+` \| .* \|  \|$", page, flags=re.MULTILINE) == [], "fields that say nothing"
    for name in set(dir(stillhouse)) - {"__version__"}:
        assert f"### stillhouse.{name}\n" in page
