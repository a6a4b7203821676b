"""Where rows come from: JSON Lines, Parquet, Hugging Face data sets, plain text files."""

from __future__ import annotations

import gzip
import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from stillhouse.config import Registry, StrictConfig, nearest
from stillhouse.data.rows import Fields, Row, understand
from stillhouse.errors import DataError, EnvironmentFault
from stillhouse.files import PACKAGE, STAGE, locate

Raw = tuple[str, Mapping[str, Any]]
"""Where a row stands ("train.jsonl:17") and what it holds."""


class SourceConfig(StrictConfig):
    """A set of rows. A bare path is enough where the ending tells the kind: `train: data/train.jsonl`."""

    kind: str
    path: str
    """A file or folder, relative to the working directory; `package:NAME/inner/path` looks inside an
    installed Python package."""
    fields: Fields = Fields()
    """Which field of a row holds what; only needed for rows of a shape that is not understood."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Read only the first so many rows."""
    labelled: Annotated[int, Field(ge=0)] | None = None
    """Keep the responses of only the first so many rows; the others become prompts without a response."""
    each_output: bool = False
    """A row with several outputs becomes one example for each; otherwise the first output is the response
    and all of them are references."""
    skip_broken: bool = False
    """Leave out (and count) lines that cannot be read, instead of stopping at the first."""

    @abstractmethod
    def raw(self, counts: Counter[str]) -> Iterator[Raw]:
        """The rows as they are; lines left out are counted under "broken"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the content; other content gives another digest."""

    def rows(self, counts: Counter[str]) -> Iterator[Row]:
        """The rows, understood, with `limit` and `labelled` applied.

        Args:
            counts: "rows", "broken" and "unlabelled" are counted up in it.

        Raises:
            DataError: the file is missing, a line is broken or a row has a shape that is not understood.
        """
        for where, raw in self.raw(counts):
            if self.limit is not None and counts["rows"] >= self.limit:
                return
            counts["rows"] += 1
            row = understand(raw, self.fields, where)
            if self.labelled is not None and counts["rows"] > self.labelled:
                counts["unlabelled"] += row.response is not None
                row = Row(row.where, row.instruction, row.input, row.messages, text=row.text)
            yield row


SOURCES: Registry[SourceConfig] = Registry("data source", SourceConfig)  # type: ignore[type-abstract]


class _File(SourceConfig):
    def found(self) -> Path:
        """The file on disk.

        Raises:
            DataError: there is no such file; a file of a similar name beside it is named.
        """
        path = locate(self.path)
        if path.is_dir():
            raise DataError(
                f"{path}: is a folder, but {self.kind} needs a file; for a saved data set: kind: hf"
            )
        if not path.is_file():
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{path}: no such file{nearest(path.name, beside)}")
        return path

    def fingerprint(self) -> str:
        with open(self.found(), "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    def text(self) -> str:
        """The whole file, unpacked where its name ends in .gz."""
        path = self.found()
        content = path.read_bytes()
        try:
            return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{path}:{line}: is not UTF-8 text ({error.reason}); convert the file") from error
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: cannot be unpacked ({error})") from error


@SOURCES.register
class JsonLines(_File):
    """One JSON object a line (.jsonl, .jsonl.gz), or a file that is one JSON list of objects (.json)."""

    kind: Literal["jsonl"] = "jsonl"

    def raw(self, counts: Counter[str]) -> Iterator[Raw]:
        text, path = self.text(), self.found()
        if text.lstrip().startswith("["):
            yield from self._list(text, path)
            return
        staged = False
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
                problem = None if isinstance(row, dict) else f"is a JSON {type(row).__name__}, not an object"
            except json.JSONDecodeError as error:
                problem = f"is not JSON ({error.msg} at column {error.colno})"
            if problem is None and _broken_text(line, row):
                problem = "holds half of a surrogate pair, which is no character"
            if problem is None and STAGE in row:
                staged = True  # the header of a file that `stillhouse generate` or `curate` wrote
            elif problem is None:
                yield where, _of_stage(row) if staged else row
            elif self.skip_broken:
                counts["broken"] += 1
            else:
                raise DataError(f"{where}: {problem}: {line:.60}. Mend the line, or set skip_broken: true")

    @staticmethod
    def _list(text: str, path: Path) -> Iterator[Raw]:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg})") from error
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise DataError(f"{path}: item {number} is not an object: {row!r:.60}")
            if _broken_text(text, row):
                raise DataError(
                    f"{path}: item {number} holds half of a surrogate pair, which is no character"
                )
            yield f"{path}[{number}]", row


