"""DPO, and losses that see a pair as it does: by the margin of implicit rewards."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from stillhouse.config import because
from stillhouse.core.requirements import LOGPROBS, REFERENCE, Requirements
from stillhouse.core.rows import Rows
from stillhouse.objectives.base import Objective
from stillhouse.objectives.pairs import pair_gaps
from stillhouse.objectives.registry import register


@register
class DPO(Objective):
    """Direct preference optimisation: make the chosen response of a pair gain more on a reference than the
    rejected one does.

    Equation: -log sigma(b D), D = log q(y_w) / p(y_w) - log q(y_l) / p(y_l), b = `beta`, p the reference and
        log-probabilities those of whole responses; with `label_smoothing` e it is -(1 - e) log sigma(b D)
        - e log sigma(-b D). `robust`: -((1 - e) log sigma(b D) - e log sigma(-b D)) / (1 - 2 e). `hinge`:
        max(0, 1 - b D). `ipo`: (D - 1 / 2b)^2 with log-probabilities per token. Every row of a pair has the
        pair's value, and the mean over sequences (`train.normalise: sequence`) is that over pairs.
    Gradient: -b sigma(-b D) (grad log q(y_w) - grad log q(y_l)) of the first form.
    Character: seeking; nothing stops q(y_l) from going to zero, nor q(y_w) from falling with it.
    When: preference pairs, with the student at its start as the reference.
    Source: Rafailov et al. 2023 (arXiv 2305.18290); label smoothing after conservative DPO (Mitchell 2023),
        robust DPO (arXiv 2403.00409), hinge as in SLiC (arXiv 2305.10425), IPO (arXiv 2310.12036); values as
        TRL 1.16 has them, which a test compares; it smooths `robust` alone.
    """

    kind: Literal["dpo"] = "dpo"
    divergence: ClassVar[bool] = False
    has_token_part: ClassVar[bool] = False
    has_sequence_part: ClassVar[bool] = True
    teacher_model: str = REFERENCE
    """The reference: a name under `teachers`, for the model that the student starts from."""
    beta: float = Field(0.1, gt=0)
    """How much the student's distance to the reference costs: the larger, the closer it stays."""
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """What becomes of the margin."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be the wrong way round, for sigmoid and robust."""

    def options_without_effect(self) -> dict[str, str]:
        return because(f"loss is {self.loss}", "label_smoothing") if self.loss in ("hinge", "ipo") else {}

    def requirements(self) -> Requirements:
        rows = frozenset({"labels", "sources", "sequences", "pairs", "label_logprobs"})
        return self.compared_with(*LOGPROBS) | Requirements(rows=rows)

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        return student.new_zeros(student.shape[0])

    def per_sequence(self, rows: Rows) -> Tensor:
        assert rows.student_logprobs is not None
        ratio = rows.student_logprobs - self.label_logprobs(rows).detach()
        margins, of_row = pair_gaps(ratio, rows, self.name, mean=self.loss == "ipo")
        return self._of_margins(margins)[of_row]

    def _of_margins(self, margins: Tensor) -> Tensor:
        """The value of each pair, [P]."""
        if self.loss == "ipo":
            return (margins - 1 / (2 * self.beta)) ** 2
        if self.loss == "hinge":
            return torch.relu(1 - self.beta * margins)
        share = self.label_smoothing
        right, wrong = -logsigmoid(self.beta * margins), -logsigmoid(-self.beta * margins)
        if self.loss == "robust":
            return ((1 - share) * right - share * wrong) / (1 - 2 * share)
        return (1 - share) * right + share * wrong
