"""Student-written responses for several steps at a time, used once or several times."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.core.requirements import STUDENT, Requirements
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, TOGETHER, ResponsesConfig, RolloutContext
from stillhouse.rollouts.on_policy import mixed_with_teacher
from stillhouse.rollouts.replay import pack, unpack


@REGISTRY.register
class Batched(ResponsesConfig):
    """Every `every` steps the student writes for as many batches of prompts; each response is used once.

    Between fully on-policy (1) and one round for each epoch: fewer and larger batches to write, at most
    `every` x `uses` - 1 steps stale. The prompts are the policy's own, instead of the step's: all of the
    training set in random order, anew for each pass.

    Example: `responses: {kind: batched, every: 8}`
    """

    kind: Literal["batched"] = "batched"
    every: Annotated[int, Field(ge=1)] = 8
    """Batches of prompts that one round answers."""
    uses: Annotated[int, Field(ge=1)] = 1
    """How often a round is trained on, each time in another order; PPO's epochs (MiniLLM's code: 4)."""
    teacher_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the teacher in the distribution that tokens are drawn from; see `on_policy`."""
    sampling: Sampling | None = None
    """How the student samples; default: `engine.sampling`."""

    def requirements(self) -> Requirements:
        """The student's text; if the teacher has a share, its model in this process over the same tokens."""
        return Requirements.of(STUDENT, "text") | (TOGETHER if self.teacher_share else Requirements())

    def sources(self) -> frozenset[str]:
        """The student's."""
        return frozenset({"student"})

    def build(self, context: RolloutContext) -> BatchedPolicy:
        """The running policy."""
        return BatchedPolicy(self, context)


class BatchedPolicy:
    """Hands out a round of responses, batch after batch."""

    def __init__(self, config: Batched, context: RolloutContext) -> None:
        assert context.student is not None
        self._every = config.every
        self._uses = config.uses
        self._sampling = config.sampling
        share = config.teacher_share
        self._generator = mixed_with_teacher(context, share) if share else context.student
        self._prompts = context.prompts[context.rank :: context.world_size]
        self._seed = context.seed
        self._generation_seed = context.generation_seed
        self._waiting: deque[Response] = deque()
        self._asked = 0
        self._passes = -1
        self._order: list[int] = []

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """As many responses as there are prompts, each with a prompt of its own."""
        count = len(prompts)
        if len(self._waiting) < count:
            asked = [self._next() for _ in range(self._every * count - len(self._waiting))]
            seed = self._generation_seed("batched-text", progress.step)
            written = self._generator.generate(asked, seed, self._sampling)
            self._waiting.extend(written)
            for use in range(1, self._uses):
                again = random.Random(derived_seed(self._seed, "batched-again", progress.step, use))
                self._waiting.extend(again.sample(written, len(written)))
        return [[self._waiting.popleft()] for _ in range(count)]

    def metrics(self) -> dict[str, float]:
        """How many responses are left of the round."""
        return {"responses/waiting": float(len(self._waiting))}

    def state_dict(self) -> dict[str, Any]:
        """What is left of the round, and how many prompts have been asked."""
        return {"waiting": pack(list(self._waiting)), "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._waiting = deque(unpack(state["waiting"], {prompt.id: prompt for prompt in self._prompts}))
        self._asked = state["asked"]

    def _next(self) -> Prompt:
        passes, place = divmod(self._asked, len(self._prompts))
        self._asked += 1
        if passes != self._passes:
            self._order = list(range(len(self._prompts)))
            random.Random(derived_seed(self._seed, "batched-order", passes)).shuffle(self._order)
            self._passes = passes
        return self._prompts[self._order[place]]
