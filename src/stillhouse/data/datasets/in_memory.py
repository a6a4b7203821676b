"""Rows that a Python program holds: a `datasets.Dataset`, or any sequence of dictionaries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from stillhouse.data.datasets import base
from stillhouse.data.datasets.base import DatasetConfig, LocatedRow
from stillhouse.data.datasets.stored_images import with_encoded_images
from stillhouse.data.datasets.tables import table_digest, without_nested_nulls
from stillhouse.data.reading import Reading
from stillhouse.errors import DataError


class InMemory(DatasetConfig):
    """Rows in memory. No YAML file can name it, so it is in no registry.

    Example: `InMemory(name="train_dataset", records=[{"prompt": "A fruit?", "response": "Fig"}])`
    """

    PLACES: ClassVar[frozenset[str]] = frozenset({"name", "records"})
    kind: Literal["memory"] = "memory"
    name: str
    """What messages call it: the argument that it was given as."""
    records: Any = Field(repr=False, exclude=True)
    """The rows, each a mapping; gone through once for each pass."""

    @property
    def title(self) -> str:
        return self.name

    def is_large(self) -> bool:
        """Whether it is a large dataset of the `datasets` library; other rows are in memory anyway."""
        return hasattr(self.records, "_fingerprint") and len(self.records) >= base.LARGE_ROWS

    def content_digest(self) -> str | None:
        """That of a dataset of the `datasets` library."""
        known = hasattr(self.records, "_fingerprint")
        return self.digest_with_settings(table_digest(self.records)) if known else None

    def without_rows(self) -> InMemory:
        """See the base class."""
        return InMemory.model_construct(**{**dict(self), "records": ()})

    def raw(self, reading: Reading) -> Iterator[LocatedRow]:
        """The rows as they are."""
        for number, row in enumerate(with_encoded_images(self.records)):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"{self.name}[{number}]: a row is a {type(row).__name__}; it must be a mapping from "
                    "column to value, as the rows of a datasets.Dataset are"
                )
            yield f"{self.name}[{number}]", without_nested_nulls(dict(row))

    def fingerprint(self) -> str:
        """The library's own fingerprint of a dataset; a digest of other rows."""
        known = getattr(self.records, "_fingerprint", None)
        if known is not None:
            return hashlib.sha256(str(known).encode()).hexdigest()
        digest = hashlib.sha256()
        for row in self.records:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return digest.hexdigest()
