"""The images of rows: where they are, what is refused, and at which resolution they are read."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import time
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from stillhouse.config import StrictConfig, because
from stillhouse.core.images import (
    BROKEN,
    MISSING,
    TOO_LARGE,
    EncodedImage,
    ImageFile,
    ImageLimits,
    ImageRef,
    ImageSource,
)
from stillhouse.data.datasets.stored_images import StoredImage
from stillhouse.data.formats.images import shown_value
from stillhouse.data.formats.values import shortened
from stillhouse.data.rows import Row
from stillhouse.errors import ConfigError, EnvironmentFault, RowError
from stillhouse.files import locate

NOT_READ = "images that the model does not read"
"""The reason of rows with images where a model reads text alone."""
URLS_REFUSED = "image at a URL, which is not downloaded"

_URL = re.compile(r"https?://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(?P<type>[\w/+.-]*)(?:;[\w=+.-]+)*?(?P<base64>;base64)?,", re.IGNORECASE)
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How PNG, JPEG, GIF and WebP begin in base64."""
_SHORTEST_BASE64 = 80
_SEEN: dict[Hashable, ImageRef] = {}
"""Images that were decoded, so that one of several rows, or of a row that comes again, is decoded once."""
_MOST_SEEN = 200_000

PositiveInt = Annotated[int, Field(ge=1)]


class ImageOptions(StrictConfig):
    """How the images of rows are read."""

    folder: str | None = None
    """Where relative paths of images begin, relative to the working directory; default: the folder of the
    data file."""
    max_side: PositiveInt | None = 2048
    """The longer side in pixels at which images are read: larger ones are shrunk, their proportions kept.
    The model's processor resizes what is left as it needs. null: no limit."""
    max_pixels: PositiveInt | None = None
    """As `max_side`, for width times height."""
    min_side: PositiveInt = 1
    """The shorter side in pixels: a row with a smaller image is a bad row (`bad_rows`)."""
    max_source_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 89_478_485
    """Width times height of an image in its file: a larger one is refused before it is decoded, and its row a
    bad row."""
    max_bytes: PositiveInt = 50_000_000
    """The size of a file, a download or encoded bytes: a larger one makes its row a bad row."""
    allow_urls: bool = False
    """Whether images at http(s) URLs are downloaded when rows are read; else their row is a bad row."""
    url_timeout: Annotated[float, Field(gt=0, le=600)] = 20.0
    """Seconds that a download may take."""

    @property
    def limits(self) -> ImageLimits:
        """The resolution limits."""
        return ImageLimits(self.max_side, self.max_pixels, self.min_side, self.max_source_pixels)

    def options_without_effect(self) -> dict[str, str]:
        """See the base class."""
        if self.allow_urls:
            return {}
        return because("no image is downloaded with allow_urls: false", "url_timeout")


def opened(row: Row, options: ImageOptions) -> Row:
    """The row with its images, each decoded once to know that it can be and what it shows.

    Raises:
        RowError: one is missing, broken, too large or too small, or is not to be downloaded.
        EnvironmentFault: a package is missing.
    """
    many = len(row.image_values) > 1
    found = []
    for number, value in enumerate(row.image_values, start=1):
        shown = shown_value(value)
        name = " ".join(filter(None, (f"image {number}" if many else "its image", shown and f"({shown})")))
        source = _source(value, row, name, options)
        found.append(_reference(source, row.location, name, options.limits))
    return replace(row, images=tuple(found))


def image_references(row: Row) -> list[str]:
    """What another file may hold for the images of a row: paths that hold from anywhere, URLs, data URLs."""
    options = ImageOptions()
    return [
        value
        if isinstance(value, str) and _URL.match(value)
        else _source(value, row, "its image", options).as_json()
        for value in row.image_values
    ]


def _reference(source: ImageSource, location: str, name: str, limits: ImageLimits) -> ImageRef:
    """The reference to an image; one whose bytes were seen before is not decoded again."""
    if isinstance(source, ImageFile):
        try:
            facts = source.path.stat()
        except OSError as error:
            raise RowError(location, f"{name} is not there: no such file", MISSING) from error
        # The change time too: whoever replaces an image may set its other times to those of the former.
        stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        key: Hashable = (source.path, stamp, limits)
    else:
        with source.opened() as handle:
            key = (hashlib.sha256(handle.read()).digest(), limits)
    if (seen := _SEEN.get(key)) is None:
        if len(_SEEN) >= _MOST_SEEN:
            _SEEN.clear()
        seen = _SEEN[key] = ImageRef.of(source, location, name, limits)
    return replace(seen, location=f"{location}, {name}", source=source)


