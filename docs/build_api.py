"""Writes docs/api.md: every public name with its arguments, from signatures and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import stillhouse

PAGE = """# Public names

This page is generated from docstrings by `python docs/build.py`; edit those. [python.md](python.md) shows
how they are used.

What is listed here keeps its names and meaning within a minor version. Everything else may move.

{sections}
"""

MODULES = {
    "stillhouse": sorted(name for name in dir(stillhouse) if name != "__version__"),
    "stillhouse.objectives": ["build"],
    "stillhouse.trl": ["GKDConfig", "GKDTrainer", "DistillationConfig", "DistillationTrainer"],
    "stillhouse.errors": [],
}
"""Module -> its names, in the order of the page; none: all classes that it defines."""
HEADING = re.compile(r"^(Args|Returns|Raises|Example|Yields):(.*)$")


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    return {"api.md": PAGE.format(sections="\n\n".join(sections()))}


def sections() -> Iterator[str]:
    """The text of each module."""
    for module, names in MODULES.items():
        loaded = importlib.import_module(module)
        names = names or [name for name, one in vars(loaded).items() if _is_own_class(one, module)]
        entries = [entry(f"{module}.{name}", getattr(loaded, name)) for name in names]
        yield "\n\n".join([f"## {module}", *entries])


def _is_own_class(one: Any, module: str) -> bool:
    return inspect.isclass(one) and one.__module__ == module


def entry(name: str, one: Any) -> str:
    """The heading, signature and documentation of one name."""
    if inspect.ismodule(one):
        return f"### {name}\n\n{_text(one)}"
    parts = [f"### {name}", f"```python\n{signature(name, one)}\n```", _text(one)]
    if inspect.isclass(one):
        parts += [rows] if (rows := fields(one)) else []
        parts += [rows] if (rows := methods(one)) else []
        if (
            "__init__" in vars(one)
            and (own := inspect.getdoc(one.__init__))
            and not dataclasses.is_dataclass(one)
        ):
            parts.insert(3, markdown(own))
    return "\n\n".join(filter(None, parts))


def signature(name: str, one: Any) -> str:
    """The call as one writes it; of dataclasses the fields of its own, which follow as a table."""
    short = name.rpartition(".")[2]
    if dataclasses.is_dataclass(one) or issubclass_of_error(one):
        return f"{short}(...)"
    parameters = [
        parameter for parameter in inspect.signature(one).parameters.values() if parameter.name != "self"
    ]
    inner = ", ".join(map(_parameter, parameters))
    if len(inner) > 90:
        inner = "\n" + "".join(f"    {_parameter(parameter)},\n" for parameter in parameters)
    return f"{short}({inner})"


def issubclass_of_error(one: Any) -> bool:
    """Whether it is an error, whose arguments nobody gives."""
    return inspect.isclass(one) and issubclass(one, BaseException)


def _parameter(parameter: inspect.Parameter) -> str:
    prefix = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
    value = parameter.default
    default = "" if value is parameter.empty else "=" + repr(value).replace("'", '"')
    return f"{prefix}{parameter.name}{default}"


def fields(one: type) -> str:
    """The table of the fields that a dataclass documents by a string beneath each."""
    if not dataclasses.is_dataclass(one):
        return ""
    lines = []
    for name, default, text in documented_fields(one):
        lines.append(f"| `{name}` | {default} | {text} |")
    return "\n".join(["| field | default | |", "|---|---|---|", *lines]) if lines else ""


def documented_fields(one: type) -> Iterator[tuple[str, str, str]]:
    """(name, default, text) of the fields that are written in the class itself."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
    assert isinstance(node, ast.ClassDef)
    for index, item in enumerate(node.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        following = node.body[index + 1] if index + 1 < len(node.body) else None
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = _one_line(str(following.value.value))
        text = text or _inherited(one, item.target.id)
        default = "" if item.value is None else f"`{ast.unparse(item.value)}`".replace("|", "\\|")
        yield item.target.id, default.replace("`field(default_factory=dict)`", "`{}`"), text


def _inherited(one: type, name: str) -> str:
    """What a parent class in this package says of a field that the class gives another default."""
    for parent in one.__mro__[1:]:
        if parent.__module__.startswith("stillhouse") and dataclasses.is_dataclass(parent):
            for found, _, text in documented_fields(parent):
                if found == name and text:
                    return text
    return ""


def methods(one: type) -> str:
    """The public methods that a class defines itself, with the first line of each."""
    lines = [
        f"- `.{name}`: {_one_line((inspect.getdoc(member) or '').split(chr(10) * 2)[0])}"
        for name, member in vars(one).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    ]
    return "\n".join(lines)


def _text(one: Any) -> str:
    return markdown(inspect.getdoc(one) or "")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def markdown(docstring: str) -> str:
    """A docstring with its sections as lists and blocks of code."""
    done: list[str] = []
    lines = docstring.split("\n")
    place = 0
    while place < len(lines):
        found = HEADING.match(lines[place])
        if found is None:
            done.append(lines[place])
            place += 1
            continue
        inside = []
        place += 1
        while place < len(lines) and (not lines[place].strip() or lines[place].startswith(" ")):
            inside.append(lines[place])
            place += 1
        done.append(_section(found[1], found[2].strip(), textwrap.dedent("\n".join(inside)).strip()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(done)).strip()


def _section(name: str, rest: str, inside: str) -> str:
    if name == "Example":
        code = rest.strip("`") or inside
        return f"\n```python\n{code}\n```\n"
    if name == "Returns":
        return f"\nReturns: {_one_line(f'{rest} {inside}')}\n"
    items = re.split(r"\n(?=\S)", inside)
    told = [re.sub(r"^(\*{0,2}\w+): ", r"- `\1`: ", _one_line(item)) for item in items]
    return f"\n{name}:\n\n" + "\n".join(told) + "\n"
