"""What is said to somebody who writes an objective and returns something else than one value a row."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from stillhouse.core.rows import Rows
from stillhouse.fused import fused_loss
from stillhouse.objectives import Objective


class Squares(Objective):
    """Squared differences of logits; what `returns` says is given back."""

    kind: Literal["squares"] = "squares"
    returns: Literal["rows", "mean", "matrix", "detached"] = "rows"

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        every = (student - teacher).square()
        value = every.sum(-1)
        return {"rows": value, "mean": value.mean(), "matrix": every, "detached": value.detach()}[
            self.returns
        ]


def fused(objective: Objective) -> Tensor:
    student = torch.randn(5, 4, requires_grad=True)
    loss = fused_loss(objective, student, torch.randn(7, 4), torch.randn(5, 4), torch.randn(7, 4))
    loss.backward()
    assert student.grad is not None
    return student.grad


def test_one_value_a_row_is_trained_on() -> None:
    assert fused(Squares()).abs().sum() > 0


@pytest.mark.parametrize(
    ("returns", "told"),
    [
        ("mean", r"squares: per_token returned values of shape \[\] .*one value a row, \[5\]"),
        ("matrix", r"squares: per_token returned values of shape \[5, 7\]"),
        ("detached", "squares: what per_token returns does not depend on the student's logits"),
    ],
)
def test_anything_else_is_told(returns: Literal["mean", "matrix", "detached"], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fused(Squares(returns=returns))


def test_without_a_gradient_the_shape_is_looked_at_too() -> None:
    with pytest.raises(ValueError, match="one value a row"):
        Squares(returns="mean")(torch.randn(5, 7), torch.randn(5, 7))
