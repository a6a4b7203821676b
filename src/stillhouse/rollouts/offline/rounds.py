"""Policies that work in rounds: what they have in common, and the one with a single source (SeqKD)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf, because
from stillhouse.core.requirements import MAIN, STUDENT, Requirements
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.errors import DataError, ModelError
from stillhouse.rollouts.base import REGISTRY, ResponsesConfig, RolloutContext
from stillhouse.rollouts.offline.curation import CuratedRound, RoundCurator, requirements_of
from stillhouse.rollouts.offline.filters import TEACHER_LOGPROB, FilterField
from stillhouse.rollouts.offline.generation import CHUNK_SIZE, GenerationOptions, Refresh, RoundGenerator


class RoundsConfig(ResponsesConfig):
    """Responses that are generated for all prompts before any is trained on, and may be filtered."""

    refresh: Refresh = "never"
    """When to generate new responses."""
    filters: ListOf[FilterField] = ()
    """Applied to each round in order (docs/curation.md). A prompt is dropped with any of its responses, and
    another prompt of the round takes its place in the batch; responses/curation.json counts the drops."""
    resample: Annotated[int, Field(ge=0)] = 0
    """How often a dropped response is generated again, with a fresh seed, before its prompt is dropped."""
    scores: ListOf[Literal["teacher", "student"]] = ()
    """Also store the mean log-probability of each response under these models, for `stillhouse show`; each
    costs a forward pass over the round. What a filter needs is computed anyway."""
    chunk_size: Annotated[int, Field(ge=1)] = CHUNK_SIZE
    """Responses that are generated before they are saved: the most that an interruption costs."""

    @model_validator(mode="after")
    def _filters_need_rounds(self) -> Self:
        if self.refresh == "step" and (self.filters or self.scores):
            raise ValueError("filters and scores need whole rounds: set refresh to epoch or never, not step")
        return self

    def options_without_effect(self) -> dict[str, str]:
        found = {} if self.filters else because("there are no filters", "resample")
        return found | because("refresh is step", "chunk_size") if self.refresh == "step" else found

    def requirements(self) -> Requirements:
        """What the filters and `scores` need."""
        needs = requirements_of(self.filters)
        return needs | TEACHER_LOGPROB if "teacher" in self.scores else needs

    def round_responses(self, refresh: Refresh, prompts: int, steps: int, batch_size: int) -> int:
        """At most how many responses one model generates, without those that replace dropped ones."""
        if refresh == "step":
            return steps * batch_size
        rounds = 1 if refresh == "never" else -(-steps * batch_size // prompts)
        return prompts * rounds

    @abstractmethod
    def rounds(self, context: RolloutContext) -> dict[str, RoundGenerator]:
        """The rounds of each source, by its name."""

    def build(self, context: RolloutContext) -> RoundsPolicy:
        """The running policy."""
        return RoundsPolicy(self, context, self.rounds(context))

    def known_responses(self, context: RolloutContext) -> list[Response]:
        """Those that are written once for all prompts; a cache needs no room for those that follow."""
        samples = [
            sample for one in self.rounds(context).values() if one.written_once for sample in one.samples(0)
        ]
        return [sample.response for sample in samples if not sample.missing]

    def options(self, context: RolloutContext, source: Literal["teacher", "student"]) -> GenerationOptions:
        """How the stage files of one source are generated.

        Raises:
            ModelError: a score is needed of a model that is not in this process.
        """
        filters = [one for one in self.filters if one.source in ("all", source)]
        scored = requirements_of(filters).asks(MAIN, "distribution")
        wanted = {*self.scores, *(["teacher"] if scored else [])}
        absent = wanted - context.scorers.keys()
        if absent:
            raise ModelError(
                f"responses.filters: likelihood under the {min(absent)} needs its model in this process. "
                "Take teacher: {kind: live}, or leave out logprob_floor and scores."
            )
        scorers = {name: context.scorers[name] for name in sorted(wanted)}
        return GenerationOptions(
            context.world.rank, context.world.size, context.decode, scorers, self.chunk_size
        )


class RoundsPolicy:
    """Provides the responses of the newest round, or with `refresh: step` of the step itself."""

    def __init__(
        self, config: RoundsConfig, context: RolloutContext, generators: Mapping[str, RoundGenerator]
    ) -> None:
        self._refresh = config.refresh
        self._seed = context.seed
        self._context = context
        self._generators = generators
        self._curator = RoundCurator(context, generators, config.filters, config.resample)
        self._metrics: dict[str, float] = {}
        self._only_round: dict[str, dict[str, Response]] = {}

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response of each source to each prompt, or to another one where the prompt was dropped."""
        if self._refresh == "step":
            columns = [self._column(one, prompts, progress) for one in self._generators.values()]
            return [list(group) for group in zip(*columns, strict=True)]
        current = self._curator.round(int(progress.epoch) if self._refresh == "epoch" else 0)
        self._metrics = dict(current.metrics)
        if self._metrics:
            dropped = sum(prompt.id not in current.groups for prompt in prompts)
            self._metrics["curation/replaced"] = dropped / max(1, len(prompts))
        return [list(group) for group in self._groups(current, prompts)]

    def _groups(self, current: CuratedRound, prompts: Sequence[Prompt]) -> list[list[Response]]:
        """The responses to each prompt; those that stand in for dropped ones differ between processes."""
        if len(current.kept) == len(self._context.prompts):
            return [current.groups[prompt.id] for prompt in prompts]
        world, ids = self._context.world, [prompt.id for prompt in prompts]
        places = world.local_indices(len(ids))
        dealt = sorted(one for share in world.gather([*zip(places, ids, strict=True)]) for one in share)
        taken = {id for _, id in dealt}
        found = {place: current.group(id, taken, self._seed) for place, id in dealt}
        return [found[place] for place in places]

    def metrics(self) -> dict[str, float]:
        """The share of prompts that the filters kept, what was resampled, and the step's replaced prompts."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """Which weights generated the newest round of each source."""
        return {source: generator.state_dict() for source, generator in self._generators.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for source, generator in self._generators.items():
            generator.load_state_dict(state.get(source, {}))

    def dealt_out(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """That of any process: all have the same."""
        return states[0]

    def _column(
        self, generator: RoundGenerator, prompts: Sequence[Prompt], progress: Progress
    ) -> list[Response]:
        if generator.every_step:
            return generator.generate_step(prompts, progress)
        if generator.source not in self._only_round:
            self._only_round[generator.source] = _by_prompt(generator)
        return [self._only_round[generator.source][prompt.id] for prompt in prompts]


def _by_prompt(generator: RoundGenerator) -> dict[str, Response]:
    """The responses of a source that is generated once, by prompt.

    Raises:
        DataError: some prompts have none.
    """
    samples = generator.samples(0)
    missing = [sample.response.prompt.id for sample in samples if sample.missing]
    if missing:
        raise DataError(
            f"responses.teacher_responses: {len(missing)} of {len(samples)} prompts have no response, first "
            f"{missing[0]}. Let the teacher generate those (teacher_responses: [..., teacher]), or set "
            "responses.refresh: epoch, whose rounds leave such prompts out and count them."
        )
    return {sample.response.prompt.id: sample.response for sample in samples}


@REGISTRY.register
class GeneratedConfig(RoundsConfig):
    """Train on responses that the teacher or the student generates.

    Example: `responses: {kind: generated, by: teacher, filters: [empty, truncated]}`
    """

    kind: Literal["generated"] = "generated"
    by: Literal["teacher", "student"] = "teacher"
    """Which model generates them."""
    refresh: Refresh = "never"
    """When to generate new ones: once before training, for each epoch, or at each step (on-policy)."""
    sampling: Sampling | None = None
    """How they are sampled; default: `engine.sampling`."""

    def requirements(self) -> Requirements:
        """Text of the model that generates, and what the filters need."""
        return super().requirements() | Requirements.of(STUDENT if self.by == "student" else MAIN, "text")

    def sources(self) -> frozenset[str]:
        """The model that generates."""
        return frozenset({self.by})

    def generated_responses(self, prompts: int, steps: int, batch_size: int) -> dict[str, int]:
        """Those of the model that generates."""
        return {self.by: self.round_responses(self.refresh, prompts, steps, batch_size)}

    def sampling_of(self, source: str) -> Sampling | None:
        """`sampling`, for the model that generates."""
        return self.sampling if source == self.by else None

    def rounds(self, context: RolloutContext) -> dict[str, RoundGenerator]:
        """Those of its only source."""
        generator = context.student if self.by == "student" else context.teacher
        assert generator is not None
        options = self.options(context, self.by)
        return {self.by: RoundGenerator(context, self.by, generator, self.refresh, self.sampling, options)}
