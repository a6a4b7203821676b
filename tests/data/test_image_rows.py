"""Rows with images become prompts with the image tokens of the model that reads them, or are named."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests import vision_models
from toy_tokenizers import byte_tokenizer

from stillhouse.core.images import IMAGE, ImageRef, with_expander
from stillhouse.data import Data, DataConfig, Encoder, TeacherReads, chunks, load_data
from stillhouse.data.datasets import base
from stillhouse.data.datasets.in_memory import InMemory
from stillhouse.data.formats import read_row
from stillhouse.data.images import NOT_READ
from stillhouse.data.rows import Fields
from stillhouse.data.stored_prompts import StoredPrompts
from stillhouse.data.templates import Plain
from stillhouse.errors import DataError, RowError
from stillhouse.evaluate.tasks.vqa import VqaTask
from stillhouse.models.processors import load_processor
from stillhouse.models.vision import ImageReader
from stillhouse.runs.resolve import resolve
from stillhouse.runs.row_page import write_row_page
from stillhouse.runs.row_views import row_views

Family = vision_models.Family


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of different sizes, and processors beside them."""
    place = tmp_path_factory.mktemp("rows")
    for seed, size in enumerate(((48, 32), (16, 16), (24, 60))):
        vision_models.picture(seed, *size).save(place / f"{seed}.png")
    for family in vision_models.FAMILIES:
        vision_models.vision_model(place / family, family)
    vision_models.vision_model(place / "larger", "llava", size=32)
    return place


def tokenizer_of(folder: Path, family: Family, place: str = "") -> Any:
    tokenizer = vision_models.tokenizer(family)
    reader = ImageReader(str(folder / (place or family)), vision_models.config(family), lambda: tokenizer)
    return with_expander(tokenizer, reader)


def loaded(
    folder: Path, rows: list[dict[str, Any]], tokenizer: Any, teacher: Any = None, **data: Any
) -> Data:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = DataConfig.model_validate({"train": str(path), **data})
    return load_data(config, tokenizer, teacher=None if teacher is None else TeacherReads(teacher))


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


