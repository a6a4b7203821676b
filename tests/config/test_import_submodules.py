"""A package that fills a registry: a new component is one new file in it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

PACKAGE = """
from stillhouse.config import Registry, StrictConfig, import_submodules

class Colour(StrictConfig):
    kind: str

COLOURS = Registry("colour", Colour)
import_submodules(__name__)
"""
MODULE = """
from typing import Literal
from {package} import COLOURS, Colour

@COLOURS.register
class {cls}(Colour):
    kind: Literal["{kind}"] = "{kind}"
"""


def test_every_module_of_the_package_registers_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "colours_for_test"
    package.mkdir()
    (package / "__init__.py").write_text(PACKAGE)
    for cls in ("Red", "Blue"):
        (package / f"{cls.lower()}.py").write_text(
            MODULE.format(package="colours_for_test", cls=cls, kind=cls.lower())
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        colours = importlib.import_module("colours_for_test").COLOURS
        assert colours.kinds() == ("blue", "red")
        assert type(colours.parse("red")).__name__ == "Red"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "colours_for_test"]:
            del sys.modules[name]
