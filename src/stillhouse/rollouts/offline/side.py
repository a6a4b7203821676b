"""One side of the rounds of a run: what the teacher, the student or somebody else says to every prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import RolloutContext
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.offline.rounds import Order, Setting, make, place_aside
from stillhouse.rollouts.offline.samples import Sample

logger = logging.getLogger("stillhouse")

Refresh = Literal["never", "epoch", "step"]


class Side:
    """The responses on one side, round after round, each a stage file `SOURCE-ROUND.jsonl`.

    A file holds what the header says, the digest of the writer's weights included, so text of another run,
    setting or model is never used: such a file is renamed, with a warning.
    """

    def __init__(
        self,
        context: RolloutContext,
        source: Literal["teacher", "student"],
        writer: ResponseGenerator | None,
        refresh: Refresh,
        sampling: Sampling | None,
        setting: Setting,
        given: Sequence[Sample | None] = (),
    ) -> None:
        """A side of a run.

        Args:
            context: prompts, folder and seed of the run.
            source: whose place in the training the responses take.
            writer: who writes what is not given; None if nobody does.
            refresh: when the writer writes anew.
            sampling: how the writer samples, instead of its own way.
            setting: what all rounds of the run have in common.
            given: responses that are there already, one place for each prompt.
        """
        self.source = source
        self.writer = writer
        self._context = context
        self._refresh = refresh
        self._sampling = sampling
        self._setting = setting
        self._given = given
        self._held: dict[str, Any] = {}
        self._resumed = False

    def samples(self, number: int) -> list[Sample]:
        """One sample for each prompt in round `number`, from its file or written now."""
        number = self._round(number)
        order = Order(
            self._context.prompts,
            self.source,
            self.writer,
            derived_seed(self._context.seed, self.source, number),
            self._sampling,
            self._given,
            facts={"round": number, "run_seed": self._context.seed},
        )
        title = f"{self.source.capitalize()} writes round {number + 1}"
        return self._made(f"{self.source}-{number}.jsonl", order, number, title)

    def again(self, number: int, attempt: int, places: Sequence[int]) -> dict[int, Sample]:
        """New samples for some prompts, written with fresh seeds, by place."""
        number = self._round(number)
        order = Order(
            [self._context.prompts[place] for place in places],
            self.source,
            self.writer,
            derived_seed(self._context.seed, self.source, number, "again", attempt),
            self._sampling,
            numbers=places,
            facts={"round": number, "attempt": attempt, "run_seed": self._context.seed},
        )
        title = f"{self.source.capitalize()} tries again, round {number + 1}"
        name = f"{self.source}-{number}.again-{attempt}.jsonl"
        return dict(zip(places, self._made(name, order, number, title), strict=True))

    def fresh(self, prompts: Sequence[Prompt], progress: Progress) -> list[Response]:
        """What the writer says to these prompts at this very step; no file is kept."""
        assert self.writer is not None
        seed = self._context.generation_seed(self.source, "step", progress.step)
        return self.writer.generate(prompts, seed, self._sampling)

    def writes(self, place: int) -> bool:
        """Whether the response at a place can be written again."""
        return self.writer is not None and not (self._given and self._given[place] is not None)

    @property
    def every_step(self) -> bool:
        """Whether there are no rounds: the writer writes for each step."""
        return self._refresh == "step"

    def state_dict(self) -> dict[str, Any]:
        """With which weights the newest round was written: they are gone as soon as the training goes on."""
        return dict(self._held)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._held, self._resumed = dict(state), bool(state)

    def _round(self, number: int) -> int:
        return number if self._refresh == "epoch" else 0

    def _made(self, name: str, order: Order, number: int, title: str) -> list[Sample]:
        path = self._context.folder / name
        scores = tuple(self._setting.score)
        head = order.header(*self._weights(number), scores)
        place_aside(path, head, self._setting)
        if self._resumed and self._held.get("round") == number and not path.exists() and self.writer:
            logger.warning(
                "%s is gone or was made in another way, and the weights that it was written with are too: "
                "written with the present ones, so the run does not end as one that was never interrupted",
                path,
            )
            self._held = {}
            head = order.header(*self._weights(number), scores)
        samples = make(path, order, self._setting, head, title)
        assert samples is not None
        return samples

    def _weights(self, number: int) -> tuple[str, int | None]:
        """Digest and optimiser step of the weights that round `number` is written with."""
        if self.writer is None:
            return "", None
        if self._held.get("round") != number:
            version = self.writer.version()
            self._held = {"round": number, "model": self.writer.fingerprint(), "version": version}
            self._resumed = False
        return self._held["model"], self._held["version"]