TEXT = {"type": "text", "text": "What is it?"}
LOOK = IMAGE + "What is it?"
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LLaVA": (
        {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]},
        [LOOK],
    ),
    "LLaVA, the image last": (
        {"image": "0.png", "conversations": [{"from": "human", "value": "What is it?\n<image>"}]},
        ["What is it?" + IMAGE],
    ),
    "OpenAI": (
        {"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "0.png"}}, TEXT])]},
        [LOOK],
    ),
    "OpenAI's responses": (
        {"messages": [turn("user", [{"type": "input_text", "text": "What is it?"},
                                    {"type": "input_image", "image_url": "0.png"}])]},
        ["What is it?" + IMAGE],
    ),
    "transformers": ({"messages": [turn("user", [{"type": "image", "path": "0.png"}, TEXT])]}, [LOOK]),
    "Anthropic": (
        {"messages": [turn("user", [{"type": "image", "source": {"type": "url", "url": "0.png"}}, TEXT])]},
        [LOOK],
    ),
    "TRL": ({"images": ["0.png"], "prompt": [turn("user", "What is it?")],
             "completion": [turn("assistant", "A")]}, [LOOK]),
    "TRL's parts": ({"images": ["0.png"], "messages": [turn("user", [{"type": "image"}, TEXT])]}, [LOOK]),
    "images of a turn": ({"messages": [{**turn("user", "What is it?"), "images": ["0.png"]}]}, [LOOK]),
    "Alpaca": ({"image": "0.png", "instruction": "What is it?", "output": "A"}, [LOOK]),
    "several in the text": (
        {"images": ["0.png", "0.png"], "prompt": "Is <image> like <image>?"},
        [f"Is {IMAGE} like {IMAGE}?"],
    ),
    "several turns": (
        {"images": ["0.png", "1.png"],
         "messages": [turn("user", "<image>\nWhat?"), turn("assistant", "<image> is text here"),
                      turn("user", "And <image>?")]},
        [IMAGE + "What?", "<image> is text here", f"And {IMAGE}?"],
    ),
    "preference pair": (
        {"images": ["0.png"], "prompt": [turn("user", "What is it?")], "chosen": [turn("assistant", "A")],
         "rejected": [turn("assistant", "B")]},
        [LOOK],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_rows_is_read_to_the_places_of_its_images(name: str) -> None:
    raw, texts = SHAPES[name]
    row = read_row(raw, Fields(), "rows.jsonl:1")
    assert ([one["content"] for one in row.messages] or [row.instruction]) == texts
    assert row.image_values[0] == "0.png"
    assert len(row.image_values) == sum(text.count(IMAGE) for text in texts)
    assert "images" not in row.extra
    again = read_row({**row.prompt_fields(), "images": list(row.image_values)}, Fields(), "rows.jsonl:1")
    assert (again.messages, again.instruction) == (row.messages, row.instruction)
    assert again.image_values == row.image_values


REFUSED = [
    ({"images": ["0.png"], "prompt": "<image> or <image>?"}, "number of images: 1; places for them"),
    ({"messages": [turn("user", [{"type": "image"}, TEXT])]}, "number of images: 0; places for them"),
    ({"messages": [turn("user", [{"type": "image", "file_id": "f1"}])]}, "only OpenAI's server can open"),
    (
        {"messages": [turn("user", "a"), turn("assistant", [{"type": "image", "path": "0.png"}])]},
        "in an answer",
    ),
    ({"images": ["0.png"], "image": "1.png", "prompt": "a"}, "both hold images; choose one"),
    ({"images": ["0.png"], "text": "a"}, "is plain text with images"),
    ({"images": ["0.png"], "prompt": IMAGE + IMAGE}, "U+FDD0"),
    ({"prompt": "a", "videos": ["a.mp4"]}, "field 'videos' would change the prompt"),
    ({"prompt": "a", "photo": {"bytes": b"x", "path": None}}, "fields: {images: photo}"),
]


@pytest.mark.parametrize(("raw", "words"), REFUSED)
def test_what_cannot_be_right_is_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        read_row(raw, Fields(), "rows.jsonl:3")
    assert str(caught.value).startswith("rows.jsonl:3: ")
    assert words in str(caught.value)


def test_a_text_with_the_code_point_of_a_place_is_text_where_there_are_no_images() -> None:
    data = load_data(
        DataConfig(train=InMemory(name="rows", records=[{"prompt": f"a{IMAGE}b", "response": "c"}])),
        byte_tokenizer(),
    )
    assert byte_tokenizer().decode(data.train[0].token_ids).count(IMAGE) == 1
    assert data.train[0].images == ()


@pytest.mark.parametrize("family", vision_models.FAMILIES)
def test_prompts_are_what_the_processor_makes_of_the_conversation(folder: Path, family: Family) -> None:
    tokenizer = tokenizer_of(folder, family)
    shown = [
        turn("user", [{"type": "image", "image": "0.png"}, TEXT]), turn("assistant", "A box."),
        turn("user", [{"type": "text", "text": "And this?"}, {"type": "image", "image": "2.png"}]),
    ]  # fmt: skip
    (prompt, text) = loaded(
        folder,
        [{"messages": [*shown, turn("assistant", "B.")]}, {"prompt": "No image", "response": "C"}],
        tokenizer,
    ).train
    processor = load_processor(str(folder / family), type(vision_models.config(family)))
    rendered = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    pictures = [image.open() for image in prompt.images]
    expected = processor(text=[rendered], images=pictures, return_tensors="pt")["input_ids"][0].tolist()
    assert list(prompt.token_ids) == expected
    assert [(image.width, image.height) for image in prompt.images] == [(48, 32), (24, 60)]
    assert "2.png" in prompt.images[1].location
    assert (text.images, text.teacher_ids) == ((), None)
    assert prompt.question == "<image>What is it?\nA box.\nAnd this?<image>"


def test_a_teacher_with_other_image_tokens_has_its_own_prompt_where_there_are_images(folder: Path) -> None:
    student, teacher = tokenizer_of(folder, "llava"), tokenizer_of(folder, "llava", "larger")
    rows = [{"image": "0.png", "prompt": "A?", "response": "B"}, {"prompt": "A?", "response": "B"}]
    shown, text = loaded(folder, rows, student, teacher).train
    image = student.convert_tokens_to_ids("<image>")
    assert shown.teacher_ids is not None
    assert (shown.token_ids.count(image), shown.teacher_ids.count(image)) == (16, 64)
    assert [one for one in shown.teacher_ids if one != image] == [
        one for one in shown.token_ids if one != image
    ]
    assert text.teacher_ids is None
    same = loaded(folder, rows, student, tokenizer_of(folder, "llava")).train
    assert [one.teacher_ids for one in same] == [None, None]
    with pytest.raises(DataError, match="reads text alone"):
        loaded(folder, rows, student, vision_models.tokenizer())


def test_a_teacher_of_another_family_writes_its_own_marks(folder: Path) -> None:
    rows = [{"image": "0.png", "prompt": "A?", "response": "B"}]
    [prompt] = loaded(folder, rows, tokenizer_of(folder, "llava"), tokenizer_of(folder, "qwen2_5_vl")).train
    assert prompt.teacher_ids is not None
    text = vision_models.tokenizer().decode(prompt.teacher_ids)
    assert text.startswith("user: <|vision_start|><|image_pad|>")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_templates_without_images_carry_them(folder: Path, family: Family) -> None:
    tokenizer = tokenizer_of(folder, family)
    row = {"images": ["1.png"], "instruction": "What is it?", "output": "A"}
    image = tokenizer.image_expander.image_text
    for template, begins in (
        ("plain", ""), ("alpaca", "Below is an instruction that describes a task. Write a response that "
                                  "appropriately completes the request.\n\n### Instruction:\n"),
        ({"kind": "custom", "without_input": "Q: {instruction}"}, "Q: "),
    ):  # fmt: skip
        [prompt] = loaded(folder, [row], tokenizer, template=template).train
        assert prompt.text.startswith(f"{begins}{image}\nWhat is it?")
        assert len(prompt.token_ids) > len(tokenizer(prompt.text).input_ids)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    [prompt] = loaded(folder, [row], tokenizer, template="chat").train
    assert prompt.text.startswith(f"user: {image}\nWhat is it?")


def test_a_chat_template_of_content_parts_alone_reads_text_rows_too(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, "llava")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] if part['type'] == 'image' %}"
        "<image>{% endfor %}{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = [{"image": "1.png", "prompt": "A?", "response": "B"}, {"prompt": "A?", "response": "B"}]
    shown, text = loaded(folder, rows, tokenizer).train
    assert (shown.text, text.text) == ("user:<image>A?</s>assistant:", "user:A?</s>assistant:")
    assert shown.response_ids == text.response_ids == tuple(tokenizer("B</s>").input_ids)


