"""What policies that work in rounds have in common: options, and the running policy over their sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf
from stillhouse.core.requirements import MAIN, Requirements
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.errors import DataError, ModelError
from stillhouse.rollouts.base import ResponsesConfig, RolloutContext
from stillhouse.rollouts.offline.apply_filters import requirements_of
from stillhouse.rollouts.offline.curated import Curated
from stillhouse.rollouts.offline.filters import FilterField
from stillhouse.rollouts.offline.filters.base import TEACHER_LOGPROB
from stillhouse.rollouts.offline.rounds import CHUNK, Setting
from stillhouse.rollouts.offline.side import Side


class InRounds(ResponsesConfig):
    """Responses that are written for all prompts before anybody trains on them, and may be filtered."""

    refresh: Literal["never", "epoch", "step"] = "never"
    """When to write anew."""
    filters: ListOf[FilterField] = ()
    """What a round passes through, in order (docs/curation.md). A prompt is dropped if one of its sides is,
    and another prompt of the round takes its place in the batch; responses/curation.json counts it all."""
    resample: Annotated[int, Field(ge=0)] = 0
    """How often a dropped response is written again, with a fresh seed, before its prompt is dropped."""
    scores: ListOf[Literal["teacher", "student"]] = ()
    """Also measure how likely these find each response when it is written, for `stillhouse show`; each costs
    a forward pass over the round. What a filter needs is measured anyway."""
    chunk: Annotated[int, Field(ge=1)] = CHUNK
    """Responses that are written before they are saved: the most that an interruption costs."""

    @model_validator(mode="after")
    def _filters_need_rounds(self) -> Self:
        if self.refresh == "step" and (self.filters or self.scores):
            raise ValueError("filters and scores need whole rounds: set refresh to epoch or never, not step")
        return self

    def requirements(self) -> Requirements:
        """What the filters and `scores` need."""
        needs = requirements_of(self.filters)
        return needs | TEACHER_LOGPROB if "teacher" in self.scores else needs

    def teacher_side_of(self, context: RolloutContext) -> Side | None:
        """The teacher's side of every round, which does not depend on the student; None if it has none."""
        return None

    def setting(self, context: RolloutContext, side: Literal["teacher", "student"]) -> Setting:
        """How the rounds of one side are made.

        Raises:
            ModelError: a score is needed of a model that is not in this process.
        """
        filters = [one for one in self.filters if one.sides in ("all", side)]
        asked = requirements_of(filters).asks(MAIN, "distribution")
        wanted = {*self.scores, *(["teacher"] if asked else [])}
        absent = wanted - context.scorers.keys()
        if absent:
            raise ModelError(
                f"responses.filters: likelihood under the {min(absent)} needs its model in this process. "
                "Take teacher: {kind: live}, or leave out logprob_floor and scores."
            )
        score = {name: context.scorers[name] for name in sorted(wanted)}
        return Setting(context.rank, context.world_size, context.decode, score, self.chunk)


class RoundsPolicy:
    """Gives the responses of the newest round; with `refresh: step` writes for the step's prompts alone."""

    def __init__(self, config: InRounds, context: RolloutContext, sides: Mapping[str, Side]) -> None:
        self._refresh = config.refresh
        self._seed = context.seed
        self._sides = sides
        self._rounds = Curated(context, sides, config.filters, config.resample)
        self._metrics: dict[str, float] = {}
        self._written: dict[str, dict[str, Response]] = {}

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response from each side for each prompt, or for another one where the prompt was dropped."""
        if self._refresh == "step":
            columns = [self._column(side, prompts, progress) for side in self._sides.values()]
            return [list(group) for group in zip(*columns, strict=True)]
        current = self._rounds.round(int(progress.epoch) if self._refresh == "epoch" else 0)
        taken = {prompt.id for prompt in prompts}
        drawn = [current.group(prompt, taken, self._seed) for prompt in prompts]
        self._metrics = dict(current.facts)
        if self._metrics:
            away = sum(prompt.id not in current.groups for prompt in prompts)
            self._metrics["curation/replaced"] = away / len(prompts)
        return [list(group) for group in drawn]

    def metrics(self) -> dict[str, float]:
        """What the filters left of the round: its share, what was written again, and the step's stand-ins."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """Which weights wrote the newest round on each side."""
        return {name: side.state_dict() for name, side in self._sides.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name, side in self._sides.items():
            side.load_state_dict(state.get(name, {}))

    def _column(self, side: Side, prompts: Sequence[Prompt], progress: Progress) -> list[Response]:
        if side.every_step:
            return side.fresh(prompts, progress)
        if side.source not in self._written:
            self._written[side.source] = _by_prompt(side)
        return [self._written[side.source][prompt.id] for prompt in prompts]


def _by_prompt(side: Side) -> dict[str, Response]:
    """The responses of a side that is written once, by prompt.

    Raises:
        DataError: some prompts have none.
    """
    samples = side.samples(0)
    missing = [sample.response.prompt.id for sample in samples if sample.missing]
    if missing:
        raise DataError(
            f"responses.teacher_side: {len(missing)} of {len(samples)} prompts have no response, first "
            f"{missing[0]}. Let the teacher write those (teacher_side: [..., teacher]), or set "
            "responses.refresh: epoch, whose rounds leave such prompts out and count them."
        )
    return {sample.response.prompt.id: sample.response for sample in samples}
