"""The teacher as a model in memory, run on every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillhouse.models import TeacherModel, head_of, hidden_rows
from stillhouse.objectives.head import Head
from stillhouse.teachers.base import REGISTRY, Counts, TeacherConfig


class LiveTeacher:
    """Runs the teacher on the very token ids that the student sees."""

    def __init__(self, model: nn.Module, vocab: int) -> None:
        self.model = model.eval()
        self.head: Head = head_of(model, vocab)
        self.tokens = 0
        """Tokens that have gone through it, those of prompts included."""

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """[N, Dt] last hidden states at the response rows, without gradient."""
        self.tokens += int(batch["attention_mask"].sum())
        with torch.no_grad():
            return hidden_rows(self.model, dict(batch))

    def counts(self) -> Counts:
        """Nothing is counted."""
        return {}


@REGISTRY.register
class LiveTeacherConfig(TeacherConfig, TeacherModel):
    """A model in memory: exact, needs its weights and one forward pass for each batch."""

    kind: Literal["live"] = "live"
    provides: ClassVar[frozenset[str]] = frozenset({"distribution", "text"})

    def model_to_load(self) -> TeacherModel:
        """Itself."""
        return self

    def build(self, model: nn.Module | None, vocab: int) -> LiveTeacher:
        """The teacher around its loaded model."""
        assert model is not None
        return LiveTeacher(model, vocab)