def _source(value: Any, row: Row, name: str, options: ImageOptions) -> ImageSource:
    """Where the bytes of an image are, from what the file has for it."""
    if isinstance(value, ImageFile | EncodedImage | StoredImage):
        return value
    if isinstance(value, Mapping):
        return _of_mapping(value, row, name, options)
    if isinstance(value, bytes | bytearray | memoryview):
        return _encoded(bytes(value), row, name, options)
    if hasattr(value, "getexif"):  # an image of pillow
        return _of_pillow(value)
    if isinstance(value, str):
        return _of_text(value.strip(), row, name, options)
    raise RowError(
        row.location,
        f"{name} should be a path, bytes, a data URL or an image of pillow, got {type(value).__name__} "
        f"{shortened(value)}",
        BROKEN,
    )


def _of_mapping(value: Mapping[str, Any], row: Row, name: str, options: ImageOptions) -> ImageSource:
    """What `datasets.Image` stores: bytes, or a path."""
    if value.get("bytes") is not None:
        return _source(value["bytes"], row, name, options)
    if value.get("path"):
        return _of_text(str(value["path"]), row, name, options)
    raise RowError(row.location, f"{name} has neither bytes nor a path: {shortened(dict(value))}", MISSING)


def _of_text(text: str, row: Row, name: str, options: ImageOptions) -> ImageSource:
    """A URL, a data URL, base64 or a path."""
    if _URL.match(text):
        if not options.allow_urls:
            raise RowError(
                row.location,
                f"{name} is at the URL {text:.80}, which is not downloaded unless you set data.images: "
                "{allow_urls: true}",
                URLS_REFUSED,
            )
        try:
            return EncodedImage(_downloaded(text, options.max_bytes, options.url_timeout))
        except ValueError as error:
            problem = f"{name} cannot be downloaded ({error})"
            raise RowError(row.location, problem, "image that cannot be downloaded") from error
    if (found := _DATA_URL.match(text)) is not None:
        if not found["base64"]:
            raise RowError(row.location, f"{name} is a data URL that is not in base64", BROKEN)
        return _encoded(_of_base64(text[found.end() :], row, name), row, name, options)
    if len(text) >= _SHORTEST_BASE64 and text.startswith(_BASE64_STARTS):
        return _encoded(_of_base64(text, row, name), row, name, options)
    try:
        path = locate(text.removeprefix("file://"))
    except ConfigError as error:
        raise RowError(row.location, f"{name} has no path: {error}", MISSING) from error
    if not path.is_absolute():
        path = Path(options.folder if options.folder is not None else row.folder) / path
    if path.is_file() and path.stat().st_size > options.max_bytes:
        raise _too_many_bytes(path.stat().st_size, row.location, name, options)
    return ImageFile(path)


def _of_base64(text: str, row: Row, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(row.location, f"{name} is no base64 ({error})", BROKEN) from error


def _encoded(data: bytes, row: Row, name: str, options: ImageOptions) -> EncodedImage:
    if len(data) > options.max_bytes:
        raise _too_many_bytes(len(data), row.location, name, options)
    return EncodedImage(data)


def _of_pillow(image: Any) -> EncodedImage:
    """A decoded image, in a form that loses nothing."""
    held = io.BytesIO()
    kind = "TIFF" if image.mode in ("CMYK", "F", "LAB", "HSV", "YCbCr") else "PNG"
    image.save(held, kind)
    return EncodedImage(held.getvalue())


@lru_cache(maxsize=256)
def _downloaded(url: str, max_bytes: int, seconds: float) -> bytes:
    """The content at a URL.

    Raises:
        ValueError: it cannot be had within the limits of size and time.
        EnvironmentFault: httpx is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise EnvironmentFault(
            "data.images.allow_urls needs the package httpx. Install it with: pip install "
            "'stillhouse[vision]'"
        ) from error
    ends = time.monotonic() + seconds
    data = bytearray()
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=seconds) as reply:
            reply.raise_for_status()
            for piece in reply.iter_bytes():
                data += piece
                if len(data) > max_bytes:
                    raise ValueError(f"it has more than the {max_bytes:,} bytes of data.images.max_bytes")
                if time.monotonic() > ends:
                    raise ValueError(f"it takes more than the {seconds:g} s of data.images.url_timeout")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return bytes(data)


def _too_many_bytes(size: int, location: str, name: str, options: ImageOptions) -> RowError:
    problem = (
        f"{name} has at least {size:,} bytes, more than the {options.max_bytes:,} of data.images.max_bytes"
    )
    return RowError(location, problem, TOO_LARGE)
