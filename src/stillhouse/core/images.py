"""Images of prompts: what holds them, and how one is decoded.

Prompts, buffers, caches and checkpoints hold an `ImageRef` and its digest; pixels exist while a model's
processor reads them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol, cast

from stillhouse.errors import DataError, EnvironmentFault, RowError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE = "\ufdd0"
"""Stands in the text of a row's turn where an image is: a code point that Unicode keeps from being text."""

IMAGE_MARK = "<image>"
"""What stands for an image in files (LLaVA's, LLaMA-Factory's, ms-swift's) and in texts for people."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read. The first frame of a file that has several."""

MISSING, BROKEN, TOO_LARGE, TOO_SMALL = (
    "image missing",
    "image that cannot be decoded",
    "image over the limit of pixels",
    "image too small",
)
"""The reasons that rows with such images are counted under."""

_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The resolution at which images are decoded, and what is refused.

    Example: `ImageLimits(max_side=1024)`
    """

    max_side: int | None = 2048
    """The longer side in pixels; larger images are shrunk to it, their proportions kept."""
    max_pixels: int | None = None
    """Width times height; larger images are shrunk to it."""
    min_side: int = 1
    """The shorter side in pixels; smaller images are refused."""
    max_source_pixels: int = 89_478_485
    """Width times height in the file; larger images are refused before they are decoded."""

    def shrunk(self, width: int, height: int) -> tuple[int, int]:
        """Width and height at the limit."""
        scale = 1.0 if self.max_side is None else min(1.0, self.max_side / max(width, height))
        if self.max_pixels is not None:
            scale = min(scale, math.sqrt(self.max_pixels / (width * height)))
        return (width, height) if scale == 1 else (max(1, int(width * scale)), max(1, int(height * scale)))


class ImageSource(Protocol):
    """Where the encoded bytes of an image are."""

    def opened(self) -> BinaryIO:
        """The bytes, from the first one on.

        Raises:
            OSError: they are not there.
        """

    def as_json(self) -> str:
        """Its path, or the bytes as a data URL: what a row of a file holds for it."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a file.

    Example: `ImageFile(Path("photos/cat.png"))`
    """

    path: Path

    def opened(self) -> BinaryIO:
        """See `ImageSource`."""
        return open(self.path, "rb")

    def as_json(self) -> str:
        """See `ImageSource`."""
        return str(self.path.absolute())


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as the bytes of its file.

    Example: `EncodedImage(b"\\x89PNG...")`
    """

    PREFIX: ClassVar[str] = "data:image;base64,"
    """How its data URL begins."""
    data: bytes = field(repr=False)

    def opened(self) -> BinaryIO:
        """See `ImageSource`."""
        return io.BytesIO(self.data)

    def as_json(self) -> str:
        """See `ImageSource`."""
        return f"{self.PREFIX}{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image, by where it is and what it shows; equal to another that shows the same pixels.

    Example: `ImageRef.of(ImageFile(Path("cat.png")), "train.jsonl:7", "image 1 (cat.png)")`
    """

    location: str = field(compare=False)
    """Row and image, for messages."""
    digest: str
    """SHA-256 of width, height and RGB pixels at the resolution limit."""
    width: int
    height: int
    source: ImageSource = field(compare=False, repr=False)
    limits: ImageLimits = field(compare=False, repr=False, default=ImageLimits())

    @classmethod
    def of(
        cls, source: ImageSource, location: str, name: str = "image", limits: ImageLimits | None = None
    ) -> ImageRef:
        """Decode an image once, to know that it can be and what it shows.

        Args:
            source: where its bytes are.
            location: file and line of its row.
            name: which image of the row.
            limits: the resolution limit.

        Raises:
            RowError: the image is missing, broken, too large or too small.
            EnvironmentFault: pillow is not installed.
        """
        limits = limits or ImageLimits()
        image = decoded(source, location, name, limits)
        return cls(f"{location}, {name}", digest_of(image), image.width, image.height, source, limits)

    def open(self) -> Image:
        """The image in RGB at the resolution limit, decoded anew.

        Raises:
            DataError: it is not there any more, or shows something else than when its row was read.
        """
        image = decoded(self.source, self.location, "the image", self.limits)
        if digest_of(image) != self.digest:
            raise DataError(f"{self.location}: the image has changed since its row was read")
        return image

    def data_url(self) -> str:
        """Its pixels at the resolution limit as a data URL (PNG), for servers.

        Raises:
            DataError: see `open`.
        """
        return _data_url(self.open(), "PNG")

    def thumbnail(self, side: int = 160) -> str:
        """A small copy as a data URL, for pages.

        Raises:
            DataError: see `open`.
        """
        image = self.open()
        image.thumbnail((side, side))
        return _data_url(image, "JPEG", quality=80)


class ImageExpander(Protocol):
    """How the processor of one model writes images into the text of a prompt."""

    @property
    def image_token(self) -> str:
        """The token that chat templates of the model render for an image."""

    @property
    def image_text(self) -> str:
        """An image in a prompt without a chat template: `image_token`, with the marks around it that the
        family of the model writes."""

    def expand(self, images: Sequence[ImageRef]) -> list[str]:
        """For each image of one prompt, the text that takes the place of `image_token`: as many image tokens
        as the model reads for it, with what else the processor writes around and between them.

        Raises:
            ValueError: the processor cannot read an image; the message says why.
        """


def with_expander(tokenizer: Any, expander: ImageExpander | None) -> Any:
    """The tokenizer of a vision-language model, told how the model's processor writes images: whoever encodes
    rows with this tokenizer can encode images too. None: the model reads text alone."""
    tokenizer.image_expander = expander
    return tokenizer


def expander_of(tokenizer: Any) -> ImageExpander | None:
    """What `with_expander` gave a tokenizer; None for a model that reads text alone."""
    return cast("ImageExpander | None", getattr(tokenizer, "image_expander", None))


def without_images(text: str) -> str:
    """A text of a row for people and for scores: `<image>` where an image stands."""
    return text.replace(IMAGE, IMAGE_MARK)


def _data_url(image: Image, kind: str, **options: Any) -> str:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"


def digest_of(image: Image) -> str:
    """The SHA-256 of width, height and pixels of an RGB image."""
    return hashlib.sha256(b"%dx%d " % image.size + image.tobytes()).hexdigest()


def decoded(source: ImageSource, location: str, name: str, limits: ImageLimits) -> Image:
    """An image in RGB, upright, at the resolution limit.

    EXIF's orientation is applied, transparency laid over white, 16-bit grey divided by 256; colour profiles
    are not applied. A JPEG is decoded at the smallest of its own scales that reaches the limit.

    Raises:
        RowError: the image is missing, broken, too large or too small.
        EnvironmentFault: pillow is not installed.
    """
    pillow = _pillow()

    def refused(problem: str, reason: str = BROKEN) -> RowError:
        return RowError(location, f"{name} {problem}", reason)

    try:
        with source.opened() as handle, pillow.open(handle, formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_source_pixels:
                raise refused(
                    f"has {width} x {height} pixels, more than the {limits.max_source_pixels:,} of "
                    "data.images.max_source_pixels",
                    TOO_LARGE,
                )
            if min(width, height) < limits.min_side:
                raise refused(
                    f"has {width} x {height} pixels, and data.images.min_side is {limits.min_side}",
                    TOO_SMALL,
                )
            return _upright_rgb(image, limits)
    except RowError:
        raise
    except FileNotFoundError as error:
        raise refused("is not there: no such file", MISSING) from error
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise refused("has more pixels than any image that is decoded", TOO_LARGE) from error
    except pillow.UnidentifiedImageError as error:
        raise refused(f"is no image of the formats {', '.join(FORMATS)}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise refused(f"cannot be read ({error.strerror})", MISSING) from error
    except Exception as error:  # decoders raise errors of any type about broken files
        raise refused(f"cannot be decoded ({error or type(error).__name__})") from error


def _upright_rgb(image: Any, limits: ImageLimits) -> Image:
    from PIL import Image, ImageOps

    size = limits.shrunk(*image.size)
    if size != image.size:
        image.draft("RGB", size)  # of formats that have smaller scales
    image = _rgb(ImageOps.exif_transpose(image))
    turned = (size[0] < size[1]) != (image.width < image.height)
    size = size[::-1] if turned else size
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode in _WIDE:
        low, high = image.getextrema()
        if low < 0 or high > 0xFFFF:
            raise ValueError(f"has grey values from {low} to {high}, and 16 bits are read")
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.mode == "F":
        raise ValueError("has floating-point pixels")
    if image.mode in _ALPHA or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    image.load()
    return image.convert("RGB")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentFault(
            "rows with images need the package pillow. Install it with: pip install 'stillhouse[vision]'"
        ) from error
    return Image
