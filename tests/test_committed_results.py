"""What benchmarks have left in the repository is whole: JSON with its origin, pictures that open."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = sorted(
    path for folder in (RESULTS, ROOT / "docs" / "images") for path in folder.iterdir() if path.is_file()
)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_a_result_says_where_it_is_from(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "date", "versions", "rows"} <= found.keys()
    assert {"threads", "device", "platform"} & found.keys()  # the last where nothing is timed


def test_one_module_says_where_results_are_from() -> None:
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if path.name != "_result.py"]
    assert len(scripts) > 20
    assert [path.name for path in scripts if "date.today" in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize(
    "path", [path for path in PICTURES if path.suffix in (".svg", ".png")], ids=lambda path: path.name
)
def test_a_picture_is_whole(path: Path) -> None:
    if path.suffix == ".svg":
        ElementTree.parse(path)
    else:
        assert path.read_bytes().rstrip(b"\0").endswith(b"IEND\xaeB`\x82")
