"""The judge sees the images of a question: as content parts, at the resolution limit, in their order."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.servers import Answer, serving
from tests.vision_models import picture
from tests.workshop import Workshop

from stillhouse.core.images import IMAGE, EncodedImage, ImageFile, ImageLimits, ImageRef
from stillhouse.core.journal import Journal
from stillhouse.core.shared import SharedResults
from stillhouse.core.types import Prompt, Response
from stillhouse.evaluate.judge import AnswerPair, Rubric, fill_rubric, judge_pairs
from stillhouse.evaluate.rankers.base import RankingPlace
from stillhouse.evaluate.rankers.judge import JudgeRanker
from stillhouse.evaluate.shown_images import ShownImages
from stillhouse.remote import ServerConnection
from stillhouse.rollouts.offline.samples import Sample
from stillhouse.runs.folder import RunFolder

CHAT = "/v1/chat/completions"


def says_first(path: str, body: Any) -> Answer:
    if path == "/v1/models":
        return 200, {"data": [{"id": "eyes"}]}
    return 200, {"choices": [{"message": {"content": "[[A]]"}}]}


def reads_text_alone(path: str, body: Any) -> Answer:
    if path != "/v1/models" and not isinstance(body["messages"][0]["content"], str):
        return 400, {"error": {"message": "image input is not supported"}}
    return says_first(path, body)


def parts_of(body: Any) -> list[Any]:
    """Texts, and the pixels of images."""
    found = []
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            assert set(part) == {"type", "text"}
            found.append(part["text"])
        else:
            assert part["type"] == "image_url"
            head, data = part["image_url"]["url"].split(",")
            assert head == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]) as image:
                found.append((image.size, image.convert("RGB").tobytes()))
    return found


def pixels(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    return image.size, image.convert("RGB").tobytes()


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def pictures(workshop: Workshop) -> list[Image.Image]:
    """0.png to 2.png beside the answers."""
    found = [picture(seed) for seed in range(3)]
    for number, image in enumerate(found):
        image.save(workshop.folder / f"{number}.png")
    return found


def test_images_stand_where_the_question_shows_them(workshop: Workshop, pictures: list[Image.Image]) -> None:
    in_parts = [
        {"type": "image_url", "image_url": {"url": "2.png"}},
        {"type": "text", "text": "Who?"},
    ]
    rows: list[dict[str, Any]] = [
        {"question": "Is <image> larger than <image>?", "images": ["1.png", "0.png"]},
        {"prompt": "What is it?", "images": ["0.png"]},
        {"prompt": "What is it?", "image": "1.png"},
        {"prompt": [{"role": "user", "content": in_parts}]},
        {"prompt": "Text alone?"},
    ]
    write(workshop.folder / "a.jsonl", *({**row, "response": "a <image>"} for row in rows))
    write(workshop.folder / "b.jsonl", *({**row, "response": "b"} for row in reversed(rows)))
    command = ("judge", "a.jsonl", "b.jsonl", "-o", "judged.json", "--concurrency", "1", "--url")
    with serving(says_first) as service:
        said = workshop.stillhouse(*command, service.url)
        assert said.code == 0, said.err
        asked = service.bodies(CHAT)
        assert workshop.stillhouse(*command, service.url).code == 0
        assert len(service.bodies(CHAT)) == 10  # every reply is kept
    head, tail = Rubric().text().split("{question}")
    tail = tail.replace("{answer_a}", "a <image>").replace("{answer_b}", "b")
    one, two, three = map(pixels, pictures)
    assert [parts_of(body) for body in asked[0:8:2]] == [
        [f"{head}Is ", two, " larger than ", one, f"?{tail}"],
        [head, one, f"What is it?{tail}"],
        [head, two, f"What is it?{tail}"],
        [head, three, f"Who?{tail}"],
    ]
    assert parts_of(asked[1])[:4] == parts_of(asked[0])[:4]
    assert asked[8] == {
        "model": "eyes",
        "messages": [
            {"role": "user", "content": fill_rubric(Rubric().text(), "Text alone?", "a <image>", "b")}
        ],
        "temperature": 0.0,
        "max_tokens": 512,
    }


def test_replies_are_kept_by_what_the_images_show_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(0, 40, 20).save(path)
    small = ImageRef.of(ImageFile(path), "a:1", limits=ImageLimits(max_side=10))
    pair = AnswerPair("1", "What?", "x", "y", (small,))
    replies = Journal(tmp_path / "replies.jsonl")
    with serving(says_first) as service:
        client = ServerConnection(url=service.url).client()
        try:
            judge_pairs([pair], client, "eyes", Rubric(), replies)
            assert [parts_of(body)[1] for body in service.bodies(CHAT)] == [pixels(small.open())] * 2
            assert small.open().size == (10, 5)
            again = ImageRef.of(ImageFile(path), "elsewhere:9", limits=ImageLimits(max_side=10))
            judge_pairs([replace(pair, images=(again,))], client, "eyes", Rubric(), replies)
            assert len(service.bodies(CHAT)) == 2
            larger = ImageRef.of(ImageFile(path), "a:1")
            judge_pairs([replace(pair, images=(larger,))], client, "eyes", Rubric(), replies)
            assert len(service.bodies(CHAT)) == 4
        finally:
            client.close()


def test_the_ranker_shows_the_images_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(0).save(path)
    shown = ImageRef.of(ImageFile(path), "a:1")
    prompt = Prompt("1", (5,), "x", fields={"prompt": f"{IMAGE}Who?"}, images=(shown,))
    group = [
        Sample(number, Response(prompt, (number, 0), "teacher", True), text, "teacher")
        for number, text in enumerate("ab")
    ]
    with serving(says_first) as service:
        scores = JudgeRanker(url=service.url).scores([group], RankingPlace(tmp_path / "pairs.jsonl"))
        assert [parts_of(body)[1] for body in service.bodies(CHAT)] == [pixels(shown.open())] * 2
    assert scores == [[0.5, 0.5]]


def test_what_cannot_be_shown_is_refused(workshop: Workshop, pictures: list[Image.Image]) -> None:
    command = ("judge", "a.jsonl", "b.jsonl", "-o", "judged.json", "--url")

    def answers(row: dict[str, Any]) -> None:
        for name in "ab":
            write(workshop.folder / f"{name}.jsonl", {**row, "response": name})

    with serving(reads_text_alone) as service:
        answers({"prompt": "What is it?", "images": ["0.png"]})
        said = workshop.stillhouse(*command, service.url)
        assert said.code == 3
        assert "image input is not supported" in said.err
        assert "only a judge that is a vision-language model" in " ".join(said.err.split())
        answers({"prompt": "What is it?", "images": ["nowhere.png"]})
        said = " ".join(workshop.refused(*command, service.url).split())
        assert "the images of 1 of 1 answers" in said
        assert "a.jsonl:1: its image (nowhere.png) is not there" in said
        answers({"prompt": "<image>\nWhat is it?"})
        assert "the row has no `images`" in " ".join(workshop.refused(*command, service.url).split())


def kept(path: Path, max_side: int | None = 2048) -> dict[str, Any]:
    """What a row of an evaluation says of an image that was read at a limit."""
    shown = ImageRef.of(ImageFile(path), "valid:1", limits=ImageLimits(max_side=max_side))
    return {"id": "1", "prompt": "<image>\nWhat is it?", **ShownImages().fields("1", [shown])}


def test_answers_of_an_evaluation_are_judged_at_the_limits_of_their_run(workshop: Workshop) -> None:
    path = workshop.folder / "photo.png"
    picture(0, 40, 20).save(path)
    first, again = kept(path, 16), {"id": "1", "prompt": "<image>\nWhat is it?"}
    write(workshop.folder / "a.jsonl", {**first, "response": "a"}, {**again, "seed": 2, "response": "c"})
    write(workshop.folder / "b.jsonl", {**kept(path, None), "response": "b"})
    command = ("judge", "a.jsonl", "b.jsonl", "-o", "judged.json", "--url")
    with serving(says_first) as service:
        for more in ((), ("--max-side", "10")):
            assert workshop.stillhouse(*command, service.url, *more).code == 0
        sizes = [parts_of(body)[1][0] for body in service.bodies(CHAT)]
        assert sizes == [(16, 8), (16, 8), (10, 5), (10, 5)]
        (verdict,) = map(json.loads, (workshop.folder / "judged.jsonl").read_text("utf-8").splitlines())
        assert verdict["images"][0]["thumbnail"].startswith("data:image/jpeg;base64,")
        picture(1, 40, 20).save(path)
        assert "(valid:1, image) is another one than when it was answered" in " ".join(
            workshop.refused(*command, service.url).split()
        )
        path.rename(workshop.folder / "moved.png")
        said = " ".join(workshop.refused(*command, service.url).split())
        assert "the images of 2 of 2 answers cannot be shown to the judge: a.jsonl:1: its image" in said
        assert ") is not there" in said  # its path may be shortened
        assert len(service.bodies(CHAT)) == 4


def test_images_without_a_file_lie_beside_the_rows_of_an_evaluation_once(workshop: Workshop) -> None:
    held = io.BytesIO()
    picture(0, 40, 20).save(held, "JPEG")
    shown = ImageRef.of(EncodedImage(held.getvalue()), "valid.parquet:1")
    first = RunFolder(workshop.folder / "runs" / "a")
    with SharedResults(workshop.folder / "shared", "a").once("a", {}, [first.evaluation("student after")]):
        for system in ("student before", "student after"):
            entries, asked = ShownImages(), ("What is it?", "And where?")
            rows = [{"id": q, "prompt": q, "response": "x", **entries.fields(q, [shown])} for q in asked]
            first.write_evaluation(system, {}, rows)
    files = sorted(path.name for path in (first.path / "evaluation" / "images").iterdir())
    assert files == [f"{shown.digest}.jpeg"]
    assert (first.path / "evaluation" / "images" / files[0]).read_bytes() == held.getvalue()
    rows_file = first.evaluation("student after").with_suffix(".jsonl")
    assert "base64" not in re.sub('"thumbnail": "[^"]*"', "", rows_file.read_text("utf-8"))

    copied = workshop.folder / "elsewhere" / "evaluation" / rows_file.name  # as another run of a sweep has it
    with SharedResults(workshop.folder / "shared", "b").once("a", {}, [copied.with_suffix(".json")]) as there:
        assert there
    copied.write_bytes(rows_file.read_bytes())
    first.path.rename(workshop.folder / "runs" / "moved")
    moved = "runs/moved/evaluation/student-after.jsonl"
    with serving(says_first) as service:
        command = ("judge", moved, str(copied), "-o", "judged.json", "--url", service.url)
        said = workshop.stillhouse(*command)
        assert said.code == 0, said.err
        assert {parts_of(body)[1] for body in service.bodies(CHAT)} == {pixels(shown.open())}
        picture(1, 40, 20).save(copied.parent / "images" / files[0])
        assert "is another one than when it was answered" in " ".join(workshop.refused(*command).split())


def test_images_without_a_file_are_judged_from_the_rows(workshop: Workshop) -> None:
    held = io.BytesIO()
    picture(0, 40, 20).save(held, "JPEG")
    shown = ImageRef.of(EncodedImage(held.getvalue()), "valid.parquet:1")
    row = {"prompt": "What is it?", **ShownImages().fields("1", [shown])}
    for name in "ab":
        write(workshop.folder / f"{name}.jsonl", {**row, "response": name})
    with serving(says_first) as service:
        said = workshop.stillhouse("judge", "a.jsonl", "b.jsonl", "-o", "judged.json", "--url", service.url)
        assert said.code == 0, said.err
        assert parts_of(service.bodies(CHAT)[0])[1] == pixels(shown.open())
