"""pydantic's validation errors as `Fault`s: path, problem, value, allowed values, hint and origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from stillhouse.config.layers import Layered
from stillhouse.config.strict import StrictConfig, nearest
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.config.trees import class_at, dotted, kind_of, paths_of_field, variants
from stillhouse.errors import Fault

_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
    "none_required": "nothing (null)",
    "finite_number": "a finite number",
}
_LIMITS = {
    "greater_than": ("must be greater than {gt}", "gt"),
    "greater_than_equal": ("must be at least {ge}", "ge"),
    "less_than": ("must be less than {lt}", "lt"),
    "less_than_equal": ("must be at most {le}", "le"),
}


def to_faults(error: ValidationError, tree: type[StrictConfig], layered: Layered) -> list[Fault]:
    """Every fault of a validation error once, grouped by path."""
    found: dict[str, list[Fault]] = {}
    for detail in error.errors(include_url=False):
        for fault in _faults(detail, tree, layered):
            same = found.setdefault(fault.path, [])
            if fault not in same:
                same.append(fault)
    return [fault for path in found for fault in _merge_branches(found[path])]


def _merge_branches(same: list[Fault]) -> list[Fault]:
    """Merge the type errors of a union's branches at one path into one fault that allows any of them."""
    typed = [fault for fault in same if fault.problem == _WRONG_TYPE]
    if len(typed) < 2:
        return same
    allowed = " or ".join(dict.fromkeys(fault.allowed or "" for fault in typed))
    first = typed[0]
    one = Fault(first.path, first.problem, first.got, allowed, first.hint, first.origin)
    return [one, *(fault for fault in same if fault not in typed)]


_WRONG_TYPE = "has the wrong type"


def _faults(detail: Any, tree: type[StrictConfig], layered: Layered) -> Iterator[Fault]:
    kind, context = detail["type"], detail.get("ctx", {})
    path = user_path(detail["loc"], layered.values, keep_last=kind in ("missing", "extra_forbidden"))
    nested = getattr(context.get("error"), "faults", None)
    if nested:
        for fault in nested:
            yield _with_full_path(fault, path, layered)
        return
    if kind == "kind_unknown":
        path = (*path, "kind") if isinstance(_value(layered.values, path), Mapping) else path
    origin = layered.origin(path)
    name = dotted(path) or "the configuration"
    if kind == "missing":
        known = class_at(tree, path[:-1], layered.values)
        info = known.model_fields.get(str(path[-1])) if known else None
        about = (info.description or "").split("\n\n")[0].replace("\n", " ") if info else ""
        yield Fault(name, "is missing", hint=about or None, origin=layered.origin(path[:-1]))
    elif kind == "extra_forbidden":
        yield _unknown(path, tree, layered)
    elif kind in _TYPES:
        yield Fault(
            name, _WRONG_TYPE, _formatted(detail["input"]), _TYPES[kind], _hint(detail["input"], kind), origin
        )
    elif kind in _LIMITS:
        problem = _LIMITS[kind][0].format(**context)
        yield Fault(name, problem, got=_formatted(detail["input"]), origin=origin)
    elif kind in ("literal_error", "enum"):
        choices = str(context["expected"])
        names = [choice.strip(" '") for choice in choices.replace(" or ", ", ").split(",")]
        problem = f"is none of the choices{nearest(str(detail['input']), names)}"
        yield Fault(name, problem, _formatted(detail["input"]), choices, origin=origin)
    elif kind == "value_error":
        yield Fault(name, _lowered(str(context.get("error", detail["msg"]))), origin=origin)
    elif kind == "string_pattern_mismatch":
        yield Fault(
            name, "does not match the pattern", _formatted(detail["input"]), context["pattern"], origin=origin
        )
    else:
        self_explanatory = (
            isinstance(detail["input"], Mapping) or "got " in detail["msg"] or kind == "kind_unknown"
        )
        got = None if self_explanatory else _formatted(detail["input"])
        yield Fault(name, _lowered(detail["msg"]), got=got, origin=origin)


def _with_full_path(fault: Fault | str, path: KeyPath, layered: Layered) -> Fault:
    """A fault raised by the validator of the config at `path`, with its path from the root."""
    if isinstance(fault, str):
        return Fault(dotted(path) or "the configuration", fault, origin=layered.origin(path))
    whole = ".".join(text for text in (dotted(path), fault.path) if text)
    keys = tuple(
        int(key) if key.isdigit() else key for key in whole.replace("[", ".").replace("]", "").split(".")
    )
    return Fault(whole, fault.problem, fault.got, fault.allowed, fault.hint, layered.origin(keys))


def _unknown(path: KeyPath, tree: type[StrictConfig], layered: Layered) -> Fault:
    name = str(path[-1])
    owner = class_at(tree, path[:-1], layered.values)
    allowed = [key for key in owner.model_fields if key != "kind"] if owner else []
    if owner is not None and name in allowed:  # the kind was inferred, for example from the ending of a path
        only = f"Only kind {kind_of(owner)} has it."
        return Fault(dotted(path), "does not fit the kind", hint=only, origin=layered.origin(path))
    near = nearest(name, allowed)
    if ":" in name:
        near = ""
    hint = None if near else _meant(name, owner, tree)
    return Fault(
        dotted(path),
        f"unknown key{near}",
        allowed=", ".join(allowed) or None,
        hint=hint,
        origin=layered.origin(path),
    )


def _meant(name: str, owner: type[StrictConfig] | None, tree: type[StrictConfig]) -> str | None:
    """Where an unknown key may belong: in a value, in another kind of the same part, or elsewhere."""
    key, colon, value = name.partition(":")
    if colon:
        return f"A space is missing after the colon: {key}: {value or '...'}"
    if owner is not None and kind_of(owner) is not None:
        family = next(cls for cls in reversed(owner.__mro__[: owner.__mro__.index(StrictConfig)]))
        kinds = [str(kind_of(cls)) for cls in variants(family) if name in cls.model_fields and kind_of(cls)]
        return (
            f"Of kind {kind_of(owner)} there is none; these have it: {', '.join(kinds)}." if kinds else None
        )
    elsewhere = paths_of_field(tree, name)[:3]
    return f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else None


def user_path(loc: tuple[str | int, ...], values: Any, *, keep_last: bool) -> KeyPath:
    """pydantic's location without the elements that it adds for unions and wrappers.

    Args:
        loc: pydantic's location.
        values: the validated values.
        keep_last: keep the last element even if `values` has no such key: a missing or unknown one.
    """
    path: list[str | int] = []
    for index, key in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(values, Mapping) and key in values:
            values = values[str(key)]
        elif isinstance(values, list) and isinstance(key, int) and key < len(values):
            values = values[key]
        elif not (last and keep_last):
            continue
        path.append(key)
    return tuple(path)


def _value(values: Any, path: KeyPath) -> Any:
    for key in path:
        values = values[key]
    return values


def _hint(value: Any, kind: str) -> str | None:
    if value is None and _TYPES[kind] == "a mapping":
        return "Remove the line to have the defaults."
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        try:
            float(value)
        except ValueError:
            return None
        return "Write it without quotes."
    return None


def _formatted(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
