"""Student-generated responses as far as the student over-fits, most of them replayed (DistiLLM)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from stillhouse.config import because
from stillhouse.core.requirements import RunFacts
from stillhouse.core.seeds import derived_seed, derived_uniform
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.errors import Fault
from stillhouse.rollouts.base import REGISTRY, ResponsePolicy, RolloutContext
from stillhouse.rollouts.mixed import StudentShareConfig
from stillhouse.rollouts.replay import ReplayBuffer, dealt_out
from stillhouse.schedules import DevLoss, Linear, Share


@REGISTRY.register
class AdaptiveConfig(StudentShareConfig):
    """Adaptive off-policy: a share of the steps trains on replayed student responses, the rest on `base`.

    At step t with u uniform in [0, 1), phi = `student_share`, lambda = phi x `fresh_share`:
    if u < lambda the student generates responses to the step's prompts, which fill the buffer; if u < phi the
    step trains on a draw from the buffer, else on `base`. Paper: Ko et al. 2024, DistiLLM (arXiv 2402.03898),
    Algorithm 1. Its released code (commit d47e77f): `train_on_fresh: true`, `minimum_fill: 1000`,
    `skip_first_token: true` and a `dev_loss` share against the last rise; recipe `distillm_released`.
    """

    kind: Literal["adaptive"] = "adaptive"
    student_share: Share = DevLoss()
    """Probability that a step trains on student-generated responses; phi. `dev_loss` needs data.valid."""
    fresh_share: Share = Linear(start=1.0, end=0.0)
    """Of those steps, the share that first generates new ones; lambda / phi. The paper's three schedules of
    the replay ratio: decreasing `{kind: linear, start: 1.0, end: 0.0}`, constant 0.5, increasing `{kind:
    linear, start: 0.0, end: 1.0}`."""
    capacity: Annotated[int, Field(ge=1)] = 1000
    """Most responses that the buffer holds, that of several processes together; at least train.batch_size."""
    minimum_fill: Annotated[int, Field(ge=0)] = 0
    """While the buffer holds fewer responses than this, or than a batch, any step with u < phi generates."""
    train_on_fresh: bool = False
    """A step that has generated trains on just these responses instead of on a draw from the buffer."""
    skip_first_token: bool = False
    """Do not train on the first token of the student's responses; an oversight of the released code."""
    generate_batches: Annotated[int, Field(ge=1)] = 1
    """Generate for so many batches of prompts at a time, with a probability that is smaller by the same
    factor: as many responses in all, in fewer and larger batches, which is faster."""
    cache_teacher_hidden: bool = False
    """Cache the teacher's hidden states of each response in the buffer, so that replaying it costs no teacher
    forward pass; takes memory and checkpoint space: capacity x tokens x the teacher's width."""

    def options_without_effect(self) -> dict[str, str]:
        if self.student_share == 1:
            return because("student_share is 1", "base")
        if self.student_share != 0:
            return {}
        of_the_student = ("sampling", "fresh_share", "capacity", "minimum_fill", "train_on_fresh")
        of_replay = ("skip_first_token", "generate_batches", "cache_teacher_hidden")
        return because("student_share is 0", *of_the_student, *of_replay)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.minimum_fill > self.capacity:
            raise ValueError(
                f"minimum_fill ({self.minimum_fill}) is more than the capacity ({self.capacity})"
            )
        return self

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        """A buffer that no batch can be drawn from."""
        yield from super().check_in_run(path, facts)
        if self.capacity < facts.batch_size:
            yield Fault(
                f"{path}.capacity",
                "a batch cannot be drawn from a buffer that is smaller than it",
                got=str(self.capacity),
                allowed=f"at least train.batch_size ({facts.batch_size})",
            )

    def build(self, context: RolloutContext) -> AdaptivePolicy:
        """The running policy."""
        assert context.student is not None
        return AdaptivePolicy(self, context)