def test_a_large_set_is_on_disk_until_a_row_has_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(folder, "llava")
    text = [{"prompt": f"Say {number}", "response": "A"} for number in range(9)]
    both = [*text, {"prompt": "What?", "images": ["0.png"], "response": "B"}]
    rules: dict[str, Any] = {"token_cache": str(tmp_path / "cache"), "bad_rows": "drop", "workers": 2}
    few = [loaded(folder, rows, tokenizer, **rules).train for rows in (text, both)]
    monkeypatch.setattr(base, "LARGE_BYTES", 0)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 4)
    monkeypatch.setattr(chunks, "LOOKED_AT", 5)
    without = loaded(folder, both, vision_models.tokenizer(), **rules)
    assert without.report["sets"][0]["dropped"] == {NOT_READ: 1}
    many = [loaded(folder, rows, tokenizer, **rules).train for rows in (text, both)]
    assert [type(prompts) for prompts in many] == [StoredPrompts, tuple]
    assert [tuple(prompts) for prompts in many] == few
    assert many[1][-1].images == few[1][-1].images != ()
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_a_spelled_image_token_is_text(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, "llava")
    parts = [{"type": "image", "path": "1.png"}, {"type": "text", "text": "What does <image> mean?"}]
    [prompt] = loaded(folder, [{"messages": [turn("user", parts), turn("assistant", "A")]}], tokenizer).train
    assert prompt.token_ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 16


