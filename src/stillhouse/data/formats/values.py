"""Readers of single values of a row: texts, numbers as texts, lists that a file has as JSON text."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from stillhouse.errors import RowError

RawRow = Mapping[str, Any]
"""A row as the file has it."""


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, NaN (which tables have for null), blank text, an empty list."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, Mapping | list | tuple) and not value


def read_string(value: Any, name: str, location: str) -> str:
    """The text in the field `name`; a number as its digits, true and false as JSON spells them.

    Raises:
        RowError: it is null, a list or an object.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{Decimal(repr(value)):f}"
    if value is None:
        raise RowError(location, f"field {name!r} is null, and should be text", "null where text should be")
    raise wrong_type(value, name, location, "text")


def wrong_type(value: Any, name: str, location: str, wanted: str) -> RowError:
    """The error about a value of another type than the wanted one."""
    shown = shortened(value)
    return RowError(
        location,
        f"field {name!r} should be {wanted}, got {type(value).__name__} {shown}",
        "field of another type",
    )


def shortened(value: Any) -> str:
    """The beginning of a value for a message, whatever its size."""
    try:
        text = repr(value[:80] if isinstance(value, str) else value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return f"{text[:77]}..." if len(text) > 80 else text


def parsed_text(value: Any) -> Any:
    """A list or object that the file has as text, in JSON or as Python prints it; other values unchanged.

    Tables (CSV, and parquet files of some tools) have lists this way.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = _python_literal(value) if "{'" in value or "['" in value else None
    return found if isinstance(found, list | dict) else value


def _python_literal(text: str) -> Any:
    """What Python printed as `text`; None if it did not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about escapes in somebody's text
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def as_list(value: Any) -> Any:
    """A list of objects that is in columns, `{"role": [...], "content": [...]}`, as a list of objects.

    The `datasets` library gives sequences of structs this way.
    """
    value = parsed_text(value)
    if not isinstance(value, Mapping) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) for column in columns) or len({len(c) for c in columns}) != 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


def first_filled(raw: RawRow, names: tuple[str, ...]) -> str | None:
    """The first of `names` under which the row has something."""
    return next((name for name in names if name in raw and not is_blank(raw[name])), None)


def other_fields(raw: RawRow, *used: str | None) -> dict[str, Any]:
    """The fields that are not `used`."""
    return {name: value for name, value in raw.items() if name not in used}