def _broken_text(source: str, row: Any) -> bool:
    """Whether a JSON value holds half of a surrogate pair (an emoji cut in two), which no UTF-8 can say."""
    if "\\ud" not in source and "\\uD" not in source:
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _of_stage(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a stage file as a row of data: without token ids, scores and numbers."""
    return {name: row[name] for name in ("prompt", "input", "response") if name in row} | row.get("facts", {})


@SOURCES.register
class Parquet(_File):
    """A Parquet file."""

    kind: Literal["parquet"] = "parquet"

    def raw(self, counts: Counter[str]) -> Iterator[Raw]:
        import pyarrow
        import pyarrow.parquet

        path = self.found()
        try:
            file = pyarrow.parquet.ParquetFile(path)
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}[{number}]", row
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


@SOURCES.register
class HuggingFace(SourceConfig):
    """A data set of the `datasets` library: a `save_to_disk` folder, or what `load_dataset` takes."""

    kind: Literal["hf"] = "hf"
    subset: str | None = None
    """The configuration of the data set, where it has several."""
    split: str = "train"
    revision: str | None = None
    """Which version, for a data set on the hub; fix it, or results cannot be repeated."""

    def found(self) -> Path:
        """The folder on disk; the path itself where it may be a name on the hub.

        Raises:
            DataError: it looks like a folder, and there is none.
        """
        place = locate(self.path)
        looks_local = self.path.startswith((PACKAGE, "/", ".", "~")) or self.path.count("/") > 1
        if looks_local and not place.exists():
            beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            raise DataError(f"{self.path}: no such folder{nearest(place.name, beside)}")
        return place

    def load(self) -> Any:
        """The `datasets.Dataset`.

        Raises:
            DataError: no such data set, subset or split.
            EnvironmentFault: it would have to be downloaded and the network does not answer.
        """
        import datasets
        from datasets.exceptions import DatasetNotFoundError

        place = self.found()
        saved = any((place / name).is_file() for name in ("state.json", "dataset_dict.json"))
        try:
            if not saved:
                return datasets.load_dataset(
                    str(place) if place.exists() else self.path,
                    self.subset,
                    split=self.split,
                    revision=self.revision,
                )
            loaded = datasets.load_from_disk(str(place))
        except (DatasetNotFoundError, ValueError, FileNotFoundError) as error:
            raise DataError(f"{self.path}: cannot be loaded as a data set: {error}") from error
        except (ConnectionError, OSError) as error:
            raise EnvironmentFault(f"{self.path}: the data set could not be fetched: {error}") from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if self.split not in loaded:
            raise DataError(
                f"{self.path}: has no split {self.split!r}{nearest(self.split, list(loaded))}; "
                f"allowed: {', '.join(loaded)}"
            )
        return loaded[self.split]

    def raw(self, counts: Counter[str]) -> Iterator[Raw]:
        for number, row in enumerate(self.load(), start=1):
            yield f"{self.path}[{self.split}:{number}]", row

    def fingerprint(self) -> str:
        return hashlib.sha256(str(self.load()._fingerprint).encode()).hexdigest()


@SOURCES.register
class PlainText(_File):
    """A text file as one document, for the language-model loss."""

    kind: Literal["txt"] = "txt"

    def raw(self, counts: Counter[str]) -> Iterator[Raw]:
        yield str(self.found()), {"text": self.text()}


_ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt"}


def parse_source(value: Any) -> Any:
    """A bare path, or a mapping without a kind, gets its kind from the ending of the path.

    Raises:
        PydanticCustomError: the ending says nothing.
    """
    if isinstance(value, str | Path):
        value = {"path": str(value)}
    if not isinstance(value, Mapping) or "kind" in value or not isinstance(value.get("path"), str):
        return SOURCES.parse(value)
    path = value["path"]
    kind = _ENDINGS.get(Path(path.removesuffix(".gz")).suffix) or ("hf" if locate(path).is_dir() else None)
    if kind is None:
        raise PydanticCustomError(
            "source_kind",
            "{path} does not end in one of {endings}; name its kind, such as {kind: hf, path: {path}}",
            {"path": path, "endings": ", ".join(_ENDINGS)},
        )
    return SOURCES.parse({"kind": kind, **value})


def source_at(path: str | Path) -> SourceConfig:
    """The set of rows at a path of the command line.

    Raises:
        DataError: the ending of the path says nothing.
    """
    try:
        found: SourceConfig = parse_source(str(path))
    except PydanticCustomError as error:
        known = ", ".join(_ENDINGS)
        raise DataError(f"{path}: rows are read from a file that ends in one of {known}") from error
    return found


Source = Annotated[SerializeAsAny[SourceConfig], BeforeValidator(parse_source)]
"""The annotation of a config field that holds a set of rows."""