def test_long_prompts_lose_text_and_no_image(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, "llava")
    image = tokenizer.convert_tokens_to_ids("<image>")
    rows = [
        {
            "images": ["0.png", "1.png"],
            "prompt": "<image>" + "a" * 50 + "<image>" + "b" * 50,
            "response": "c",
        },
        {"images": ["0.png"], "prompt": "short", "response": "c"},
    ]
    for rule, text in (("truncate_right", "a" * 15), ("truncate_left", "b" * 15)):
        data = loaded(folder, rows, tokenizer, max_prompt=32 + 21 + 14, too_long={"prompt": rule})
        assert data.train[0].token_ids.count(image) == 32
        assert text in tokenizer.decode(data.train[0].token_ids)
        assert data.report["sets"][0]["truncated"] == {"prompt": 1}
    data = loaded(folder, rows, tokenizer, max_prompt=40, too_long={"prompt": "truncate_right"})
    assert data.report["sets"][0]["dropped"] == {"prompt with images too long": 1}


def test_images_between_the_answers_that_are_trained_on_stay_with_the_response(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, "llava")
    row = {"images": ["0.png", "1.png"],
           "messages": [turn("user", "<image>A?"), turn("assistant", "B"), turn("user", "<image>C?"),
                        turn("assistant", "D")]}  # fmt: skip
    [prompt] = loaded(folder, [row], tokenizer, train_on="all").train
    response = prompt.reference_response()
    assert response is not None
    assert [one.width for one in response.all_images] == [48, 16]
    image = tokenizer.convert_tokens_to_ids("<image>")
    places = [at for at, one in enumerate(response.token_ids) if one == image]
    assert len(places) == 16
    assert response.trained is not None
    assert not any(response.trained[at] for at in places)


def test_rows_with_images_are_refused_or_counted_where_the_student_reads_text_alone(folder: Path) -> None:
    rows = [{"image": "9.png", "prompt": "A?", "response": "B"}, {"prompt": "A?", "response": "B"}]
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: number of images: 1; the model of .* reads text alone"
    ):
        loaded(folder, rows, byte_tokenizer())
    data = loaded(folder, rows, byte_tokenizer(), bad_rows="drop")
    assert data.report["sets"][0]["dropped"] == {"images that the model does not read": 1}
    assert len(loaded(folder, rows, byte_tokenizer(), ignore=["image"]).train) == 2


def test_images_that_cannot_be_used_are_named_and_counted(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:150])
    rows = [
        {"images": ["0.png", "9.png"], "prompt": "A?", "response": "B"},
        {"images": ["cut.png"], "prompt": "A?", "response": "B"},
        {"images": ["http://127.0.0.1:9/a.png"], "prompt": "A?", "response": "B"},
        {"images": ["1.png"], "prompt": "A?", "response": "B"},
        {"images": ["0.png"], "prompt": "A?", "response": "B"},
    ]
    tokenizer = tokenizer_of(folder, "llava")
    with pytest.raises(DataError, match=r"rows.jsonl:1: image 2 \(9.png\) is not there"):
        loaded(folder, rows, tokenizer)
    data = loaded(folder, rows, tokenizer, bad_rows="drop", images={"min_side": 20})
    assert data.report["sets"][0]["dropped"] == {
        "image missing": 1,
        "image that cannot be decoded": 1,
        "image at a URL, which is not downloaded": 1,
        "image too small": 1,
    }
    assert "rows.jsonl:2: its image (cut.png) cannot be decoded" in data.report["sets"][0]["bad_rows"][1]
    [prompt] = loaded(folder, rows[-1:], tokenizer, images={"max_side": 24}).train
    assert (prompt.images[0].width, prompt.images[0].height) == (24, 16)


