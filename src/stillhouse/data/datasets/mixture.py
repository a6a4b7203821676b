"""Several datasets as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import model_validator

from stillhouse.config import ListOf
from stillhouse.data.datasets.base import DATASETS, DatasetConfig, LocatedRow
from stillhouse.data.datasets.parse import DatasetField
from stillhouse.data.reading import Reading


@DATASETS.register
class Mixture(DatasetConfig):
    """Several datasets, one after the other, each as often as its `weight` says: what a list of datasets is
    read as."""

    kind: Literal["mixture"] = "mixture"
    sources: ListOf[DatasetField]
    """The datasets, each with its own fields, limit and weight."""

    @property
    def title(self) -> str:
        return ", ".join(source.title for source in self.sources)

    @model_validator(mode="after")
    def _options_belong_to_the_sources(self) -> Self:
        if not self.sources:
            raise ValueError("a list of datasets needs at least one")
        given = sorted(self.changed_fields() - {"kind", "sources"})
        if given:
            raise ValueError(f"{given[0]} belongs to the datasets of a mixture: give it to each of them")
        if any(isinstance(source, Mixture) for source in self.sources):
            raise ValueError("a mixture holds datasets, not other mixtures; write one list")
        return self

    def parts(self) -> tuple[DatasetConfig, ...]:
        """All of them."""
        return self.sources

    def limited(self, rows: int) -> Self:
        """See the base class."""
        return self.model_copy(update={"sources": tuple(source.limited(rows) for source in self.sources)})

    def check_found(self) -> None:
        """See the base class."""
        for source in self.sources:
            source.check_found()

    def content_digest(self) -> str | None:
        """See the base class."""
        digests = [source.content_digest() for source in self.sources]
        return None if None in digests else hashlib.sha256(" ".join(map(str, digests)).encode()).hexdigest()

    def places(self) -> list[str]:
        """See the base class."""
        return [place for source in self.sources for place in source.places()]

    def is_large(self) -> bool:
        """Whether one of them is."""
        return any(source.is_large() for source in self.sources)

    def raw(self, reading: Reading) -> Iterator[LocatedRow]:
        """The rows of all sources, each once."""
        for source in self.sources:
            yield from source.raw(reading)

    def fingerprint(self) -> str:
        """That of all sources and weights."""
        facts = "\n".join(f"{source.fingerprint()} {source.weight}" for source in self.sources)
        return hashlib.sha256(facts.encode()).hexdigest()
