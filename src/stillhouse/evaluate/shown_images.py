"""The images of questions in rows of answers: for a judge, who opens them again, and for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.core.images import EncodedImage, ImageLimits, ImageRef
from stillhouse.files import IMAGES_FOLDER, atomic

SIDE = 96
"""The longer side of a thumbnail in pixels."""
MAX_CHARACTERS = 256_000
"""Of all thumbnails of one system on one task: about a hundred, so that a run folder stays small."""


class ShownImages:
    """Writes the images of each question into its first row.

    Example: `ShownImages().fields("valid:3", prompt.images)` is `{"images": [{"path": "/photos/cat.png",
    "digest": "9f...", "limits": {"max_side": 2048, "max_pixels": None}, "location": "valid.jsonl:4, its image
    (cat.png)", "thumbnail": "data:image/jpeg;base64,..."}]}`
    """

    def __init__(self, max_characters: int = MAX_CHARACTERS) -> None:
        """Keep thumbnails until `max_characters` are used."""
        self._left = max_characters
        self._written: set[str] = set()

    def fields(self, id: str, images: Sequence[ImageRef]) -> dict[str, Any]:
        """What the next row of a question says about its images; nothing but in its first row.

        Of an image that is no file of its own the encoded bytes are kept (`bytes`, a data URL), which
        `with_images_beside` puts into files.

        Args:
            id: of the question.
            images: what it shows.

        Raises:
            DataError: an image is not there any more, or has changed since its row was read.
        """
        if not images or id in self._written:
            return {}
        self._written.add(id)
        return {"images": [self._entry(image) for image in images]}

    def _entry(self, image: ImageRef) -> dict[str, Any]:
        source = image.source.as_json()
        limits = {"max_side": image.limits.max_side, "max_pixels": image.limits.max_pixels}
        entry = {
            "bytes" if source.startswith(EncodedImage.PREFIX) else "path": source,
            "digest": image.digest,
            "limits": limits,
            "location": image.location,
        }
        thumbnail = image.thumbnail(SIDE) if self._left > 0 else ""
        self._left -= len(thumbnail)
        return {**entry, "thumbnail": thumbnail} if thumbnail and self._left >= 0 else entry


def with_images_beside(rows: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The rows with a path in the place of encoded bytes: each image is written once, by its digest.

    Args:
        rows: of answers.
        folder: that of the file for the rows, to which the paths are relative.
    """
    found = []
    for row in rows:
        entries = row.get("images")
        if entries:
            row = {**row, "images": [_beside(entry, folder) for entry in entries]}
        found.append(row)
    return found


def _beside(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if "bytes" not in entry:
        return dict(entry)
    from PIL import Image

    data = base64.b64decode(entry["bytes"].removeprefix(EncodedImage.PREFIX))
    with Image.open(io.BytesIO(data)) as image:
        kind = str(image.format).lower()
    path = Path(IMAGES_FOLDER) / f"{entry['digest']}.{kind}"
    if not (folder / path).is_file():
        with atomic(folder / path, "wb") as handle:
            handle.write(data)
    return {"path": str(path), **{name: value for name, value in entry.items() if name != "bytes"}}


def kept_limits(entry: Any) -> ImageLimits | None:
    """The limits at which an image was read, of which `entry` is what a row kept; None for an image in a row
    that nobody evaluated."""
    limits = entry.get("limits") if isinstance(entry, Mapping) else None
    if not isinstance(limits, Mapping):
        return None
    return ImageLimits(max_side=limits.get("max_side"), max_pixels=limits.get("max_pixels"))
