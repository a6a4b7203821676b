"""Rules of the house that a syntax tree can hold."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse import objectives, rollouts, teachers
from tests.conftest import ROOT

SOURCE = ROOT / "src" / "stillhouse"
LONGEST_FUNCTION = 60
FAMILIES = {"objectives": objectives.REGISTRY, "rollouts": rollouts.REGISTRY, "teachers": teachers.REGISTRY}
RUNNING = re.compile(r"\w+(Policy|Teacher)$")
"""What the running form of a policy or a teacher is called."""


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0]


def concrete(room: str) -> set[str]:
    """The registered classes of a room, and the running policies and teachers that they build."""
    registered = {FAMILIES[room][kind].__name__ for kind in FAMILIES[room].kinds()}
    for path, tree in trees():
        if room_of(path) == room:
            registered |= {
                node.name
                for node in tree.body
                if isinstance(node, ast.ClassDef)
                and RUNNING.match(node.name)
                and not any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
            }
    return registered


@pytest.mark.parametrize("room", FAMILIES)
def test_no_concrete_part_is_named_outside_its_room(room: str) -> None:
    names = concrete(room)
    assert len(names) > 2
    found = []
    for path, tree in trees():
        if room_of(path) == room:
            continue
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
            if name in names:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")  # type: ignore[attr-defined]
    assert not found, "ask for what it requires or provides instead"


def test_a_class_name_exists_once() -> None:
    names = Counter(
        node.name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long


def test_the_page_on_the_architecture_lists_the_folders_there_are() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(
        re.findall(r"^ +([a-z_]+)/ ", page.partition("```\nsrc/stillhouse/")[2].partition("```")[0], re.M)
    )
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert listed == folders
