"""What the student writes at each step, alone or with some help from the teacher (on-policy; MiniLLM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.core.requirements import STUDENT, Requirements
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, TOGETHER, ResponsesConfig, RolloutContext, StatelessPolicy
from stillhouse.rollouts.generator import ResponseGenerator


@REGISTRY.register
class OnPolicy(ResponsesConfig):
    """At every step the student writes for the step's prompts.

    With `teacher_share` s each token is drawn from (1 - s) q + s p (MiniLLM, arXiv 2306.08543, section 2.2,
    s = 0.2): the teacher keeps the text from degenerating. The objective `policy_gradient` corrects for it by
    its `sampling_teacher_share`, which has to be the same number.

    Example: `responses: {kind: on_policy, teacher_share: 0.2, sampling: {temperature: 1.0}}`
    """

    kind: Literal["on_policy"] = "on_policy"
    teacher_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the teacher in the distribution that tokens are drawn from; `sampling` acts on the mixture."""
    sampling: Sampling | None = None
    """How tokens are drawn; default: `engine.sampling`."""

    def requirements(self) -> Requirements:
        """The student's text; if the teacher has a share, its model in this process over the same tokens."""
        return Requirements.of(STUDENT, "text") | (TOGETHER if self.teacher_share else Requirements())

    def sources(self) -> frozenset[str]:
        """The student's."""
        return frozenset({"student"})

    def build(self, context: RolloutContext) -> OnPolicyPolicy:
        """The running policy."""
        assert context.student is not None
        generator = context.student
        if self.teacher_share:
            generator = mixed_with_teacher(context, self.teacher_share)
        return OnPolicyPolicy(generator, context, self.sampling)


class OnPolicyPolicy(StatelessPolicy):
    """Writes afresh; what is written depends on the weights, the prompts, the seed and the step."""

    def __init__(
        self, generator: ResponseGenerator, context: RolloutContext, sampling: Sampling | None
    ) -> None:
        self._generator = generator
        self._generation_seed = context.generation_seed
        self._sampling = sampling

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response for each prompt."""
        seed = self._generation_seed("on-policy", progress.step)
        return [[response] for response in self._generator.generate(prompts, seed, self._sampling)]


def mixed_with_teacher(context: RolloutContext, share: float) -> ResponseGenerator:
    """The student's generator, which draws from its own distribution mixed with the teacher's."""
    from stillhouse.engines.mixture import MixtureEngine, MixtureModel

    assert context.student is not None
    assert context.models is not None
    models = context.models
    mixture = MixtureModel(models.student, models.teacher, share, models.vocab_size)
    return replace(context.student, engine=MixtureEngine(mixture, models.facts))
