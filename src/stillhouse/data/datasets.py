"""Datasets on disk: JSON Lines, Parquet, Hugging Face datasets, plain text files."""

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
from stillhouse.data.formats import read_row
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import DataError, EnvironmentFault
from stillhouse.files import PACKAGE, STAGE, locate

LocatedRow = tuple[str, Mapping[str, Any]]
"""The location of a row ("train.jsonl:17"), and the row as the file has it."""


class DatasetConfig(StrictConfig):
    """A dataset. A bare path is enough if its ending tells the kind: `train: data/train.jsonl`."""

    kind: str
    path: str
    """A file or folder, relative to the working directory; `package:NAME/inner/path` looks inside an
    installed Python package."""
    fields: Fields = Fields()
    """Which field of a row holds what; only needed for rows in none of the known formats."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Number of rows to read, from the first; default: all."""
    labelled: Annotated[int, Field(ge=0)] | None = None
    """Number of rows, from the first, that keep their response; the others become prompts without one."""
    each_output: bool = False
    """Make one example of each output of a row; by default the first output is the response and all of them
    are references."""
    skip_broken: bool = False
    """Skip and count lines that cannot be parsed, instead of stopping at the first."""

    @abstractmethod
    def raw(self, counts: Counter[str]) -> Iterator[LocatedRow]:
        """The rows as the file has them; skipped lines are counted under "broken"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest of the content."""

    def rows(self, counts: Counter[str]) -> Iterator[Row]:
        """The parsed rows, with `limit` and `labelled` applied.

        Args:
            counts: receives the counts "rows", "broken" and "unlabelled".

        Raises:
            DataError: the file is missing, a line cannot be parsed or a row has no known format.
        """
        for location, raw in self.raw(counts):
            if self.limit is not None and counts["rows"] >= self.limit:
                return
            counts["rows"] += 1
            row = read_row(raw, self.fields, location)
            if self.labelled is not None and counts["rows"] > self.labelled:
                counts["unlabelled"] += row.has_response
                row = row.without_response()
            yield row


DATASETS: Registry[DatasetConfig] = Registry("dataset kind", DatasetConfig)  # type: ignore[type-abstract]


class _FileDataset(DatasetConfig):
    def found(self) -> Path:
        """The file on disk.

        Raises:
            DataError: there is no such file; the message suggests one with a similar name.
        """
        path = locate(self.path)
        if path.is_dir():
            raise DataError(
                f"{path}: is a folder, but {self.kind} needs a file; for a saved dataset: kind: hf"
            )
        if not path.is_file():
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{path}: no such file{nearest(path.name, beside)}")
        return path

    def fingerprint(self) -> str:
        with open(self.found(), "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    def text(self) -> str:
        """The whole file, decompressed if its name ends in .gz."""
        path = self.found()
        content = path.read_bytes()
        try:
            return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{path}:{line}: is not UTF-8 text ({error.reason}); convert the file") from error
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: cannot be unpacked ({error})") from error


@DATASETS.register
class JsonLines(_FileDataset):
    """One JSON object per line (.jsonl, .jsonl.gz), or one JSON list of objects (.json)."""

    kind: Literal["jsonl"] = "jsonl"

    def raw(self, counts: Counter[str]) -> Iterator[LocatedRow]:
        text, path = self.text(), self.found()
        if text.lstrip().startswith("["):
            yield from self._list(text, path)
            return
        staged = False
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                row = json.loads(line)
                problem = None if isinstance(row, dict) else f"is a JSON {type(row).__name__}, not an object"
            except json.JSONDecodeError as error:
                problem = f"is not JSON ({error.msg} at column {error.colno})"
            if problem is None and _has_lone_surrogate(line, row):
                problem = "holds half of a surrogate pair, which is no character"
            if problem is None and STAGE in row:
                staged = True  # the header of a file that `stillhouse generate` or `curate` wrote
            elif problem is None:
                yield location, _without_stage_fields(row) if staged else row
            elif self.skip_broken:
                counts["broken"] += 1
            else:
                raise DataError(f"{location}: {problem}: {line:.60}. Fix the line, or set skip_broken: true")

    @staticmethod
    def _list(text: str, path: Path) -> Iterator[LocatedRow]:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg})") from error
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise DataError(f"{path}: item {number} is not an object: {row!r:.60}")
            if _has_lone_surrogate(text, row):
                raise DataError(
                    f"{path}: item {number} holds half of a surrogate pair, which is no character"
                )
            yield f"{path}[{number}]", row


