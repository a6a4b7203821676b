"""A real student and teacher, tiny, and the context of a policy around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny

from stillhouse.core.types import Progress
from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig
from stillhouse.rollouts import ResponseGenerator, RolloutContext
from stillhouse.rollouts.base import ModelPair

FACTS = TokenizerInfo(eos_ids=(tiny.END,), pad_id=tiny.PAD)


class Clock:
    """The optimiser step of the student's weights."""

    step = 0


def context(
    folder: Path, clock: Clock, prompts: int = 12, positions: int = 128, **more: Any
) -> RolloutContext:
    student = tiny.model(1, max_position_embeddings=positions)
    teacher = tiny.model(2, width=24, max_position_embeddings=positions)
    sampling = Sampling(max_tokens=8)
    engines = [TransformersConfig().build(model, FACTS) for model in (student, teacher)]
    return RolloutContext(
        tiny.prompts(prompts),
        ResponseGenerator(engines[0], "student", sampling, lambda: clock.step),
        ResponseGenerator(engines[1], "teacher", sampling, lambda: None),
        folder,
        seed=5,
        models=ModelPair(student.eval(), teacher.eval(), FACTS, tiny.VOCAB),
        **more,
    )


def at(step: int, steps: int = 40) -> Progress:
    return Progress(step, steps, step / 10, steps / 10)
