"""An image is decoded in one defined way, at the limit, and named where it cannot be."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.core.batch import TokenBatch
from stillhouse.core.images import (
    BROKEN,
    MISSING,
    TOO_LARGE,
    TOO_SMALL,
    EncodedImage,
    ImageFile,
    ImageLimits,
    ImageRef,
)
from stillhouse.core.types import Prompt, Response
from stillhouse.data.collate import collate, read_by_teacher
from stillhouse.errors import DataError, RowError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> EncodedImage:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return EncodedImage(held.getvalue())


def ref(image: Image.Image, **limits: Any) -> ImageRef:
    return ImageRef.of(encoded(image), "rows.jsonl:7", "image 1", ImageLimits(**limits))


def pixels(source: EncodedImage) -> list[Any]:
    return np.asarray(ImageRef.of(source, "rows.jsonl:7").open()).tolist()


def coloured(colour: Any, size: tuple[int, int] = (4, 3), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


MODES = {
    "grey": (coloured(90, mode="L"), (90, 90, 90)),
    "black and white": (coloured(1, mode="1"), (255, 255, 255)),
    "palette": (coloured((0, 80, 160)).convert("P", palette=Image.Palette.ADAPTIVE), (0, 80, 160)),
    "transparent": (coloured((9, 9, 9, 0), mode="RGBA"), (255, 255, 255)),
    "half transparent": (coloured((0, 0, 0, 51), mode="RGBA"), (204, 204, 204)),
    "grey with alpha": (coloured((200, 0), mode="LA"), (255, 255, 255)),
    "16 bits": (Image.fromarray(np.full((3, 4), 0x80FF, np.uint16)), (128, 128, 128)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_in_one_way(name: str) -> None:
    image, colour = MODES[name]
    assert pixels(encoded(image)) == [[list(colour)] * 4] * 3


def test_cmyk_and_orientation() -> None:
    [[first, *_], *_] = pixels(encoded(coloured((0, 255, 255, 0), (16, 16), "CMYK"), "JPEG", quality=100))
    assert first[0] > 230
    assert max(first[1:]) < 60
    image = coloured("black", (2, 1))
    image.putpixel((1, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: left is up
    found = ImageRef.of(encoded(image, exif=exif), "rows.jsonl:7")
    assert (found.width, found.height) == (1, 2)
    assert np.asarray(found.open())[:, 0, 0].tolist() == [0, 255]


def test_a_palette_with_a_transparent_colour_is_white_there() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(encoded(image, "GIF", transparency=0)) == [[[255, 255, 255]] * 2] * 2


def test_images_are_shrunk_to_the_limit_and_known_by_what_is_seen_there() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    small = ref(noise, max_side=30)
    assert (small.width, small.height) == (30, 20)
    assert small.open().size == (30, 20)
    assert small != ref(noise)
    assert ref(noise) == ref(noise, max_side=90) == ImageRef.of(encoded(noise, "BMP"), "elsewhere")
    assert ref(noise, max_pixels=600).width == 30
    jpeg = ImageRef.of(encoded(coloured("red", (4000, 1000)), "JPEG"), "", limits=ImageLimits(max_side=200))
    assert (jpeg.width, jpeg.height) == (200, 50)


def test_a_turned_image_keeps_its_proportions_at_the_limit() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    source = encoded(coloured("red", (90, 30)), "JPEG", exif=exif)
    found = ImageRef.of(source, "", limits=ImageLimits(max_side=30))
    assert (found.width, found.height) == (10, 30)


WHOLE = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8))).data
BITMAP = encoded(coloured("red"), "BMP").data
BAD = {
    "cut short": (WHOLE[: len(WHOLE) // 2], {}, BROKEN),
    "no image": (b"<html>", {}, BROKEN),
    "empty": (b"", {}, BROKEN),
    "PostScript, which would start a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", {}, BROKEN),
    "over the limit of pixels": (WHOLE, {"max_source_pixels": 1599}, TOO_LARGE),
    "a decompression bomb": (
        BITMAP[:18] + 2 * (60_000).to_bytes(4, "little") + BITMAP[26:],
        {},
        TOO_LARGE,
    ),
    "too small": (WHOLE, {"min_side": 41}, TOO_SMALL),
    "float": (encoded(Image.new("F", (2, 2)), "TIFF").data, {}, BROKEN),
    "32 bits": (encoded(Image.new("I", (2, 2), 70_000), "TIFF").data, {}, BROKEN),
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_used_is_named(name: str) -> None:
    data, limits, reason = BAD[name]
    with pytest.raises(RowError) as caught:
        ImageRef.of(EncodedImage(data), "rows.jsonl:7", "image 2 (cat.png)", ImageLimits(**limits))
    assert str(caught.value).startswith("rows.jsonl:7: image 2 (cat.png) ")
    assert caught.value.reason == reason


def test_missing_files_and_files_that_change_are_told(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    with pytest.raises(RowError, match="image is not there: no such file") as caught:
        ImageRef.of(ImageFile(path), "rows.jsonl:7")
    assert caught.value.reason == MISSING
    path.write_bytes(encoded(coloured("red")).data)
    found = ImageRef.of(ImageFile(path), "rows.jsonl:7", "image 1 (cat.png)")
    path.write_bytes(encoded(coloured("green")).data)
    with pytest.raises(DataError, match=r"rows.jsonl:7, image 1 \(cat.png\): the image has changed"):
        found.open()


def test_batches_keep_the_images_of_their_sequences() -> None:
    red, green = ref(coloured("red")), ref(coloured("green"))
    prompts = [
        Prompt("a", (1, 2), "", images=(red, green), teacher_ids=(1, 1, 2)),
        Prompt("b", (3,), ""),
        Prompt("c", (4, 5), "", images=(green,)),
    ]
    batch = collate([Response(prompt, (7, 0), "fixed") for prompt in prompts], pad_id=0)
    assert batch.images == ((red, green), (), (green,))
    assert batch.to("cpu").images == batch.images
    assert batch.select([2, 1]).images == ((green,), ())
    assert batch.select([1]).images == ()
    assert read_by_teacher(batch, 0).images == batch.images
    assert collate([Response(prompts[1], (7,), "fixed")], pad_id=0).images == ()
    assert TokenBatch.of([(1, 2)], [1], 0).images == ()
    assert torch.equal(batch.input_ids[1], torch.tensor([3, 7, 0, 0]))


def test_what_carries_images_imports_no_imaging() -> None:
    code = "import sys, stillhouse.core.images, stillhouse.data; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