class AdaptivePolicy:
    """The replay buffer and the random decisions of each step, functions of the seed and the step.

    Of several processes each has a share of the buffer, into which goes what it writes. What is decided and
    logged depends on all shares together, so all processes decide alike.
    """

    def __init__(self, config: AdaptiveConfig, context: RolloutContext) -> None:
        assert context.student is not None
        self._student = context.student
        self._context = context
        self._world = world = context.world
        self._prompts = context.prompts
        self._seed = context.seed
        self._base: ResponsePolicy = config.base.build(context)
        hidden_cache = context.hidden_cache if config.cache_teacher_hidden else None
        share = -(-(config.capacity - world.rank) // world.size)
        self._buffer = ReplayBuffer(share, hidden_cache)
        self._metrics: dict[str, float] = {}

    def draw(
        self, now: AdaptiveConfig, prompts: Sequence[Prompt], progress: Progress
    ) -> list[list[Response]]:
        """One response for each prompt of the step; replayed ones come with their own prompts."""
        step, count = progress.step, len(prompts)
        share, fresh_share = float(now.student_share), float(now.fresh_share)
        draw = derived_uniform(self._seed, "adaptive", step)
        on_policy = draw < share
        size, batch, short = self._added(len(self._buffer), count, len(self._buffer) < count)
        scarce = size < max(now.minimum_fill, batch) or short > 0
        generates = draw < share * fresh_share / now.generate_batches or (on_policy and scarce)
        fresh = self._generate(now, prompts, step, batch) if generates else []
        if generates:
            (size,) = self._added(len(self._buffer))
        self._metrics = {
            "responses/on_policy": float(on_policy),
            "responses/fresh": float(generates),
            "replay/size": float(size),
        }
        if not on_policy:
            return self._base.draw(now.base, prompts, progress)
        if fresh and now.train_on_fresh:
            chosen = fresh[:count]
        else:
            rank = [self._world.rank] if self._world.rank else []
            chosen = self._buffer.sample(count, derived_seed(self._seed, "replay", step, *rank))
        age, uses = self._added(self._buffer.total_age(step), self._buffer.total_uses())
        self._metrics |= {"replay/age": age / max(1, size), "replay/uses": uses / max(1, size)}
        return [[response] for response in chosen]

    def metrics(self) -> dict[str, float]:
        """The branch of the step; the buffer's size, mean age (steps) and mean number of uses."""
        return {**self._base.metrics(), **self._metrics}

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the state of `base`."""
        return {"buffer": self._buffer.state_dict(), "base": self._base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._buffer.load_state_dict(state["buffer"], {prompt.id: prompt for prompt in self._prompts})
        self._base.load_state_dict(state["base"])

    def dealt_out(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """This process's share of the entries of all buffers, and the state of `base`."""
        prompts = {prompt.id: prompt for prompt in self._prompts}
        buffers = [state["buffer"] for state in states]
        return {
            "buffer": dealt_out(buffers, prompts, self._world.rank, self._world.size),
            "base": self._base.dealt_out([state["base"] for state in states]),
        }

    def _added(self, *numbers: int) -> list[int]:
        """The sums of whole numbers over all processes."""
        return [int(one) for one in self._world.add(torch.tensor(numbers, dtype=torch.float64)).tolist()]

    def _generate(
        self, now: AdaptiveConfig, prompts: Sequence[Prompt], step: int, batch: int
    ) -> list[Response]:
        """Responses to the step's prompts, and to further ones with `generate_batches` above 1."""
        world = self._world
        num_further = min((now.generate_batches - 1) * batch, len(self._prompts))
        choice = random.Random(derived_seed(self._seed, "adaptive-prompts", step, 0))
        further = choice.sample(list(self._prompts), num_further)[world.rank :: world.size]
        behind = range(batch, batch + num_further)[world.rank :: world.size]
        places, purpose = [*world.local_indices(len(prompts)), *behind], ("adaptive-text", step)
        chosen = [*prompts, *further]
        responses = self._context.write(self._student, chosen, now.sampling, *purpose, places=places)
        if now.skip_first_token:
            responses = [without_first_token(response) for response in responses]
        self._buffer.add(responses)
        return responses


def without_first_token(response: Response) -> Response:
    """The response with its first token moved to the prompt, so that predicting it is not trained.

    A response of one token is returned as it is.
    """
    if len(response.token_ids) < 2:
        return response
    prompt = replace(response.prompt, token_ids=(*response.prompt.token_ids, response.token_ids[0]))
    logprobs = None if response.logprobs is None else response.logprobs[1:]
    return replace(response, prompt=prompt, token_ids=response.token_ids[1:], logprobs=logprobs)
