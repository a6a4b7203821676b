"""Strict YAML: no duplicate keys, numbers as people write them, and the line of every value.

Scalars follow the core schema of YAML 1.2: `1e-5` is a float; `yes`, `on` and dates are strings.
Underscores in integers (`65_536`) are allowed. Tags and merge keys are not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from stillhouse.config.strict import nearest
from stillhouse.errors import ConfigError
from stillhouse.files import name_problem, require_regular

MAX_BYTES = 1 << 19
"""Of a file: a configuration of every setting has some ten thousand."""
MAX_VALUES, MAX_DEPTH = 50_000, 40
"""Of what a file stands for: an alias (`*name`) counts as what it repeats."""

Key = str | int
KeyPath = tuple[Key, ...]
"""The path of a value from the root: keys of mappings and indices of lists."""

_CORE = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)
_TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """A safe loader that resolves the scalars of the core schema only."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _name, _pattern, _first in _CORE:
    Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))


def read(path: str | Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The mapping in a YAML file, and the origin ("run.yaml:12") of every value in it.

    Raises:
        ConfigError: the file is missing, is not UTF-8, is not YAML, is empty, or is not a mapping.
    """
    path = Path(path)
    return parse(_text(path), str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """As `read`, from a string; `name` is the file in origins and messages."""
    builder = _Builder(name, text)
    node = builder.compose()
    if node is None:
        raise ConfigError(f"{name}: is empty; it should hold a mapping, such as student: {{path: FOLDER}}")
    if not isinstance(node, MappingNode):
        raise builder.fault(node, "should be a mapping (name: value) at the top")
    return builder.build(node, ()), builder.origins


def parse_value(text: str) -> Any:
    """One value, as on the right of `a.b=value`; an empty string is null.

    Raises:
        ConfigError: it is not YAML.
    """
    builder = _Builder("value", text)
    node = builder.compose()
    return None if node is None else builder.build(node, ())


def _text(path: Path) -> str:
    if (problem := name_problem(str(path))) is not None:
        raise ConfigError(f"{str(path)[:60]!r}: {problem}")
    require_regular(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.yaml"))
        raise ConfigError(
            f"{path}: is a folder, not a YAML file" + (f"; in it: {', '.join(inside)}" if inside else "")
        )
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError(
                f"{path}: has {size:,} bytes; a configuration has at most {MAX_BYTES:,}. Rows of data go "
                "into files of their own, which data.train names."
            )
        content = path.read_bytes()
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) or (" (nor its folder)" if not path.parent.is_dir() else "")
        raise ConfigError(f"{path}: no such file{hint}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text (byte {content[error.start]:#04x})") from error


class _Builder:
    """Turns YAML nodes into values and records their lines."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.lines = text.splitlines()
        self.origins: dict[KeyPath, str] = {}
        self._open: list[Node] = []

    def compose(self) -> Node | None:
        try:
            self.loader = Loader(self.text)
            return self.loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = self._position(mark.line, mark.column) if mark else self.name
            raise ConfigError(f"{where}: is not YAML: {error.problem}{self._excerpt(mark)}") from error
        except yaml.reader.ReaderError as error:
            before = self.text[: error.position]
            where = self._position(before.count("\n"), 0)
            raise ConfigError(
                f"{where}: a character that YAML does not allow ({error.character:#x})"
            ) from error
        except RecursionError as error:
            raise ConfigError(f"{self.name}: is not YAML that is read: it is nested too deeply") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.name}: is not YAML: {error}") from error

    def build(self, node: Node, path: KeyPath) -> Any:
        if len(path) > MAX_DEPTH:
            raise self.fault(node, f"is nested more than {MAX_DEPTH} deep")
        if len(self.origins) >= MAX_VALUES:
            raise self.fault(
                node, f"brings the configuration to more than {MAX_VALUES:,} values, with what aliases repeat"
            )
        self.origins[path] = f"{self.name}:{node.start_mark.line + 1}"
        if any(node is outer for outer in self._open):
            raise self.fault(node, "contains itself")
        self._open.append(node)
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            if isinstance(node, SequenceNode):
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                raise self.fault(key_node, "a name should be text; write it in quotes")
            if key in values:
                first = self.origins[(*path, key)]
                raise self.fault(key_node, f"the key {key!r} is given twice, first at {first}")
            values[key] = self.build(value_node, (*path, key))
            self.origins[(*path, key)] = f"{self.name}:{key_node.start_mark.line + 1}"
        return values

    def _scalar(self, node: Node) -> Any:
        if node.tag.removeprefix(_TAG) not in ("str", "bool", "null", "int", "float"):
            raise self.fault(node, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed")
        try:
            if node.tag == _TAG + "int":
                return int(node.value.replace("_", ""))
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.fault(node, f"cannot be read: {error}") from error

    def fault(self, node: Node, problem: str) -> ConfigError:
        mark = node.start_mark
        return ConfigError(f"{self._position(mark.line, mark.column)}: {problem}{self._excerpt(mark)}")

    def _position(self, line: int, column: int) -> str:
        return f"{self.name}:{line + 1}:{column + 1}"

    def _excerpt(self, mark: yaml.Mark | None) -> str:
        if mark is None or mark.line >= len(self.lines):
            return ""
        return f"\n    {self.lines[mark.line].expandtabs(1)}\n    {' ' * mark.column}^"
