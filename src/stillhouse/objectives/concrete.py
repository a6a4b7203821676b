"""Concrete score distillation: objectives on differences of logits instead of probabilities.

r = z - z_teacher is the logit residual. Weights are always detached.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from stillhouse.config import because
from stillhouse.core.rows import Rows
from stillhouse.core.sparse import EXCLUDED
from stillhouse.objectives.base import Objective
from stillhouse.objectives.divergences import ValueAndGradient, dot
from stillhouse.objectives.kernels import KernelTerm, Mean
from stillhouse.objectives.ranges import Temperature
from stillhouse.objectives.registry import register
from stillhouse.schedules import Share

Weight = Literal["student", "teacher", "uniform", "mix"]


def weights(
    which: str, student: Tensor, teacher: Tensor, temperature: float = 1.0, teacher_share: float = 0.0
) -> Tensor:
    """Detached weights over the vocabulary, [N, V], each row summing to one."""
    with torch.no_grad():
        if which == "uniform":
            present = (student > EXCLUDED / 2).to(student.dtype)
            return present / present.sum(-1, keepdim=True)
        if temperature != 1.0:
            student, teacher = student / temperature, teacher / temperature
        if which == "student":
            return torch.softmax(student, -1)
        if which == "teacher":
            return torch.softmax(teacher, -1)
        return torch.lerp(torch.softmax(student, -1), torch.softmax(teacher, -1), teacher_share)


def _shares(which: Weight, teacher_share: float) -> tuple[float, float, float]:
    """A weight as shares of the student's, the teacher's and the uniform distribution."""
    if which == "mix":
        return 1 - teacher_share, teacher_share, 0.0
    return float(which == "student"), float(which == "teacher"), float(which == "uniform")


def _means(which: Weight) -> frozenset[Mean]:
    """The distributions in a weight."""
    return frozenset(("student", "teacher")) if which == "mix" else frozenset((which,))


@register
class CSD(Objective):
    """Concrete score distillation: matches all pairwise differences of logits, in linear time.

    Equation: 1/4 sum_{x,y} w1(y) w2(x) (r_x - r_y)^2
        = 1/4 [Var_w1(r) + Var_w2(r) + (E_w1 r - E_w2 r)^2], weights w1, w2 constant.
    Gradient: 1/2 [w2_i (r_i - E_w1 r) + w1_i (r_i - E_w2 r)].
    Character: by the weights: (student, student) seeks modes, (teacher, teacher) and (teacher, student)
        cover, (uniform, student) is in between. The force grows linearly with the logit gap and does not
        saturate.
    When: (student, student) wherever reverse KL is used: at temperature 1 the two have exactly the same
        gradient, so a difference between runs of the two is not an effect of the loss. (teacher, student)
        for small data.
    Source: CSD (arXiv 2509.25837), theorem 3; released code at commit c77a3a7, whose gradient is half the
        paper's.
    """

    kind: Literal["csd"] = "csd"
    exact_gradient: ClassVar[bool] = False
    w1: Weight = "student"
    """Weights of the first token of a pair."""
    w2: Weight = "student"
    """Weights of the second token of a pair."""
    temperature: Temperature = 1.0
    """Divides the logits in the weights only; the residual stays at temperature 1."""
    teacher_share: Share = 0.15
    """Share of the teacher in the weights called mix; the student has the rest."""
    factor: Literal["released", "paper"] = "released"
    """The paper's value and gradient are twice those of the released code."""

    def options_without_effect(self) -> dict[str, str]:
        used = {self.w1, self.w2}
        found: dict[str, str] = {}
        if "mix" not in used:
            found |= because("neither weight is mix", "teacher_share")
        if used == {"uniform"}:
            found |= because("both weights are uniform", "temperature")
        return found

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        r = student - teacher
        w1 = self._weights(self.w1, student, teacher)
        w2 = w1 if self.w2 == self.w1 else self._weights(self.w2, student, teacher)
        # Centred at one mean before squaring: the textbook form cancels badly for large residuals.
        first = r - (w1 * r).sum(-1, keepdim=True).detach()
        mean1, mean2 = (w1 * first).sum(-1), (w2 * first).sum(-1)
        spread = (w1 * first.square()).sum(-1) + (w2 * first.square()).sum(-1)
        return (0.25 if self.factor == "released" else 0.5) * (spread - 2 * mean1 * mean2)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        factor = 0.25 if self.factor == "released" else 0.5
        share = float(self.teacher_share)
        return (
            KernelTerm(
                "concrete.csd",
                (*_shares(self.w1, share), *_shares(self.w2, share)),
                means=_means(self.w1) | _means(self.w2),
                temperature=float(self.temperature),
                weight=factor,
                teacher_model=self.teacher_model,
            ),
        )

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        w1 = self._weights(self.w1, student, teacher)
        w2 = w1 if self.w2 == self.w1 else self._weights(self.w2, student, teacher)
        return _closed_csd(student.sub_(teacher), w1, w2, 0.25 if self.factor == "released" else 0.5)

    def _weights(self, which: Weight, student: Tensor, teacher: Tensor) -> Tensor:
        return weights(which, student, teacher, float(self.temperature), float(self.teacher_share))


def _closed_csd(residual: Tensor, w1: Tensor, w2: Tensor, factor: float) -> ValueAndGradient:
    """factor sum w1(y) w2(x) (r_x - r_y)^2; gradient with constant weights. The residual is overwritten."""
    r = residual.sub_(dot(w1, residual)[:, None])
    force = w1 * r
    if w2 is w1:
        return 2 * factor * dot(force, r), force.mul_(4 * factor)
    other = w2 * r
    mean2 = other.sum(-1, keepdim=True)
    value = factor * (dot(force, r) + dot(other, r))
    force.add_(other).addcmul_(w1, mean2, value=-1)
    return value, force.mul_(2 * factor)


@register
class DLD(Objective):
    """Direct logit distillation: a weighted square of logit differences.

    Equation: 1/4 sum_i w_i r_i^2, weights constant; with `center`, r is first reduced by its plain mean.
    Gradient: w_i r_i / 2; with `center` 1/2 (w_i d_i - sum_j w_j d_j / V), d the centred residual.
    Character: by the weights, as for `csd`. Without `center` it is not invariant to a shift of the logits.
    When: as the ablation of `csd`; the student has to match a constant that no probability depends on.
    Source: CSD (arXiv 2509.25837), ablation; released code at commit c77a3a7.
    """

    kind: Literal["dld"] = "dld"
    exact_gradient: ClassVar[bool] = False
    weight: Literal["student", "teacher", "uniform"] = "student"
    """Whose distribution weighs the vocabulary."""
    center: bool = False
    """Subtract the mean residual of the row first, which makes the objective invariant to shifts."""

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.center

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        r = student - teacher
        if self.center:
            r = r - (weights("uniform", student, teacher) * r).sum(-1, keepdim=True)
        return 0.25 * (weights(self.weight, student, teacher) * r.square()).sum(-1)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        means = _means(self.weight) | (_means("uniform") if self.center else frozenset())
        numbers = (*_shares(self.weight, 0.0), 1.0 if self.center else 0.0)
        return (KernelTerm("concrete.dld", numbers, means=means, teacher_model=self.teacher_model),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        weight = weights(self.weight, student, teacher)
        even = weights("uniform", student, teacher) if self.center else None
        r = student.sub_(teacher)
        if even is not None:
            r.sub_(dot(even, r)[:, None])
        force = weight.mul_(r)
        value = 0.25 * dot(force, r)
        if even is not None:
            force.sub_(even.mul_(force.sum(-1, keepdim=True)))
        return value, force.mul_(0.5)
