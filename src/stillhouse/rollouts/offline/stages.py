"""Stage files: rows under a header that says how they came to be, written bit by bit by one process or many.

While it is written, a stage `NAME.jsonl` is one file for each process, `NAME.part-RANK-of-WORLD.jsonl`, to
which finished rows are appended. When every row is there, the parts become `NAME.jsonl`, in the order of the
rows' numbers: whatever the number of processes and however often they were killed, the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError
from stillhouse.files import STAGE, append_jsonl, whole_lines, write_jsonl

FORMAT = 2
_INFORMAL = ("versions",)
"""What a header tells but rows are not refused for."""
_PACKAGES = ("stillhouse", "torch", "transformers", "tokenizers")

Row = dict[str, Any]


def header(stage: str, **facts: Any) -> dict[str, Any]:
    """A header: the kind of stage, the format, versions, and whatever decides what the rows are."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    made = {"stage": stage, "format": FORMAT, **facts, "versions": versions}
    plain: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return plain


class Stale(DataError):
    """A stage file that was made in another way than is asked for."""


class Stage:
    """A stage file, finished or in the making.

    Example:
        >>> stage = Stage(Path("teacher.jsonl"), header("responses", seed=1))
        >>> with stage:
        ...     stage.append([{"number": 0, "response": "Fig"}])
        >>> stage.finish(total=1)
        >>> stage.rows()
    """

    def __init__(self, path: Path, header: Mapping[str, Any], rank: int = 0, world: int = 1) -> None:
        """A stage at `path`.

        Args:
            path: the finished file.
            header: how its rows come to be; files with another header are never used.
            rank: which of `world` processes this one is; each appends to a part of its own.
            world: how many processes write.
        """
        self.path = path
        self.header = dict(header)
        self.part = path.with_name(f"{path.stem}.part-{rank}-of-{world}.jsonl")

    def rows(self) -> list[Row] | None:
        """The rows of the finished file in order; None if it is not there.

        Raises:
            Stale: its header is another one; the message says what differs.
            DataError: somebody changed or damaged it.
        """
        if not self.path.exists():
            return None
        rows = self._fitting(self.path)
        assert rows is not None
        return rows

    def begun(self) -> dict[int, Row]:
        """The finished rows in the parts of all processes, by number. A row that is cut short does not count.

        Raises:
            Stale: a part has another header.
            DataError: a part is damaged.
        """
        rows = [row for part in self.parts() for row in self._fitting(part) or ()]
        return {row["number"]: row for row in rows}

    def parts(self) -> list[Path]:
        """The parts on disk, in the order of their names."""
        start = f"{self.path.stem}.part-"
        if not self.path.parent.is_dir():
            return []
        return sorted(p for p in self.path.parent.iterdir() if p.name.startswith(start))

    def append(self, rows: Sequence[Row]) -> None:
        """Add finished rows to this process's part; the end of an earlier, interrupted writing is cut off."""
        append_jsonl(self.part, *rows, header={STAGE: self.header}, sync=True)

    def finish(self, total: int) -> bool:
        """Make the finished file out of the parts if all `total` rows are there; whether they are."""
        rows = self.begun()
        if len(rows) < total:
            return False
        write_jsonl(self.path, [{STAGE: self.header}, *(rows[number] for number in sorted(rows))])
        for part in self.parts():
            part.unlink(missing_ok=True)
        return True

    def set_aside(self) -> list[tuple[Path, list[str]]]:
        """Rename what has another header, so that it is neither used nor lost.

        Returns:
            The new places, and in what each file differs.
        """
        moved = []
        for path in (self.path, *self.parts()):
            if path.exists() and (differing := differences(self.header, read_header(path))):
                place = _free(path)
                os.replace(path, place)
                moved.append((place, differing))
        return moved

    def _fitting(self, path: Path) -> list[Row] | None:
        """The rows of a file whose header fits; None if it was killed before the header was whole."""
        found = read_header(path)
        if found is None:
            return None
        differing = differences(self.header, found)
        if differing:
            raise Stale(
                f"{path}: was made in another way: {'; '.join(differing)}. Choose another file, or move or "
                "delete this one."
            )
        return list(read_rows(path))


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a stage file; None where the file ends before the header does.

    Raises:
        DataError: the file has no header.
    """
    with open(path, "rb") as handle:
        line = handle.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)[STAGE]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path}: is no stage file: its first line is no header such as {{{STAGE!r}: ...}}.")
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a stage file after its header. A last line that was cut short is left out.

    Raises:
        DataError: another line cannot be read.
    """
    for number, line in enumerate(whole_lines(path)[1:], start=2):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: is damaged ({error}). Delete the file to make it anew."
            ) from None
        yield row


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[str]:
    """What differs between two headers, in words; nothing if `found` ends before its header does."""
    if found is None:
        return []
    one, other = (
        {name: value for name, value in flat(tree).items() if name.split(".")[0] not in _INFORMAL}
        for tree in (wanted, found)
    )
    return [
        f"{name} is {_said(other.get(name))}, not {_said(one.get(name))}"
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    ]


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree of dictionaries, each by its dotted path."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{path}.{key}" if path else str(key))
    return leaves


def _free(path: Path) -> Path:
    places = (path.with_name(f"{path.stem}.stale-{number}.jsonl") for number in range(1, 10_000))
    return next(place for place in places if not place.exists())


def _said(value: Any) -> str:
    return "missing" if value is None else json.dumps(value, ensure_ascii=False)
