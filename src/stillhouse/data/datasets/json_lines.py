"""JSON: an object a line, a list of objects, or an object that holds such a list."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from stillhouse.data.datasets.base import DATASETS, LocatedRow
from stillhouse.data.datasets.files import FileDataset, decoded, opened, wrong_encoding
from stillhouse.data.formats import format_of
from stillhouse.data.formats.base import CUT
from stillhouse.data.reading import Reading
from stillhouse.errors import DataError, RowError
from stillhouse.files import STAGE

MAX_DEPTH = 200
"""Lists and objects inside of one another in one row."""

_STAGE_FIELDS = ("prompt", "input", "tools", "images", "response", "chosen", "rejected", "margin")


@DATASETS.register
class JsonLines(FileDataset):
    """One JSON object per line (.jsonl, .ndjson), one JSON list of objects, or an object with one such list
    as `{"data": [...]}` (.json). Lines are read one after the other."""

    kind: Literal["jsonl"] = "jsonl"

    def rows_of(self, path: Path, reading: Reading) -> Iterator[LocatedRow]:
        """The objects of one file; of a file of `stillhouse generate` or `curate`, what its rows hold."""
        staged = False
        for location, row in self._objects(path, reading):
            if STAGE in row:
                staged = True  # the header
            else:
                yield location, row_of_stage(row) if staged else row

    def _objects(self, path: Path, reading: Reading) -> Iterator[LocatedRow]:
        with opened(path) as handle:
            lines = ((number, line) for number, line in enumerate(handle, start=1) if line.strip())
            first = next(lines, None)
            if first is None:
                return
            second = next(lines, None)
            if self._is_one_value(first[1], alone=second is None):
                whole = b"".join(line for _, line in chain((first, second) if second else (first,), lines))
                yield from self._values(path, whole, first[0], reading)
                return
            for number, line in chain((first, second) if second else (first,), lines):
                try:
                    yield f"{path}:{number}", parse_object(line, f"{path}:{number}")
                except RowError as error:
                    reading.drop(error)

    def _is_one_value(self, line: bytes, alone: bool) -> bool:
        """Whether a file that begins with this line is one JSON value and not an object a line."""
        start = line.removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"["):
            return True
        if alone:
            try:
                row = parse_object(line, "")
            except RowError:
                return False
            return STAGE not in row and (_are_columns(row) or format_of(row, self.fields) is None)
        return start.rstrip() == b"{" or (start.startswith(b"{") and not _is_json(line))

    def _values(self, path: Path, content: bytes, line: int, reading: Reading) -> Iterator[LocatedRow]:
        """The objects of a file that is one JSON value; of broken lines, those that are not broken."""
        try:
            value = _parsed(decoded(content), f"{path}:{line}")
        except UnicodeDecodeError as error:
            number = line + error.object[: error.start].count(b"\n")
            raise DataError(f"{path}:{number}: {wrong_encoding(error)}") from error
        except RowError:
            if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise
            for number, one in enumerate(content.split(b"\n"), start=line):
                if one.strip():
                    try:
                        yield f"{path}:{number}", parse_object(one, f"{path}:{number}")
                    except RowError as error:
                        reading.drop(error)
            return
        rows = self._rows_in(value, path)
        for number, row in enumerate(rows, start=1):
            location = f"{path}:{line}" if rows == [value] else f"{path}[{number}]"
            if isinstance(row, dict):
                yield location, row
            else:
                reading.drop(RowError(location, f"is not an object: {row!r:.60}", "not an object"))

    def _rows_in(self, value: Any, path: Path) -> list[Any]:
        """The list of rows: the value itself, or the one list of objects in it."""
        if isinstance(value, list):
            return value
        if _are_columns(value):
            raise DataError(
                f"{path}: holds columns, as pandas writes them; write rows: "
                "to_json(FILE, orient='records', lines=True)"
            )
        if format_of(value, self.fields) is not None:
            return [value]
        lists = {
            name: found
            for name, found in value.items()
            if isinstance(found, list) and found and all(isinstance(one, dict) for one in found)
        }
        chosen = "data" if "data" in lists else next(iter(lists), None)
        if chosen is not None and (len(lists) == 1 or chosen == "data"):
            return list(lists[chosen])
        if lists:
            raise DataError(f"{path}: has several lists of rows: {', '.join(lists)}; name one of them data")
        return [value]


def parse_object(line: bytes, location: str) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        RowError: there is none, or it holds what no row may.
    """
    try:
        text = decoded(line)
    except UnicodeDecodeError as error:
        raise RowError(location, wrong_encoding(error), "not UTF-8") from error
    value = _parsed(text, location)
    if not isinstance(value, dict):
        raise RowError(
            location, f"is a JSON {type(value).__name__}, not an object: {text.strip():.60}", "not an object"
        )
    return value


class _TwiceNamed(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceNamed(next(name for name in names if names.count(name) > 1))
    return found


def _parsed(text: str, location: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        shown = text.strip()[:60]
        place = f"at column {error.colno}" if error.lineno == 1 else f"at line {error.lineno}"
        raise RowError(location, f"is not JSON ({error.msg} {place}): {shown}", "not JSON") from error
    except _TwiceNamed as error:
        raise RowError(location, f"has the key {str(error)!r} twice", "a key twice") from error
    except RecursionError as error:
        raise RowError(location, _TOO_DEEP, "nested too deeply") from error
    except ValueError as error:  # Python's limit of digits
        raise RowError(
            location, f"holds a number that is too long ({error})", "number with too many digits"
        ) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise RowError(location, _TOO_DEEP, "nested too deeply")
    if _has_lone_surrogate(text, value):
        raise RowError(
            location, "holds half of a surrogate pair, which is no character", "half of a surrogate pair"
        )
    return value


_TOO_DEEP = f"has lists or objects nested more than {MAX_DEPTH} deep"


def _is_deep(value: Any) -> bool:
    """Whether a value has more than `MAX_DEPTH` levels, not counting a list of rows and its rows."""
    level = [value]
    for _ in range(MAX_DEPTH + 2):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _has_lone_surrogate(text: str, row: Any) -> bool:
    """Whether a JSON value has half of a surrogate pair (an emoji cut in two), which UTF-8 cannot encode."""
    if "\\ud" not in text and "\\uD" not in text:
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _are_columns(value: Mapping[str, Any]) -> bool:
    """Whether an object is a table by columns, each `{"0": ..., "1": ...}`."""
    return bool(value) and all(isinstance(one, dict) and "0" in one for one in value.values())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def row_of_stage(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a stage file as a dataset row: without token ids and scores."""
    cut = {name: False for name in CUT if row.get(name) is False}
    facts = {**dict(row.get("facts", {})), **({STAGE: cut} if cut else {})}
    return {name: row[name] for name in _STAGE_FIELDS if name in row} | facts
