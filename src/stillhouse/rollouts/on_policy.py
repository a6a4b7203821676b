"""What the student writes at each step, alone or with some help from the teacher (on-policy; MiniLLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, Context, ResponsesConfig, Stateless
from stillhouse.rollouts.writer import Writer


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

    def writers(self) -> frozenset[str]:
        """The student, and the teacher if it has a share."""
        return frozenset({"student", "teacher"} if self.teacher_share else {"student"})

    def together(self) -> bool:
        """If the teacher has a share."""
        return bool(self.teacher_share)

    def sources(self) -> frozenset[str]:
        """The student's."""
        return frozenset({"student"})

    def mixes_tokens(self) -> bool:
        """Yes if the teacher has a share."""
        return self.teacher_share > 0

    def build(self, context: Context) -> OnPolicyPolicy:
        """The running policy."""
        assert context.student is not None
        writer = context.student
        if self.teacher_share:
            writer = with_teacher(context, self.teacher_share)
        return OnPolicyPolicy(writer, context, self.sampling)


class OnPolicyPolicy(Stateless):
    """Writes afresh; what is written depends on the weights, the prompts, the seed and the step."""

    def __init__(self, writer: Writer, context: Context, sampling: Sampling | None) -> None:
        self._writer = writer
        self._text_seed = context.text_seed
        self._sampling = sampling

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response for each prompt."""
        seed = self._text_seed("on-policy", progress.step)
        return [[response] for response in self._writer.write(prompts, seed, self._sampling)]


def with_teacher(context: Context, share: float) -> Writer:
    """The student as a writer that draws from its own distribution mixed with the teacher's."""
    from stillhouse.engines.mixture import Mixture, MixtureEngine

    assert context.student is not None
    assert context.pair is not None
    pair = context.pair
    mixture = Mixture(pair.student, pair.teacher, share, pair.vocab)
    own = context.student
    return Writer(MixtureEngine(mixture, pair.facts), "student", own.sampling, own.version, told=own.told)
