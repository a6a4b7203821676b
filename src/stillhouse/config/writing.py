"""Config trees as YAML: complete, or a commented file to edit. Both load back."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from stillhouse.config.strict import StrictConfig
from stillhouse.config.strict_yaml import Loader
from stillhouse.config.trees import class_of, config_classes, kind_of, plain


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or our own loader would read as another type."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Strings with line breaks or control characters in double quotes, where each can be escaped."""
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dump(value: Any, *, flow: bool = False) -> str:
    """Plain dictionaries, lists and scalars as YAML."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=flow
    )
    return text


def to_yaml(config: StrictConfig) -> str:
    """A config with all of its values, defaults included; loading it gives an equal config."""
    return dump(plain(config))


def commented_yaml(tree: type[StrictConfig], values: Mapping[str, Any]) -> str:
    """A YAML file to edit: the given values, and every other option commented out at its default.

    `#` without a space comments out an option: delete it to set the option. `# ` starts an explanation.
    Loaded unedited, the file gives exactly `values`.

    Args:
        tree: the class of the config.
        values: what is set, as plain dictionaries, lists and scalars.
    """
    return "\n".join(_section(tree, values, "", active=True)) + "\n"


def _section(
    cls: type[StrictConfig], values: Mapping[str, Any], indent: str, *, active: bool
) -> Iterator[str]:
    """The lines of one config: first the options that are set, in the order of the class, then the others."""
    mark = "" if active else "#"
    kind = values.get("kind", kind_of(cls))
    if "kind" in values or (kind is not None and not active):
        yield f"{indent}{mark}kind: {_inline(kind)}"
    fields = {name: info for name, info in cls.model_fields.items() if name != "kind"}
    for name, info in fields.items():
        if name in values:
            yield from _comment(info, indent)
            yield from _field(name, info, values[name], indent, active=active)
    for name in values:
        if name not in fields and name != "kind":
            yield from _value(name, values[name], indent, "")
    for name, info in fields.items():
        if name not in values and not info.is_required():
            yield from _comment(info, indent)
            yield from _field(name, info, info.get_default(call_default_factory=True), indent, active=False)


def _field(name: str, info: FieldInfo, value: Any, indent: str, *, active: bool) -> Iterator[str]:
    mark = "" if active else "#"
    bases = config_classes(info.annotation)
    inner: type[StrictConfig] | None
    if isinstance(value, StrictConfig):
        inner, value = type(value), plain(value)
    else:
        inner = class_of(bases, value) if isinstance(value, Mapping) and value else None
    if inner is None or (active and not value):
        yield from _value(name, plain(value), indent, mark)
        return
    lines = list(_section(inner, value, indent + "  ", active=active))
    if any(not line.lstrip().startswith("# ") for line in lines):
        yield f"{indent}{mark}{name}:"
        yield from lines


def _value(name: str, value: Any, indent: str, mark: str) -> Iterator[str]:
    nested = isinstance(value, Mapping | list) and any(isinstance(v, Mapping | list) for v in _items(value))
    if mark or not nested:
        yield f"{indent}{mark}{name}: {_inline(value)}"
    else:
        yield textwrap.indent(dump({name: value}).rstrip("\n"), indent)


def _items(value: Mapping[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else value


def _inline(value: Any) -> str:
    return dump([value], flow=True).strip()[1:-1]


def _comment(info: FieldInfo, indent: str) -> Iterator[str]:
    words = " ".join((info.description or "").split())
    for line in textwrap.wrap(words, width=max(40, 100 - len(indent))):
        yield f"{indent}# {line}"
