"""The teacher as a model in memory, run on every batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from stillhouse.core.batch import TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.models import TeacherModel, fingerprint_of_files, head_of, hidden_rows, layer_rows
from stillhouse.teachers.base import REGISTRY, MetricSums, TeacherConfig


class LiveTeacher:
    """Runs the teacher on the very token ids that the student sees."""

    def __init__(
        self, model: nn.Module, vocab: int, batch_invariant: bool = False, in_step: bool = False
    ) -> None:
        """Around a loaded model.

        Args:
            model: a causal language model.
            vocab: number of token ids that student and teacher share.
            batch_invariant: run it on one sequence at a time.
            in_step: its weights are sharded, so that all processes ask it together, about every micro-batch.
        """
        self.model = model.eval()
        self.head: ModelHead = head_of(model, vocab)
        self.tokens = 0
        """Tokens that have gone through it, those of prompts included."""
        self.in_step = in_step
        self._batch_invariant = batch_invariant

    def hidden(self, batch: TokenBatch) -> Tensor:
        """[N, Dt] last hidden states at the response rows, without gradient."""
        self.tokens += batch.num_tokens
        with torch.no_grad():
            if not self._batch_invariant:
                return hidden_rows(self.model, batch)
            single = [batch.select([row]) for row in range(len(batch))]
            return torch.cat([hidden_rows(self.model, one) for one in single])

    def layers(self, batch: TokenBatch, depths: Sequence[float]) -> tuple[Tensor, dict[float, Tensor]]:
        """As `hidden`, with the hidden states of some layers, by depth; all sequences in one pass."""
        self.tokens += batch.num_tokens
        with torch.no_grad():
            return layer_rows(self.model, batch, depths)

    def pop_metrics(self) -> MetricSums:
        """Nothing is counted."""
        return {}

    def usage(self) -> dict[str, Any] | None:
        """It is on no server."""
        return None

    def close(self) -> str | None:
        """Nothing is held."""
        return None


@REGISTRY.register
class LiveTeacherConfig(TeacherConfig, TeacherModel):
    """A model in memory: exact, needs its weights and one forward pass for each batch."""

    kind: Literal["live"] = "live"
    batch_invariant: bool = False
    """Run it on one sequence at a time. Slower, but then its signal for a text is bit for bit the same in
    every batch; otherwise rounding depends a little on what else is in the batch."""
    shard: Literal["fsdp2"] | None = None
    """fsdp2: each of several processes keeps its share of the weights, but for the head, and gathers a layer
    at a time, so that a teacher that fits on no GPU fits on several. It reads whatever the training asks, and
    cannot write responses, be evaluated, cached, or run on one sequence at a time. One process keeps it
    whole."""

    provides: ClassVar[frozenset[str]] = frozenset({"distribution", "layers", "text"})

    @model_validator(mode="after")
    def _asked_together(self) -> Self:
        if self.shard and self.batch_invariant:
            raise ValueError(
                "batch_invariant asks about one sequence at a time, of which processes have different "
                "numbers, while those that share a teacher (shard) ask together; leave one of the two out"
            )
        return self

    @property
    def sharded(self) -> bool:
        """With `shard`."""
        return self.shard is not None

    @property
    def keeps_signal(self) -> bool:
        """Not where all processes ask together: one that remembers would not."""
        return not self.sharded

    @property
    def signals(self) -> frozenset[str]:
        """Of a sharded teacher what it says about given text alone."""
        return super().signals - {"text", "weights"} if self.sharded else super().signals

    def model_to_load(self) -> TeacherModel:
        """Itself."""
        return self

    def build(self, model: nn.Module | None, vocab: int) -> LiveTeacher:
        """The teacher around its loaded model."""
        assert model is not None
        return LiveTeacher(model, vocab, self.batch_invariant, self.sharded)

    def fingerprint(self, memory: Path) -> str:
        """A hash of its files."""
        return fingerprint_of_files(self, memory, self.batch_invariant)
