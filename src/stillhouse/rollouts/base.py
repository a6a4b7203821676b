"""The interface of every response policy, and what a policy may use of a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BeforeValidator, SerializeAsAny

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.distributed import SingleProcess, World
from stillhouse.core.requirements import MAIN, Requirements, RunFacts
from stillhouse.core.seeds import derived_seed
from stillhouse.core.shared import SharedResults
from stillhouse.core.types import Progress, Prompt, PromptContent, Response
from stillhouse.data import DataConfig
from stillhouse.data.tokenise import Encoder
from stillhouse.engines.base import Sampling, TokenizerInfo
from stillhouse.errors import Fault
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.hidden_cache import TeacherHiddenCache

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelPair:
    """Student and teacher in this process, for policies that sample from both together."""

    student: nn.Module
    teacher: nn.Module
    tokenizer_info: TokenizerInfo
    vocab_size: int
    """Number of token ids that both share."""


@dataclass(frozen=True)
class RolloutContext:
    """What a policy may use of a run."""

    prompts: Sequence[Prompt]
    """All prompts of the training set."""
    student: ResponseGenerator | None
    teacher: ResponseGenerator | None
    folder: Path
    """Where rounds of responses are stored, so that a resumed run reads them instead of generating again."""
    seed: int
    hidden_cache: TeacherHiddenCache = field(default_factory=TeacherHiddenCache)
    """Where a policy retains the teacher's hidden states of responses that it will replay."""
    models: ModelPair | None = None
    """Both models; None if there is no teacher in this process."""
    world: World = field(default_factory=SingleProcess)
    """The processes that train together: each writes the responses to its own prompts."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Token ids to text, for files and filters; never back."""
    scorers: Mapping[str, Callable[[Sequence[Response]], list[float]]] = field(default_factory=dict)
    """By "teacher" and "student": the mean log-probability of each response, in nats per token."""
    rewards: Callable[[Sequence[Response]], list[float]] | None = None
    """What the reward model of `ResponsesConfig.reward_model_path` gives each response; None without one."""
    held_out: Callable[[], Sequence[str]] = tuple
    """Prompts and references of every set that the run evaluates on."""
    shared: SharedResults | None = None
    """Where several runs keep rounds of the teacher that do not differ between them."""
    external_responses: Mapping[str, Mapping[PromptContent, Response]] = field(default_factory=dict)
    """Responses of other generators, by the generator's name and the prompt's content."""

    def rewarded(self, responses: Sequence[Response]) -> list[Response]:
        """The same responses with their rewards, where there is a reward model."""
        if self.rewards is None or not responses:
            return list(responses)
        given = self.rewards(responses)
        return [replace(one, reward=reward) for one, reward in zip(responses, given, strict=True)]

    def write(
        self,
        generator: ResponseGenerator,
        prompts: Sequence[Prompt],
        sampling: Sampling | None,
        *purpose: object,
        places: Sequence[int] | None = None,
    ) -> list[Response]:
        """The responses of this process's prompts of a step.

        A response depends on the prompt, its place among the prompts of all processes, the weights, the run's
        seed and the purpose, so any number of processes writes the same.

        Args:
            generator: writes them.
            prompts: of this process.
            sampling: instead of the generator's default.
            *purpose: what they are for, and at which step.
            places: of the prompts among those of all processes; default: those of a step's prompts.
        """
        ids = self.world.local_indices(len(prompts)) if places is None else places
        return generator.generate(prompts, derived_seed(self.seed, *purpose), sampling, sample_ids=ids)


class ResponsePolicy(Protocol):
    """Provides the responses of one optimiser step."""

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """The responses to each prompt, in the order of the prompts.

        Args:
            now: this policy's configuration, with the step's numbers in place of schedules.
            prompts: the prompts of the step.
            progress: how far the training has come.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the last draw."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; empty if the draws depend on the step alone."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...

    def dealt_out(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What this process has to load, from the states of all of another number of processes."""
        ...


class StatelessPolicy:
    """A policy without state between steps."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def dealt_out(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Empty."""
        return {}


class ResponsesConfig(StrictConfig):
    """Where the responses come from that a step trains on."""

    kind: str

    def requirements(self) -> Requirements:
        """Which models generate text for it or take part in sampling, and what the data must have."""
        return Requirements()

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        """What is wrong with it in this run beyond what `requirements` can say; nothing by default."""
        return iter(())

    def row_facts(self, sampling: Sampling) -> frozenset[str]:
        """Facts on rows that not every batch has: "pairs", "sampled_logprobs".

        Args:
            sampling: the run's default.
        """
        own = getattr(self, "sampling", None) or sampling
        return frozenset({"sampled_logprobs"} if own.logprobs else ())

    def sampling_of(self, source: str) -> Sampling | None:
        """How it samples what "teacher" or "student" generates in rounds; None for the run's default."""
        return None

    def reward_model_path(self) -> str | None:
        """The reward model that reads each response as it is written; None: there is none."""
        return None

    def sampling_teacher_share(self) -> float:
        """The teacher's share in the distribution that the student's responses are sampled from."""
        return 0.0

    def external_responses(
        self, data: DataConfig, encoder: Encoder
    ) -> dict[str, dict[PromptContent, Response]]:
        """Responses of other generators, by the generator's name and the prompt's content; none by default.

        Args:
            data: the run's, for length limits.
            encoder: with the run's template and tokenizer.

        Raises:
            DataError: a file cannot be read.
        """
        return {}

    def known_responses(self, context: RolloutContext) -> list[Response]:
        """The responses that do not depend on the training, with which caches of teachers can be filled.

        By default those of the data set, if they are trained on.
        """
        if "fixed" not in self.sources():
            return []
        found = [prompt.reference_response() for prompt in context.prompts]
        return [response for response in found if response is not None]

    def sequences_per_prompt(self) -> int:
        """How many sequences one prompt gives."""
        return 1

    def generated_responses(self, prompts: int, steps: int, batch_size: int) -> dict[str, int]:
        """At most how many responses each model generates in a run, by "teacher" and "student".

        By default the student one to each prompt of each step, if its text is trained on.
        """
        return {"student": steps * batch_size} if "student" in self.sources() else {}

    def follows_schedule(self) -> bool:
        """Whether a schedule may let the student write less than `generated_responses` says."""
        return False

    @abstractmethod
    def sources(self) -> frozenset[str]:
        """The sources of the responses that it provides; each needs an objective."""

    @abstractmethod
    def build(self, context: RolloutContext) -> ResponsePolicy:
        """The running policy."""


SAMPLES_FROM_BOTH = replace(Requirements.of(MAIN, "weights"), same_tokenizer=frozenset({MAIN}))
"""The requirements of policies whose responses mix tokens of student and teacher."""

REGISTRY: Registry[ResponsesConfig] = Registry("response policy", ResponsesConfig, "fixed")  # type: ignore[type-abstract]
ResponsesField = Annotated[SerializeAsAny[ResponsesConfig], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a response policy."""
