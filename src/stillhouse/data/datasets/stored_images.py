"""Images in a dataset of the `datasets` library, which stay where they are stored until they are opened."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from stillhouse.core.images import EncodedImage


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a cell of a dataset.

    Example: `StoredImage(dataset, row=16, column="images", place=0)`
    """

    dataset: Any = field(repr=False)
    """A `datasets.Dataset` that gives its images encoded."""
    row: int
    """From 0."""
    column: str
    place: int | None = None
    """Which of a list of images; None: the cell is one image."""

    def opened(self) -> BinaryIO:
        """See `ImageSource`."""
        cell = self.dataset[self.row][self.column]
        value: Mapping[str, Any] = cell if self.place is None else cell[self.place]
        return open(value["path"], "rb") if value["bytes"] is None else io.BytesIO(value["bytes"])

    def as_json(self) -> str:
        """See `ImageSource`."""
        with self.opened() as handle:
            return EncodedImage(handle.read()).as_json()


def with_encoded_images(records: Any) -> Iterable[Any]:
    """The rows of a dataset of the `datasets` library without decoding its images: columns of images hold
    references, images inside of other columns `{bytes, path}`. Other rows unchanged."""
    features = getattr(records, "features", None)
    if features is None:
        found: Iterable[Any] = records
        return found
    import datasets

    encoded = {name: _encoded(feature) for name, feature in features.items()}
    changed = {name: feature for name, feature in encoded.items() if feature != features[name]}
    for name, feature in changed.items():
        records = records.cast_column(name, feature)
    held = tuple(name for name in changed if _holds_images(changed[name]))
    return _rows(records, held) if held and isinstance(records, datasets.Dataset) else records


def _rows(dataset: Any, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(dataset):
        yield {**row, **{name: _stored(dataset, number, name, row[name]) for name in columns}}


def _stored(dataset: Any, number: int, column: str, cell: Any) -> Any:
    if cell is None:
        return None
    if isinstance(cell, list):
        places = enumerate(cell)
        return [None if one is None else StoredImage(dataset, number, column, place) for place, one in places]
    return StoredImage(dataset, number, column)


def _holds_images(feature: Any) -> bool:
    """Whether a column is of images, or of lists of images."""
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _encoded(feature: Any) -> Any:
    """A feature whose images are given as they are stored."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, Mapping):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_encoded(feature.feature))
    return feature