def _has_lone_surrogate(text: str, row: Any) -> bool:
    """Whether a JSON value has half of a surrogate pair (an emoji cut in two), which UTF-8 cannot encode."""
    if "\\ud" not in text and "\\uD" not in text:
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _without_stage_fields(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a stage file as a dataset row: without token ids and scores."""
    return {name: row[name] for name in ("prompt", "input", "tools", "response") if name in row} | row.get(
        "facts", {}
    )


@DATASETS.register
class Parquet(_FileDataset):
    """A Parquet file."""

    kind: Literal["parquet"] = "parquet"

    def raw(self, counts: Counter[str]) -> Iterator[LocatedRow]:
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


@DATASETS.register
class HuggingFace(DatasetConfig):
    """A dataset of the `datasets` library: a `save_to_disk` folder, or what `load_dataset` accepts."""

    kind: Literal["hf"] = "hf"
    subset: str | None = None
    """The name of the dataset's configuration, if it has several."""
    split: str = "train"
    revision: str | None = None
    """The revision of a dataset on the hub. Set it, or results cannot be reproduced."""

    def found(self) -> Path:
        """The folder on disk; `path` itself if it may be a name on the hub.

        Raises:
            DataError: it looks like a folder and does not exist.
        """
        folder = locate(self.path)
        looks_local = self.path.startswith((PACKAGE, "/", ".", "~")) or self.path.count("/") > 1
        if looks_local and not folder.exists():
            beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise DataError(f"{self.path}: no such folder{nearest(folder.name, beside)}")
        return folder

    def load(self) -> Any:
        """The `datasets.Dataset`.

        Raises:
            DataError: there is no such dataset, subset or split.
            EnvironmentFault: it has to be downloaded and the hub cannot be reached.
        """
        import datasets
        from datasets.exceptions import DatasetNotFoundError

        folder = self.found()
        saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
        try:
            if not saved:
                return datasets.load_dataset(
                    str(folder) if folder.exists() else self.path,
                    self.subset,
                    split=self.split,
                    revision=self.revision,
                )
            loaded = datasets.load_from_disk(str(folder))
        except (DatasetNotFoundError, ValueError, FileNotFoundError) as error:
            raise DataError(f"{self.path}: cannot be loaded as a dataset: {error}") from error
        except (ConnectionError, OSError) as error:
            raise EnvironmentFault(f"{self.path}: the dataset could not be downloaded: {error}") from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if self.split not in loaded:
            raise DataError(
                f"{self.path}: has no split {self.split!r}{nearest(self.split, list(loaded))}; "
                f"allowed: {', '.join(loaded)}"
            )
        return loaded[self.split]

    def raw(self, counts: Counter[str]) -> Iterator[LocatedRow]:
        for number, row in enumerate(self.load(), start=1):
            yield f"{self.path}[{self.split}:{number}]", row

    def fingerprint(self) -> str:
        return hashlib.sha256(str(self.load()._fingerprint).encode()).hexdigest()


@DATASETS.register
class PlainText(_FileDataset):
    """A text file as one document, for the language-model loss on `data.text`."""

    kind: Literal["txt"] = "txt"

    def raw(self, counts: Counter[str]) -> Iterator[LocatedRow]:
        yield str(self.found()), {"text": self.text()}


_ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt"}


def parse_dataset(value: Any) -> Any:
    """Parse a dataset; the kind of a bare path or of a mapping without a kind follows from the path's ending.

    Raises:
        PydanticCustomError: the ending is unknown.
    """
    if isinstance(value, str | Path):
        value = {"path": str(value)}
    if not isinstance(value, Mapping) or "kind" in value or not isinstance(value.get("path"), str):
        return DATASETS.parse(value)
    path = value["path"]
    kind = _ENDINGS.get(Path(path.removesuffix(".gz")).suffix) or ("hf" if locate(path).is_dir() else None)
    if kind is None:
        raise PydanticCustomError(
            "dataset_kind",
            "{path} does not end in one of {endings}; name its kind, such as {kind: hf, path: {path}}",
            {"path": path, "endings": ", ".join(_ENDINGS)},
        )
    return DATASETS.parse({"kind": kind, **value})


def dataset_at(path: str | Path) -> DatasetConfig:
    """The dataset at a path from the command line.

    Raises:
        DataError: the ending of the path is unknown.
    """
    try:
        dataset: DatasetConfig = parse_dataset(str(path))
    except PydanticCustomError as error:
        known = ", ".join(_ENDINGS)
        raise DataError(f"{path}: rows are read from a file that ends in one of {known}") from error
    return dataset


DatasetField = Annotated[SerializeAsAny[DatasetConfig], BeforeValidator(parse_dataset)]
"""The annotation of a config field that holds a dataset."""
