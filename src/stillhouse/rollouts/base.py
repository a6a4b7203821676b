"""The interface of every response policy, and random numbers that need no state.

Every draw is a function of (seed, purpose, step), so a resumed run makes the same draws as one that never
stopped, and all ranks agree without talking to each other.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BeforeValidator, SerializeAsAny

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import TokenizerFacts
from stillhouse.rollouts.memory import TeacherMemory
from stillhouse.rollouts.offline.filters.base import no_texts
from stillhouse.rollouts.writer import Writer

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Pair:
    """Student and teacher in this process, for policies that sample from both together."""

    student: nn.Module
    teacher: nn.Module
    facts: TokenizerFacts
    vocab: int
    """Number of token ids that both share."""


@dataclass(frozen=True)
class Context:
    """What a policy may use."""

    prompts: Sequence[Prompt]
    """All prompts of the training set."""
    student: Writer | None
    teacher: Writer | None
    folder: Path
    """Where whole rounds of responses are kept, so that a resumed run reads instead of writing them again."""
    seed: int
    memory: TeacherMemory = field(default_factory=TeacherMemory)
    """Where a policy asks to keep the teacher's hidden states of responses that it will give again."""
    pair: Pair | None = None
    """Both models; None if there is no teacher in this process."""
    rank: int = 0
    """Which of `ranks` processes this one is; for policies that choose prompts themselves."""
    ranks: int = 1
    decode: Callable[[Sequence[int]], str] | None = None
    """Token ids as text, for files and filters; never back."""
    score: Mapping[str, Callable[[Sequence[Response]], list[float]]] = field(default_factory=dict)
    """By "teacher" and "student": mean log-probabilities of responses, in nats per token."""
    held_out: Callable[[], Sequence[str]] = no_texts
    """Prompts and references of every set that the run evaluates on."""
    others: Mapping[str, Mapping[tuple[int, ...], Response]] = field(default_factory=dict)
    """Responses of other generators, by the generator's name and the prompt's token ids."""

    def text_seed(self, purpose: str, *which: object) -> int:
        """The seed of text that this process writes for prompts of its own.

        Another one in each process, or the n-th prompts of all of them would be answered with the same random
        numbers; the first process has the seed of one that is alone.
        """
        return derived_seed(self.seed, purpose, *which, *([self.rank] if self.rank else []))


class Policy(Protocol):
    """Gives the responses of one optimiser step."""

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """The responses for each prompt, in the order of the prompts.

        Args:
            now: this policy's configuration with plain numbers instead of schedules.
            prompts: the prompts of the step.
            progress: how far the training has come.
        """
        ...

    def facts(self) -> dict[str, float]:
        """What the metrics log should show of the last draw."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved beside the weights; empty if the draws depend on the step alone."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


class Stateless:
    """A policy that remembers nothing between steps."""

    def facts(self) -> dict[str, float]:
        """Nothing to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class ResponsesConfig(StrictConfig):
    """Whose responses a step trains on."""

    kind: str

    def writers(self) -> frozenset[str]:
        """Who has to write text for this policy: of "student" and "teacher"."""
        return frozenset()

    def together(self) -> bool:
        """Whether text is drawn from student and teacher together, so that both must be in this process."""
        return False

    def needs_reference(self) -> bool:
        """Whether prompts need a response from the data set."""
        return False

    def needs(self) -> frozenset[str]:
        """What its filters need, of "teacher_logprob" and "held_out"."""
        return frozenset()

    def mixes_tokens(self) -> bool:
        """Whether single tokens of student and teacher stand in one response, so that both must share a
        tokenizer."""
        return False

    def sequences_per_prompt(self) -> int:
        """How many sequences one prompt gives."""
        return 1

    @abstractmethod
    def sources(self) -> frozenset[str]:
        """The sources of the responses it can give; each needs an objective."""

    @abstractmethod
    def build(self, context: Context) -> Policy:
        """The running policy."""


REGISTRY: Registry[ResponsesConfig] = Registry("response policy", ResponsesConfig)  # type: ignore[type-abstract]
ResponsesField = Annotated[SerializeAsAny[ResponsesConfig], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a response policy."""


def derived_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends on `seed` and on what it is for, the same on every machine and rank."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derived_uniform(seed: int, *purpose: object) -> float:
    """A number in [0, 1) that depends on `seed` and on what it is for."""
    return derived_seed(seed, *purpose) / 2**63
