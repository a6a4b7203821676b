"""Images beside the answers about them: small, part of the page, never markup and never a request."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from stillhouse.core.images import EncodedImage
from stillhouse.evaluate.shown_images import ShownImages
from tests.report.browser import browser, chromium
from tests.report.made_runs import HOSTILE, make_run
from tests.report.reading import answers, page
from tests.vision_models import image


def decoded(thumbnail: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(thumbnail.removeprefix("data:image/jpeg;base64,"))))


def shown_run(folder: Path, *images: object) -> Path:
    run = make_run(folder, rows=2)
    for path in run.glob("evaluation/*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0] |= {"images": list(images), "prompt": HOSTILE}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def thumbnail_of(size: tuple[int, int]) -> str:
    (entry,) = ShownImages().fields("1", [image(0, *size)])["images"]
    return str(entry["thumbnail"])


def test_the_first_row_of_a_question_has_its_images_small_and_rows_of_text_none():
    shown = ShownImages()
    found = shown.fields("1", [image(0, 300, 200), image(0, 24, 16)])["images"]
    assert [decoded(one["thumbnail"]).size for one in found] == [(96, 64), (24, 16)]
    assert shown.fields("1", [image(0, 300, 200)]) == {}
    assert shown.fields("2", []) == {}
    assert list(shown.fields("2", [image(1)])) == ["images"]


def test_thumbnails_are_bounded_and_the_other_images_kept_without():
    one = image(0, 96, 96)
    shown = ShownImages(max_characters=len(one.thumbnail(96)))
    first, second = (shown.fields(id, [one])["images"][0] for id in "ab")
    assert second == {name: value for name, value in first.items() if name != "thumbnail"}
    assert second["bytes"].startswith(EncodedImage.PREFIX)
    assert second["limits"] == {"max_side": 2048, "max_pixels": None}


def test_the_page_takes_data_alone_and_a_page_of_text_has_no_images(tmp_path):
    good = thumbnail_of((300, 200))
    addresses = ("https://example.org/x.png", "javascript:1", 'data:image/jpeg;base64,AA" onload="x', HOSTILE)
    images = [{"location": HOSTILE, "thumbnail": one} for one in (good, *addresses)]
    html, tags = page([shown_run(tmp_path / "run", *images, "no image")], tmp_path / "report.html")
    held = answers(html)["rows"][0]["images"]
    assert [thumbnail for _, thumbnail in held] == [good, "", "", "", ""]
    assert decoded(held[0][1]).size == (96, 64)
    assert "img" not in tags.tags  # made by the script, as an element
    assert "<img" not in html
    text, _ = page([make_run(tmp_path / "text", rows=2)], tmp_path / "text.html")
    assert all("images" not in one for one in answers(text)["rows"])
    assert "data:image/jpeg" not in text


@pytest.mark.skipif(chromium() is None, reason="chromium is not installed")
def test_a_browser_shows_them_beside_the_question(tmp_path):
    good = thumbnail_of((300, 200))
    images = [{"location": HOSTILE, "thumbnail": good}, {"location": HOSTILE}]
    page([shown_run(tmp_path / "run", *images)], tmp_path / "report.html")
    with browser(tmp_path / "profile") as tab:
        tab.open(tmp_path / "report.html")
        tab.until("document.querySelector('.answer img')?.complete")
        assert tab.do("[...document.querySelectorAll('.answer img')].map(one => one.naturalWidth)") == [96]
        assert tab.do("document.querySelector('.answer img').alt.startsWith('</script><script>')")
        assert tab.do("document.querySelector('.pictures span').textContent.endsWith(': no thumbnail kept')")
        assert tab.do("typeof window.hacked") == "undefined"
        assert tab.troubles == []
        tab.screenshot(tmp_path / "page.png", whole=True)
