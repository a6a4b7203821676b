"""The teacher as a model in memory, run on every batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillhouse.core.head import ModelHead
from stillhouse.models import TeacherModel, fingerprint_of_files, head_of, hidden_rows, layer_rows
from stillhouse.teachers.base import REGISTRY, MetricSums, TeacherConfig


class LiveTeacher:
    """Runs the teacher on the very token ids that the student sees."""

    def __init__(self, model: nn.Module, vocab: int, batch_invariant: bool = False) -> None:
        """Around a loaded model.

        Args:
            model: a causal language model.
            vocab: number of token ids that student and teacher share.
            batch_invariant: run it on one sequence at a time.
        """
        self.model = model.eval()
        self.head: ModelHead = head_of(model, vocab)
        self.tokens = 0
        """Tokens that have gone through it, those of prompts included."""
        self._batch_invariant = batch_invariant

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """[N, Dt] last hidden states at the response rows, without gradient."""
        self.tokens += int(batch["attention_mask"].sum())
        with torch.no_grad():
            if not self._batch_invariant:
                return hidden_rows(self.model, dict(batch))
            single = [select_sequences(batch, [row]) for row in range(len(batch["input_ids"]))]
            return torch.cat([hidden_rows(self.model, one) for one in single])

    def layers(self, batch: Mapping[str, Any], depths: Sequence[float]) -> tuple[Tensor, dict[float, Tensor]]:
        """As `hidden`, with the hidden states of some layers, by depth; all sequences in one pass."""
        self.tokens += int(batch["attention_mask"].sum())
        with torch.no_grad():
            return layer_rows(self.model, dict(batch), depths)

    def pop_metrics(self) -> MetricSums:
        """Nothing is counted."""
        return {}

    def close(self) -> str | None:
        """Nothing is held."""
        return None


def select_sequences(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some sequences of a batch, cut to the longest of them."""
    index = torch.tensor(rows, device=batch["input_ids"].device)
    length = int(batch["attention_mask"][index].sum(1).max())
    names = [name for name in ("input_ids", "attention_mask", "response_mask", "labels") if name in batch]
    return {name: batch[name][index, :length] for name in names}


@REGISTRY.register
class LiveTeacherConfig(TeacherConfig, TeacherModel):
    """A model in memory: exact, needs its weights and one forward pass for each batch."""

    kind: Literal["live"] = "live"
    batch_invariant: bool = False
    """Run it on one sequence at a time. Slower, but then its signal for a text is bit for bit the same in
    every batch; otherwise rounding depends a little on what else is in the batch."""

    provides: ClassVar[frozenset[str]] = frozenset({"distribution", "layers", "text"})

    def model_to_load(self) -> TeacherModel:
        """Itself."""
        return self

    def build(self, model: nn.Module | None, vocab: int) -> LiveTeacher:
        """The teacher around its loaded model."""
        assert model is not None
        return LiveTeacher(model, vocab, self.batch_invariant)

    def fingerprint(self, memory: Path) -> str:
        """A hash of its files."""
        return fingerprint_of_files(self, memory, self.batch_invariant)
