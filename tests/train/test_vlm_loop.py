"""Vision-language pairs of every family against the plain loop of examples/vlm_loop.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import ROOT, script
from tests.train.steps import taken
from tests.train.test_step import NOW, Given
from tests.vision_models import FAMILIES, Family, image, picture, tokenizer, vision_model
from torch import nn

from stillhouse.core.types import Prompt, Response
from stillhouse.models import (
    ImageReader,
    StudentConfig,
    TeacherModel,
    image_reader,
    load_student,
    load_teacher,
)
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step

LOOP = script(ROOT / "examples" / "vlm_loop.py")
ROWS = (
    ("<image>What is it?", (image(0),), "A box."),
    ("<image> and <image>: the same?", (image(1, 16, 40), image(2, 24, 24)), "No"),
    ("Say something.", (), "Something else."),
    ("Is <image> like <image>?", (image(3), image(1, 16, 40)), "No, it is not."),
)
"""One image, two in a row, none, and two of which one was in another row."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vlm")
    students = {family: vision_model(root / family, family, 0) for family in FAMILIES}
    teachers = {
        f"{family}-teacher": vision_model(root / f"{family}-teacher", family, 1, size=24, width=24, tower=24)
        for family in ("llava-siglip", "qwen3_vl")
    }
    return {**students, **teachers}


def reader_of(model: nn.Module) -> ImageReader:
    found = image_reader(model)
    assert found is not None
    return found


def read_by(reader: ImageReader, text: str, images: Any) -> tuple[int, ...]:
    """Token ids of a prompt as a model reads it."""
    pieces = text.replace("<image>", reader.image_text).split(reader.image_token)
    whole = "".join(piece + shown for piece, shown in zip(pieces, [*reader.expand(images), ""], strict=True))
    return tuple(tokenizer()(whole).input_ids)


PAIRS: tuple[tuple[Family, str], ...] = (
    ("llava", "qwen3_vl-teacher"),
    ("idefics3", "llava-siglip-teacher"),
    ("qwen2_5_vl", "llava-siglip-teacher"),
)
"""Of other families, towers and numbers of image tokens."""


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("family", "teacher_name"), PAIRS)
def test_loss_and_gradient_are_those_of_transformers_alone(
    folders: dict[str, Path], family: Family, teacher_name: str, padding: int
) -> None:
    words = tokenizer()
    config = StudentConfig(path=str(folders[family]), tower="trained")
    student = load_student(config, words, None, seed=0)
    teacher = load_teacher(TeacherModel(path=str(folders[teacher_name])))
    ours, theirs = reader_of(student), reader_of(teacher)
    assert [ours.num_tokens(one) for one in ROWS[1][1]] != [theirs.num_tokens(one) for one in ROWS[1][1]]
    plain: Any = copy.deepcopy(student)
    plain.train()
    responses, rows = [], []
    for number, (text, images, answer) in enumerate(ROWS):
        ids = (*words(answer).input_ids, words.eos_token_id)
        read, by_teacher = read_by(ours, text, images), read_by(theirs, text, images)
        prompt = Prompt(f"row:{number}", read, text, teacher_ids=by_teacher, images=images)
        responses.append(Response(prompt, ids, "fixed"))
        inputs = [
            LOOP.encode(
                one.processor,
                text.replace("<image>", LOOP.image_text(one.processor)),
                [shown.open() for shown in images],
                list(ids),
            )
            for one in (ours, theirs)
        ]
        assert inputs[0]["input_ids"][0].tolist() == [*read, *ids]
        rows.append((*inputs, len(ids)))
    step = Step(
        Method(FixedConfig(), build("forward_kl"), "token"),
        Given([[one] for one in responses]),
        {"main": LiveTeacher(teacher, len(words))},
        words.pad_token_id,
        len(words),
    )
    loss, _ = taken(step, student.train(), 2, NOW, padding)
    assert loss == pytest.approx(LOOP.accumulate(plain, teacher, rows), rel=1e-5)
    reached = 0
    for (name, mine), (other, wanted) in zip(
        student.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        assert (mine.grad is None) == (wanted.grad is None), name
        if mine.grad is not None and wanted.grad is not None:
            reached += int(wanted.grad.abs().max() > 0)
            torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert reached > 40


def test_the_loop_runs_by_itself(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(1).save(tmp_path / "one.png")
    rows = [
        {"prompt": "<image>What?", "images": ["one.png"], "response": "A box."},
        {"prompt": "Say it.", "response": "Yes"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    LOOP.main(str(folders["llava"]), str(folders["llava-siglip-teacher"]), str(data))
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert (tmp_path / "distilled" / "processor_config.json").exists()
