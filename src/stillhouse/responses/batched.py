"""Student-written responses for several steps at a time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.engines.base import Sampling
from stillhouse.responses.base import REGISTRY, Context, ResponsesConfig, derived_seed
from stillhouse.responses.replay import pack, unpack
from stillhouse.types import Progress, Prompt, Response


@REGISTRY.register
class Batched(ResponsesConfig):
    """Every `every` steps the student writes for as many batches of prompts; each response is used once.

    Between fully on-policy (1) and one round for each epoch: fewer and larger batches to write, at most
    `every` - 1 steps stale. The prompts are the policy's own: all of the training set in random order, anew
    for each pass, instead of the step's.

    Example: `responses: {kind: batched, every: 8}`
    """

    kind: Literal["batched"] = "batched"
    every: Annotated[int, Field(ge=1)] = 8
    """Optimiser steps that one round lasts."""
    sampling: Sampling | None = None
    """How the student samples; default: `engine.sampling`."""

    def writers(self) -> frozenset[str]:
        """The student."""
        return frozenset({"student"})

    def sources(self) -> frozenset[str]:
        """The student's."""
        return frozenset({"student"})

    def build(self, context: Context) -> BatchedPolicy:
        """The running policy."""
        return BatchedPolicy(self, context)


class BatchedPolicy:
    """Hands out a round of responses, batch after batch."""

    def __init__(self, config: Batched, context: Context) -> None:
        assert context.student is not None
        self._every = config.every
        self._sampling = config.sampling
        self._student = context.student
        self._prompts = context.prompts[context.rank :: context.ranks]
        self._seed = context.seed
        self._waiting: deque[Response] = deque()
        self._asked = 0
        self._passes = -1
        self._order: list[int] = []

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """As many responses as there are prompts, each with a prompt of its own."""
        count = len(prompts)
        if len(self._waiting) < count:
            asked = [self._next() for _ in range(self._every * count - len(self._waiting))]
            seed = derived_seed(self._seed, "batched-text", progress.step)
            self._waiting.extend(self._student.write(asked, seed, self._sampling))
        return [[self._waiting.popleft()] for _ in range(count)]

    def facts(self) -> dict[str, float]:
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
