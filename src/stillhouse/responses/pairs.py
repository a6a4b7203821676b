"""A teacher-written and a student-written response to each prompt (DistiLLM-2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stillhouse.engines.base import Sampling
from stillhouse.responses.base import REGISTRY, Context, ResponsesConfig, Stateless
from stillhouse.responses.generated import GeneratedPolicy
from stillhouse.types import Progress, Prompt, Response


@REGISTRY.register
class Pairs(ResponsesConfig):
    """Both sides for each prompt: the teacher writes once, the student at each `refresh`.

    Paper: DistiLLM-2 (arXiv 2503.07067), Algorithm 1.
    """

    kind: Literal["pairs"] = "pairs"
    refresh: Literal["never", "epoch", "step"] = "epoch"
    """When the student writes anew: "epoch" is the paper's batched on-policy round."""
    teacher_sampling: Sampling | None = None
    """How the teacher samples; default: `engine.sampling`."""
    student_sampling: Sampling | None = None
    """How the student samples; default: `engine.sampling`."""

    def writers(self) -> frozenset[str]:
        """Both."""
        return frozenset({"teacher", "student"})

    def sources(self) -> frozenset[str]:
        """Both."""
        return frozenset({"teacher", "student"})

    def sequences_per_prompt(self) -> int:
        """Two."""
        return 2

    def build(self, context: Context) -> PairsPolicy:
        """The running policy."""
        assert context.teacher is not None
        assert context.student is not None
        teacher = GeneratedPolicy(context, context.teacher, "never", self.teacher_sampling)
        student = GeneratedPolicy(context, context.student, self.refresh, self.student_sampling)
        return PairsPolicy(teacher, student)


class PairsPolicy(Stateless):
    """Puts the two sides of each prompt side by side."""

    def __init__(self, teacher: GeneratedPolicy, student: GeneratedPolicy) -> None:
        self._teacher = teacher
        self._student = student

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """[teacher's response, student's response] for each prompt."""
        sides = zip(
            self._teacher.one_each(prompts, progress), self._student.one_each(prompts, progress), strict=True
        )
        return [list(pair) for pair in sides]