def test_bytes_data_urls_and_cells_of_datasets_show_the_same(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, "llava")
    path = folder / "0.png"
    picture = vision_models.picture(0, 48, 32)
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "prompt": datasets.Value("string")}
    )
    stored = datasets.Dataset.from_list([{"images": [picture], "prompt": "A?"}], features=features)
    stored.save_to_disk(str(folder / "saved"))
    found: list[ImageRef] = []
    data = path.read_bytes()
    encoded = base64.b64encode(data).decode()
    values = (str(path), data, {"bytes": data, "path": None}, picture, data_url(path), encoded)
    for value in values:
        rows = InMemory(name="rows", records=[{"image": value, "prompt": "A?"}])
        found += load_data(DataConfig(train=rows), tokenizer).train[0].images
    for source in (InMemory(name="rows", records=stored), str(folder / "saved")):
        config = (
            DataConfig.model_validate({"train": source})
            if isinstance(source, str)
            else DataConfig(train=source)
        )
        found += load_data(config, tokenizer).train[0].images
    assert len(found) == len(values) + 2
    assert len(set(found)) == 1
    assert {image.open().tobytes() for image in found} == {picture.tobytes()}
    again = InMemory(name="rows", records=[{"image": found[-1].source.as_json(), "prompt": "A?"}])
    assert load_data(DataConfig(train=again), tokenizer).train[0].images == (found[0],)


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_urls_are_downloaded_where_that_is_allowed_within_the_limits(folder: Path, server: str) -> None:
    tokenizer = tokenizer_of(folder, "llava")
    rows = [{"image": f"{server}/{name}.png", "prompt": "A?", "response": "B"} for name in ("0", "nowhere")]
    data = loaded(folder, rows, tokenizer, bad_rows="drop", images={"allow_urls": True})
    assert [one.images[0].width for one in data.train] == [48]
    assert data.report["sets"][0]["dropped"] == {"image that cannot be downloaded": 1}
    assert "404" in data.report["sets"][0]["bad_rows"][0]
    with pytest.raises(DataError, match=r"more than the 99 bytes of data\.images\.max_bytes"):
        loaded(folder, rows, tokenizer, images={"allow_urls": True, "max_bytes": 99})


def test_stage_rows_keep_the_images(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, "llava")
    [prompt] = loaded(folder, [{"image": "0.png", "prompt": "A?", "response": "B"}], tokenizer).train
    again = InMemory(name="rows", records=[{**prompt.as_fields(), "response": "B"}])
    [read] = load_data(DataConfig(train=again), tokenizer).train
    assert read.content == prompt.content


def test_rows_with_images_as_a_page(folder: Path) -> None:
    rows = [
        {"image": "0.png", "prompt": "<b>?", "response": "B"},
        {"image": "9.png", "prompt": "A?", "response": "B"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "run.yaml").write_text(
        f"recipe: sft\nstudent: {{path: {folder / 'llava'}}}\ndata: {{train: {folder / 'rows.jsonl'}}}\n"
    )
    views = list(row_views(resolve(folder / "run.yaml", []).config))
    write_row_page(folder / "rows.html", views)
    page = (folder / "rows.html").read_text("utf-8")
    assert page.count('src="data:image/jpeg;base64,') == 1
    assert "&lt;b&gt;?" in page
    assert "&lt;image&gt; x 16" in page
    assert '<span class="trained ">B</span>' in page
    assert "(9.png) is not there" in page
    assert "http" not in page
    assert views[0].as_json()["images"][0]["width"] == 48


def test_first_tokens_of_a_task_never_cut_an_image(folder: Path) -> None:
    rows = [{"prompt": "What is it, and where?", "response": "a"}, {"prompt": "It?", "images": ["0.png"]}]
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps({"response": "a", **row}) + "\n" for row in rows), "utf-8")
    task = VqaTask.model_validate({"data": str(path), "max_prompt": 10, "too_long": "first_tokens"})
    found = task.load(Encoder(Plain(), tokenizer_of(folder, "llava")), DataConfig(train=str(path)))
    assert [len(prompt.token_ids) for prompt in found.prompts] == [10]
    assert found.dropped == {"prompt with images too long": 1}
    assert found.truncated == {"prompt": 1}
