"""From what a configuration says to a dataset: a path, a mapping, or a list of both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from stillhouse.data.datasets.base import DATASETS, DatasetConfig
from stillhouse.data.datasets.files import COMPRESSIONS
from stillhouse.errors import DataError
from stillhouse.files import locate

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}
_PACKABLE = {"jsonl", "csv", "txt"}


def kind_of(path: str) -> str | None:
    """The kind of file that a path's ending tells."""
    inner = Path(path)
    packed = inner.suffix in COMPRESSIONS
    kind = ENDINGS.get((inner.with_suffix("") if packed else inner).suffix.lower())
    return None if packed and kind not in _PACKABLE else kind


def parse_dataset(value: Any) -> Any:
    """Parse a dataset; the kind of a bare path or of a mapping without a kind follows from the path's ending.
    A list is a mixture.

    Raises:
        PydanticCustomError: the ending is unknown.
    """
    if isinstance(value, list | tuple):
        value = {"kind": "mixture", "sources": list(value)}
    if isinstance(value, str | Path):
        value = {"path": str(value)}
    if not isinstance(value, Mapping) or "kind" in value or not isinstance(value.get("path"), str):
        return DATASETS.parse(value)
    path = value["path"]
    kind = kind_of(path) or ("hf" if locate(path).is_dir() else None)
    if kind is None:
        raise PydanticCustomError(
            "dataset_kind",
            "{path} {problem}",
            {"path": path, "problem": _problem(path)},
        )
    return DATASETS.parse({"kind": kind, **value})


def _problem(path: str) -> str:
    endings = ", ".join((*ENDINGS, *COMPRESSIONS))
    known = f"does not end in one of {endings}"
    if locate(path).is_file():
        return f"{known}; name its kind, such as {{kind: jsonl, path: {path}}}"
    if re.fullmatch(r"[\w-]+/[\w.-]+", path) and not Path(path.partition("/")[0]).is_dir():
        return f"is no folder here; of the hub it is {{kind: hf, path: {path}}}"
    return f"is no folder here, and {known}"


def dataset_at(path: str | Path) -> DatasetConfig:
    """The dataset at a path from the command line.

    Raises:
        DataError: the ending of the path is unknown.
    """
    try:
        dataset: DatasetConfig = parse_dataset(str(path))
    except PydanticCustomError as error:
        known = ", ".join(ENDINGS)
        raise DataError(f"{path}: rows are read from a file that ends in one of {known}") from error
    return dataset


DatasetField = Annotated[SerializeAsAny[DatasetConfig], BeforeValidator(parse_dataset)]
"""The annotation of a config field that holds a dataset."""
