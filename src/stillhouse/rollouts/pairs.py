"""A teacher-written and a student-written response to each prompt (DistiLLM-2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stillhouse.config import ListOf, StrictConfig
from stillhouse.core.requirements import MAIN, STUDENT, Requirements
from stillhouse.core.types import Prompt, Response
from stillhouse.data.datasets import DatasetField
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, RolloutContext
from stillhouse.rollouts.offline.policy import InRounds, RoundsPolicy
from stillhouse.rollouts.offline.samples import Sample
from stillhouse.rollouts.offline.side import Side


class Other(StrictConfig):
    """Responses of another generator, from a file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """How its responses are labelled; not "teacher", "student" or "fixed"."""
    data: DatasetField
    """Rows with the same prompts and its responses, such as a file of `stillhouse generate`."""


def _parse(value: Any) -> Any:
    """One entry or a list; a text is "teacher" or "fixed", a mapping another generator."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(Other.model_validate(one) if isinstance(one, Mapping) else one for one in listed)


def _checked(value: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [one.name if isinstance(one, Other) else one for one in value]
    taken = {one.name for one in value if isinstance(one, Other)} & {"teacher", "student", "fixed"}
    if taken or len(set(names)) < len(names):
        raise PydanticCustomError(
            "names",
            "every generator needs a name of its own other than teacher, student and fixed; got {names}",
            {"names": ", ".join(names)},
        )
    if "teacher" in names[:-1]:
        raise PydanticCustomError("order", "teacher must come last: it has a response to every prompt")
    return value


@REGISTRY.register
class Pairs(InRounds):
    """Both sides for each prompt: the teacher writes once, the student at each `refresh`.

    Paper: DistiLLM-2 (arXiv 2503.07067), Algorithm 1.

    Example: `responses: {kind: pairs, refresh: epoch, filters: [empty, truncated], resample: 2}`
    """

    kind: Literal["pairs"] = "pairs"
    refresh: Literal["never", "epoch", "step"] = "epoch"
    """When the student writes anew: "epoch" is the paper's batched on-policy round."""
    teacher_sampling: Sampling | None = None
    """How the teacher samples; default: `engine.sampling`."""
    student_sampling: Sampling | None = None
    """How the student samples; default: `engine.sampling`."""
    teacher_side: Annotated[
        ListOf[Literal["teacher", "fixed"] | Other],
        Field(min_length=1),
        AfterValidator(_checked),
        BeforeValidator(_parse),
    ] = ("teacher",)
    """Whose responses stand on the teacher's side: the teacher's, the data set's ("fixed"), or another
    generator's ({name: NAME, data: FILE}). Of a list the first that has a response to the prompt; each is
    labelled with its name. The paper found the teacher's own text best (figure 2b)."""

    @property
    def _names(self) -> list[str]:
        return [one.name if isinstance(one, Other) else one for one in self.teacher_side]

    def others(self) -> dict[str, Any]:
        """The sources of other generators, by name."""
        return {one.name: one.data for one in self.teacher_side if isinstance(one, Other)}

    def requirements(self) -> Requirements:
        """The student's text; the teacher's unless its side is all given; what the filters need."""
        needs = super().requirements() | Requirements.of(STUDENT, "text")
        if "teacher" in self._names:
            needs |= Requirements.of(MAIN, "text")
        if self._names == ["fixed"]:  # nothing else can stand on the teacher's side
            needs |= Requirements(data=frozenset({"responses"}))
        return needs

    def row_facts(self, sampling: Sampling) -> frozenset[str]:
        """Pairs."""
        return frozenset({"pairs"})

    def sources(self) -> frozenset[str]:
        """Both: what stands on the teacher's side counts as the teacher's."""
        return frozenset({"teacher", "student"})

    def sequences_per_prompt(self) -> int:
        """Two."""
        return 2

    def build(self, context: RolloutContext) -> RoundsPolicy:
        """The running policy."""
        assert context.student is not None
        student = Side(
            context,
            "student",
            context.student,
            self.refresh,
            self.student_sampling,
            self.setting(context, "student"),
        )
        return RoundsPolicy(self, context, {"teacher": self.teacher_side_of(context), "student": student})

    def teacher_side_of(self, context: RolloutContext) -> Side:
        """What stands on the teacher's side."""
        given = [self._given(number, prompt, context) for number, prompt in enumerate(context.prompts)]
        return Side(
            context,
            "teacher",
            context.teacher if "teacher" in self._names else None,
            "never",
            self.teacher_sampling,
            self.setting(context, "teacher"),
            given if any(given) else (),
        )

    def _given(self, number: int, prompt: Prompt, context: RolloutContext) -> Sample | None:
        """What stands on the teacher's side of a prompt; None if the teacher has to write it."""
        for name in self._names:
            if name == "fixed":
                ids, finished = prompt.response_ids, prompt.response_finished
            else:
                found = context.external_responses.get(name, {}).get(prompt.token_ids)
                ids, finished = (None, True) if found is None else (found.token_ids, found.finished)
            if ids is not None:
                text = context.decode(ids) if context.decode is not None else ""
                return Sample(number, Response(prompt, ids, "teacher", finished), text, name)
        return None
