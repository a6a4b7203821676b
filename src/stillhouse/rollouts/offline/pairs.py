"""A teacher-generated and a student-generated response to each prompt (DistiLLM-2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stillhouse.config import ListOf, StrictConfig, because
from stillhouse.core.requirements import MAIN, STUDENT, Requirements
from stillhouse.core.types import Prompt, PromptContent, Response
from stillhouse.data import DataConfig, load_prompts
from stillhouse.data.datasets import DatasetField
from stillhouse.data.tokenise import Encoder
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, RolloutContext
from stillhouse.rollouts.offline.generation import Refresh, RoundGenerator
from stillhouse.rollouts.offline.rounds import RoundsConfig
from stillhouse.rollouts.offline.samples import MISSING, Sample

_RESERVED = frozenset({"teacher", "student", "fixed", MISSING})


class ExternalResponses(StrictConfig):
    """Responses of another generator, from a file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """How they are labelled; not "teacher", "student", "fixed" or "missing"."""
    data: DatasetField
    """Rows with the same prompts and the generator's responses, such as a file of `stillhouse generate`."""


def _parse(value: Any) -> Any:
    """One entry or a list; a string is "teacher" or "fixed", a mapping another generator."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(ExternalResponses.model_validate(one) if isinstance(one, Mapping) else one for one in listed)


def _check_names(value: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [one.name if isinstance(one, ExternalResponses) else one for one in value]
    external = {one.name for one in value if isinstance(one, ExternalResponses)}
    if external & _RESERVED or len(set(names)) < len(names):
        raise PydanticCustomError(
            "names",
            "every generator needs a name of its own other than {reserved}; got {names}",
            {"reserved": ", ".join(sorted(_RESERVED)), "names": ", ".join(names)},
        )
    if "teacher" in names[:-1]:
        raise PydanticCustomError("order", "teacher must come last: it has a response to every prompt")
    return value


@REGISTRY.register
class PairsConfig(RoundsConfig):
    """Two responses to each prompt: the teacher generates once, the student at each `refresh`.

    Paper: DistiLLM-2 (arXiv 2503.07067), Algorithm 1.

    Example: `responses: {kind: pairs, refresh: epoch, filters: [empty, truncated], resample: 2}`
    """

    kind: Literal["pairs"] = "pairs"
    refresh: Refresh = "epoch"
    """When the student generates new responses: "epoch" is the paper's batched on-policy round."""
    teacher_sampling: Sampling | None = None
    """How the teacher samples; default: `engine.sampling`."""
    student_sampling: Sampling | None = None
    """How the student samples; default: `engine.sampling`."""
    teacher_responses: Annotated[
        ListOf[Literal["teacher", "fixed"] | ExternalResponses],
        Field(min_length=1),
        AfterValidator(_check_names),
        BeforeValidator(_parse),
    ] = ("teacher",)
    """Where the teacher's responses come from: the teacher, the data set ("fixed"), or another generator
    ({name: NAME, data: FILE}). Of a list, the first that has a response to the prompt; each response is
    labelled with its origin. The paper found the teacher's own responses best (figure 2b)."""

    def options_without_effect(self) -> dict[str, str]:
        found: dict[str, str] = super().options_without_effect()
        own = "teacher" in self._names
        return found if own else found | because("the teacher generates nothing", "teacher_sampling")

    @property
    def _names(self) -> list[str]:
        return [one.name if isinstance(one, ExternalResponses) else one for one in self.teacher_responses]

    def external_responses(
        self, data: DataConfig, encoder: Encoder
    ) -> dict[str, dict[PromptContent, Response]]:
        """The responses of the files in `teacher_responses`."""
        found = {}
        for one in self.teacher_responses:
            if not isinstance(one, ExternalResponses):
                continue
            prompts = load_prompts(one.name, one.data, data, encoder, needs={"responses"}).prompts
            found[one.name] = {
                prompt.content: response
                for prompt in reversed(prompts)  # of several responses to a prompt the first counts
                if (response := prompt.reference_response("teacher")) is not None
            }
        return found

    def requirements(self) -> Requirements:
        """The student's text; the teacher's unless all its responses are given; what the filters need."""
        needs = super().requirements() | Requirements.of(STUDENT, "text")
        if "teacher" in self._names:
            needs |= Requirements.of(MAIN, "text")
        if self._names == ["fixed"]:  # nothing else can stand in for the teacher
            needs |= Requirements(data=frozenset({"responses"}))
        return needs

    def row_facts(self, sampling: Sampling) -> frozenset[str]:
        """Pairs."""
        return frozenset({"pairs"})

    def sources(self) -> frozenset[str]:
        """Both: whatever stands in for the teacher's response counts as the teacher's."""
        return frozenset({"teacher", "student"})

    def sequences_per_prompt(self) -> int:
        """Two."""
        return 2

    def generated_responses(self, prompts: int, steps: int, batch_size: int) -> dict[str, int]:
        """The teacher's once, unless all are given; the student's at each `refresh`."""
        own = {"student": self.round_responses(self.refresh, prompts, steps, batch_size)}
        return {"teacher": prompts, **own} if "teacher" in self._names else own

    def sampling_of(self, source: str) -> Sampling | None:
        """`teacher_sampling` or `student_sampling`."""
        return {"teacher": self.teacher_sampling, "student": self.student_sampling}[source]

    def rounds(self, context: RolloutContext) -> dict[str, RoundGenerator]:
        """The teacher's responses, written once or given, and the student's."""
        given = [self._given(number, prompt, context) for number, prompt in enumerate(context.prompts)]
        teacher = RoundGenerator(
            context,
            "teacher",
            context.teacher if "teacher" in self._names else None,
            "never",
            self.teacher_sampling,
            self.options(context, "teacher"),
            given if any(given) else (),
        )
        student = RoundGenerator(
            context,
            "student",
            context.student,
            self.refresh,
            self.student_sampling,
            self.options(context, "student"),
        )
        return {"teacher": teacher, "student": student}

    def _given(self, number: int, prompt: Prompt, context: RolloutContext) -> Sample | None:
        """The response in the teacher's role that exists already; None if the teacher has to generate it."""
        for name in self._names:
            if name == "fixed":
                found = prompt.reference_response("teacher")
            else:
                found = context.external_responses.get(name, {}).get(prompt.content)
            if found is not None:
                text = context.decode(found.token_ids) if context.decode is not None else ""
                return Sample(number, replace(found, prompt=prompt), text, name)
        return None
