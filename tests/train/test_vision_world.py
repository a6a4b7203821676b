"""Two processes, of which one may have rows of text alone, train a vision-language student as one does."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.children import ranks
from tests.train.test_world import arguments_of_a_rank, weights
from tests.vision_models import image, tokenizer, vision_model

from stillhouse.core.distributed import Ranks
from stillhouse.core.types import Prompt
from stillhouse.models import StudentConfig, image_reader, load_student
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig, FixedPolicy
from stillhouse.train.step import Method, Step
from stillhouse.train.trainer import StepTrainer


def train(folder: Path, accumulation: int) -> None:
    arguments = arguments_of_a_rank(folder, 3, 1, accumulation, ddp_find_unused_parameters=True)
    words = tokenizer()
    config = StudentConfig(path=str(folder.parent / "student"), tower="trained", gradient_checkpointing=True)
    student = load_student(config, words, None, 0).double()
    reader = image_reader(student)
    prompts = []
    for number in range(8):
        shown = (image(number),) if number % 3 == 0 else ()
        ids = tuple(words(f"{number}".join(reader.expand(shown)) + "What?").input_ids)
        prompts.append(Prompt(f"train:{number}", ids, "", response_ids=(40 + number, 1), images=shown))
    step = Step(
        Method(FixedConfig(), build("cross_entropy"), "token"),
        FixedPolicy(),
        {},
        0,
        len(words),
        world=Ranks.of(arguments),
    )
    StepTrainer(step=step, model=student, args=arguments, train_dataset=prompts).train()
    if arguments.process_index == 0:
        folder.mkdir(exist_ok=True)
        torch.save(student.state_dict(), folder / "weights.pt")


def test_a_process_without_images_waits_for_nobody(tmp_path: Path) -> None:
    vision_model(tmp_path / "student", "llava", 1)
    assert ranks(1, train, tmp_path / "one", 2) == [0]
    assert ranks(2, train, tmp_path / "two", 1) == [0, 0]
    together = weights(tmp_path / "two")
    for name, expected in weights(tmp_path / "one").items():
        torch.testing.assert_close(together[name], expected, rtol=1e-9, atol=1e-11, msg=name)
