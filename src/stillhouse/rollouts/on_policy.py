"""Responses that the student generates, alone or mixed with the teacher, for one step or more (MiniLLM)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from stillhouse.core.requirements import STUDENT, Requirements
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import (
    REGISTRY,
    SAMPLES_FROM_BOTH,
    ResponsesConfig,
    RolloutContext,
    StatelessPolicy,
)
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.replay import pack, unpack


class StudentRolloutsConfig(ResponsesConfig):
    """Responses that the student generates, sampled from its own distribution or mixed with the teacher's."""

    teacher_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the teacher in the distribution that tokens are drawn from; `sampling` acts on the mixture."""
    sampling: Sampling | None = None
    """How tokens are drawn; default: `engine.sampling`."""
    reward_model: str | None = None
    """A folder of `stillhouse reward`: a model that gives each response a number when it is written, for
    `policy_gradient` with a `reward_weight`."""

    def row_facts(self, sampling: Sampling) -> frozenset[str]:
        """Rewards, with a reward model."""
        return super().row_facts(sampling) | ({"rewards"} if self.reward_model is not None else set())

    def reward_model_path(self) -> str | None:
        """`reward_model`."""
        return self.reward_model

    def requirements(self) -> Requirements:
        """The student's text; if the teacher has a share, its model in this process over the same tokens."""
        alone = Requirements.of(STUDENT, "text")
        return alone | SAMPLES_FROM_BOTH if self.teacher_share else alone

    def sampling_teacher_share(self) -> float:
        """`teacher_share`."""
        return self.teacher_share

    def sources(self) -> frozenset[str]:
        """The student's."""
        return frozenset({"student"})

    def generator(self, context: RolloutContext) -> ResponseGenerator:
        """The student's generator; with a `teacher_share`, over the mixture of both models."""
        assert context.student is not None
        if not self.teacher_share:
            return context.student
        from stillhouse.engines.mixture import MixtureEngine, MixtureModel

        assert context.models is not None
        models = context.models
        mixture = MixtureModel(models.student, models.teacher, self.teacher_share, models.vocab_size)
        engine = MixtureEngine.beside(context.student.engine, mixture, models.tokenizer_info)
        return replace(context.student, engine=engine)


@REGISTRY.register
class OnPolicyConfig(StudentRolloutsConfig):
    """At every step the student generates responses to the step's prompts.

    With `teacher_share` s each token is drawn from (1 - s) q + s p (MiniLLM, arXiv 2306.08543, section 2.2,
    s = 0.2): the teacher keeps the text from degenerating. The objective `policy_gradient` corrects for it by
    its `sampling_teacher_share`, which has to be the same number.

    Example: `responses: {kind: on_policy, teacher_share: 0.2, sampling: {temperature: 1.0}}`
    """

    kind: Literal["on_policy"] = "on_policy"

    def build(self, context: RolloutContext) -> OnPolicy:
        """The running policy."""
        return OnPolicy(self.generator(context), context, self.sampling)


class OnPolicy(StatelessPolicy):
    """Generates at each step; the responses depend on the weights, the prompts, the seed and the step."""

    def __init__(
        self, generator: ResponseGenerator, context: RolloutContext, sampling: Sampling | None
    ) -> None:
        self._generator = generator
        self._context = context
        self._sampling = sampling

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response to each prompt."""
        purpose = ("on-policy", progress.step)
        written = self._context.write(self._generator, prompts, self._sampling, *purpose)
        return [[response] for response in self._context.rewarded(written)]


@REGISTRY.register
class BatchedConfig(StudentRolloutsConfig):
    """The student generates for several steps at a time.

    Between fully on-policy (`generate_batches: 1`) and one round for each epoch: fewer and larger batches to
    generate, trained on at most `generate_batches` x `epochs` - 1 steps later. The prompts are the policy's
    own instead of the step's: the training set in a new random order for each pass.

    Example: `responses: {kind: batched, generate_batches: 8}`
    """

    kind: Literal["batched"] = "batched"
    generate_batches: Annotated[int, Field(ge=1)] = 8
    """Batches of prompts that the student generates responses to at a time."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """How often these responses are trained on, in another order each time; PPO's epochs (4 in MiniLLM)."""

    def generated_responses(self, prompts: int, steps: int, batch_size: int) -> dict[str, int]:
        """The student's, each of which is trained on in `epochs` steps."""
        per_round = self.generate_batches * batch_size
        return {"student": -(-steps // (self.generate_batches * self.epochs)) * per_round}

    def build(self, context: RolloutContext) -> BatchedPolicy:
        """The running policy."""
        return BatchedPolicy(self, context)


class BatchedPolicy:
    """Provides what was generated at once, batch after batch.

    Each process generates a share, and all of them hold the whole queue, from which each takes its places of
    every step. So responses, order and state are the same for any number of processes.
    """

    def __init__(self, config: BatchedConfig, context: RolloutContext) -> None:
        self._generate_batches = config.generate_batches
        self._epochs = config.epochs
        self._sampling = config.sampling
        self._generator = config.generator(context)
        self._prompts = context.prompts
        self._by_id = {prompt.id: prompt for prompt in context.prompts}
        self._seed = context.seed
        self._context = context
        self._queue: deque[Response] = deque()
        self._prompts_used = 0
        self._pass = -1
        self._order: list[int] = []

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """As many responses as there are prompts, each to a prompt of its own."""
        world, here = self._context.world, len(prompts)
        count = int(world.add(torch.tensor(float(here))))
        if len(self._queue) < count:
            needed = self._generate_batches * count - len(self._queue)
            responses = self._written(needed, progress.step)
            self._prompts_used += needed  # only now: what is interrupted while it generates has used none
            self._queue.extend(responses)
            for epoch in range(1, self._epochs):
                order = random.Random(derived_seed(self._seed, "batched-again", progress.step, epoch))
                self._queue.extend(order.sample(responses, len(responses)))
        batch = [self._queue.popleft() for _ in range(count)]
        return [[batch[place]] for place in world.local_indices(here)]

    def metrics(self) -> dict[str, float]:
        """How many generated responses are left."""
        return {"responses/waiting": float(len(self._queue))}

    def state_dict(self) -> dict[str, Any]:
        """The responses that are left, and how many prompts have been used."""
        return {"queue": pack(list(self._queue)), "prompts_used": self._prompts_used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._queue = deque(unpack(state["queue"], self._by_id))
        self._prompts_used = state["prompts_used"]

    def dealt_out(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """That of any process: all have the same."""
        return states[0]

    def _written(self, count: int, step: int) -> list[Response]:
        """The responses to the next prompts, of which each process writes every n-th."""
        world, context = self._context.world, self._context
        places = range(count)[world.rank :: world.size]
        chosen = [self._prompt(self._prompts_used + place) for place in places]
        purpose = ("batched-text", step)
        written = context.write(self._generator, chosen, self._sampling, *purpose, places=places)
        written = context.rewarded(written)
        if world.size == 1:
            return written
        shares = [unpack(share, self._by_id) for share in world.gather(pack(written))]
        return [shares[place % world.size][place // world.size] for place in range(count)]

    def _prompt(self, used: int) -> Prompt:
        """The prompt that follows when so many have been used."""
        number, place = divmod(used, len(self._prompts))
        if number != self._pass:
            self._order = list(range(len(self._prompts)))
            random.Random(derived_seed(self._seed, "batched-order", number)).shuffle(self._order)
            self._pass = number
        return self._prompts[self._order[place]]
