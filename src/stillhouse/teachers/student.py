"""The student as its own teacher: as it started, as it is now, or a moving average of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config import because
from stillhouse.core.batch import TokenBatch
from stillhouse.errors import Fault, TrainingError
from stillhouse.teachers.base import REGISTRY, TeacherConfig
from stillhouse.teachers.live import LiveTeacher


class StudentTeacher(LiveTeacher):
    """Runs the student, or a copy of what is trained of it, without gradient and without dropout.

    An average follows by theta_T <- d theta_T + (1 - d) theta after every k-th optimiser step (d `decay`, k
    `every`). Weights that are not trained, such as those under adapters, are the student's own.
    """

    def __init__(self, student: nn.Module, vocab: int, config: StudentTeacherConfig) -> None:
        """Around the student of a run, before its first step.

        Args:
            student: the model that is trained.
            vocab: number of token ids that take part.
            config: which weights to read.
        """
        training = student.training
        self.config = config
        super().__init__(student if config.weights == "live" else copy_of_trained(student), vocab)
        student.train(training)
        trained = [name for name, one in student.named_parameters() if one.requires_grad]
        ours, theirs = dict(student.named_parameters()), dict(self.model.named_parameters())
        self._pairs = {name: (theirs[name], ours[name]) for name in trained if config.weights == "ema"}

    def hidden(self, batch: TokenBatch) -> Tensor:
        """As a live teacher."""
        with self._evaluating():
            return super().hidden(batch)

    def layers(self, batch: TokenBatch, depths: Sequence[float]) -> tuple[Tensor, dict[float, Tensor]]:
        """As a live teacher."""
        with self._evaluating():
            return super().layers(batch, depths)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move an average towards the student, where `step` (optimiser steps done) is one to do that at."""
        if step % self.config.every:
            return
        for average, weights in self._pairs.values():
            whole = weights.full_tensor() if hasattr(weights, "full_tensor") else weights
            average.mul_(self.config.decay).add_(whole, alpha=1 - self.config.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the name of the parameter; empty where a resumed run has the weights anyway."""
        return {name: average.detach() for name, (average, _) in self._pairs.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            TrainingError: it is of other parameters than those that are trained.
        """
        if state.keys() != self._pairs.keys():
            raise TrainingError(
                f"The checkpoint has the average of {len(state)} weights of the student, but "
                f"{len(self._pairs)} are trained and averaged. Resume with the settings that the run began "
                "with (student.lora, teacher.weights), or train anew."
            )
        for name, (average, _) in self._pairs.items():
            average.copy_(state[name])

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


def copy_of_trained(student: nn.Module) -> nn.Module:
    """A frozen copy of a model that shares with it what is not trained."""
    shared = [one for one in student.parameters() if not one.requires_grad]
    memo: dict[int, Any] = {id(one): one for one in shared}
    copied = copy.deepcopy(student, memo)
    return copied.requires_grad_(False)


@REGISTRY.register
class StudentTeacherConfig(TeacherConfig):
    """The student itself, reading what `data.teacher_context` puts into its prompt."""

    kind: Literal["student"] = "student"
    weights: Literal["frozen", "live", "ema"] = "frozen"
    """`frozen`: as the training starts. `live`: as they are at each step, without a second copy in memory.
    `ema`: an exponential moving average of them, kept in checkpoints. Of a student with adapters only those
    are copied."""
    decay: float = Field(0.9, ge=0, lt=1)
    """How much of the average stays at each of its steps."""
    every: int = Field(10, ge=1)
    """Optimiser steps between two steps of the average."""

    provides: ClassVar[frozenset[str]] = frozenset({"distribution", "layers"})
    of_student: ClassVar[bool] = True

    def options_without_effect(self) -> dict[str, str]:
        """What only an average has."""
        return {} if self.weights == "ema" else because(f"weights is {self.weights}", "decay", "every")

    @property
    def keeps_signal(self) -> bool:
        """Weights that move say something else about the same text."""
        return self.weights == "frozen"

    @property
    def copies_student(self) -> bool:
        """All but the live weights are a copy."""
        return self.weights != "live"

    def check_in_run(self, path: str, own_prompt: bool) -> Iterator[Fault]:
        """The student's live weights after the student's prompt are the student."""
        if self.weights == "live" and not own_prompt:
            yield Fault(
                f"{path}.weights",
                "live weights that read the student's prompt say what the student says: nothing is learnt",
                got="live",
                hint="Give the teacher more to read by data.teacher_context, or take weights: frozen or ema.",
            )

    def build(self, model: nn.Module | None, vocab: int) -> StudentTeacher:
        """The teacher around the student of the run."""
        assert model is not None
        return StudentTeacher(model, vocab, self)
