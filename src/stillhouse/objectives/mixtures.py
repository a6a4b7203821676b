"""Divergences with a shape of their own: adaptive weights, two exponents, generalised mixtures, moving
targets."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.core.requirements import Requirements
from stillhouse.core.rows import Rows
from stillhouse.objectives.base import Objective
from stillhouse.objectives.divergences import (
    ValueAndGradient,
    both,
    closed_forward_kl,
    closed_skew_kl,
    closed_weighted_kl,
    dot,
    kl,
    log_normaliser,
    log_ratio,
    log_softmax,
    mixture,
    skew_kl_kernel,
)
from stillhouse.objectives.kernels import KernelTerm
from stillhouse.objectives.ranges import Exponent, InnerShare, MixtureAlpha
from stillhouse.objectives.registry import register
from stillhouse.schedules import Share

PositiveExponent = Annotated[float, Field(gt=0.0)]
FEW = (32, 512)
"""How many of the most probable tokens are tried before a row is sorted in full, which is slow."""


def head_mask(probabilities: Tensor, mass: float) -> Tensor:
    """Mask [N, V] of the fewest most probable tokens that together hold at least `mass`; never empty."""
    if probabilities.device.type == "cpu":
        return _head_by_sorting(probabilities, mass)
    return _head_by_bisection(probabilities, mass)


def _head_by_sorting(probabilities: Tensor, mass: float) -> Tensor:
    """The fastest on a CPU, which knows at once in which rows the first few tokens are not enough."""
    vocab = probabilities.shape[-1]
    sizes = [size for size in FEW if size < vocab]
    mask, held = _top(probabilities, sizes[0] if sizes else vocab, mass)
    for size in (*sizes[1:], vocab) if sizes else ():
        short = torch.from_numpy(np.flatnonzero(held.numpy() < mass))
        if short.numel() == 0:
            break
        mask[short], held[short] = _top(probabilities[short], size, mass)
    return mask


def _head_by_bisection(probabilities: Tensor, mass: float) -> Tensor:
    """Without sorting, and without asking a GPU: the least probability in the head is found bit by bit, as
    positive floats are ordered like the integers of the same bits."""
    bits = torch.int64 if probabilities.dtype == torch.float64 else torch.int32
    least = torch.zeros_like(probabilities[:, :1], dtype=bits)
    for bit in reversed(range(torch.iinfo(bits).bits - 1)):
        higher = least + (1 << bit)
        above = (probabilities * (probabilities >= higher.view(probabilities.dtype))).sum(-1, keepdim=True)
        least = torch.where(above >= mass, higher, least)
    edge = least.view(probabilities.dtype)
    inside, on_edge = probabilities > edge, probabilities == edge
    held = (probabilities * inside).sum(-1, keepdim=True)
    # Of equals those of the lowest ids, as many as are needed.
    return inside | (on_edge & (held + (on_edge.cumsum(-1) - 1) * edge < mass))


def _top(probabilities: Tensor, count: int, mass: float) -> tuple[Tensor, Tensor]:
    """The mask made from the `count` most probable tokens, and the mass that these hold, [N]."""
    top, index = probabilities.topk(count, dim=-1)
    before = top.cumsum(-1) - top
    mask = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, index, before < mass)
    return mask, top.sum(-1)


@register
class AdaptiveKL(Objective):
    """Forward and reverse KL, weighted by where the two models differ: in the teacher's head or in its tail.

    Equation: g_h / (g_h + g_t) KL(p || q) + g_t / (g_h + g_t) KL(q || p), where g_h and g_t are the sums of
        |p - q| over the head (the most probable tokens holding `head_mass`) and the tail; weights constant.
    Gradient: the weighted sum of the two gradients.
    Character: covering while the head differs, seeking while the tail does.
    When: when neither direction of KL is wanted everywhere.
    Source: Wu et al. 2024 (arXiv 2404.02657). The TAID code (commit a062892) does not detach the weights and
        applies the head mask in sorted order to unsorted gaps; here both are done as the paper says.
    """

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    exact_gradient: ClassVar[bool] = False
    head_mass: InnerShare = 0.5
    """Probability mass of the teacher that makes the head; mu in the paper."""
    crossing_token: bool = True
    """Count the token with which the head reaches `head_mass` to the head. The paper's code counts it to the
    tail, so that a head may be empty."""

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        share = self.head_share(log_p.exp(), log_q.detach().exp())
        return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)

    def head_share(self, p: Tensor, q: Tensor) -> Tensor:
        """g_h / (g_h + g_t), [N]; one half where the models agree."""
        gap = (p - q).abs()
        total = gap.sum(-1)
        head = head_mask(p, self.head_mass)
        if not self.crossing_token:  # the least probable of the head is the one that reached the mass
            head = head.scatter(-1, p.masked_fill(~head, 2.0).argmin(-1, keepdim=True), False)
        inside = (gap * head).sum(-1)
        return torch.where(total > 0, inside / total.clamp_min(torch.finfo(p.dtype).tiny), 0.5)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        p, q, d = log_ratio(student, teacher)
        share = self.head_share(p, q)
        return closed_weighted_kl(p, q, d, share, 1 - share)


@register
class AB(Objective):
    """AB divergence: two exponents that say how much large mismatches and the student's confidence count.

    Equation: -1/(a b) sum_i [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], a = `alpha`, b = `beta`, and its
        limits where a, b or a + b is zero; (0, 0) is 1/2 sum (log p - log q)^2.
    Gradient: u_i - q_i sum_j u_j, u = (q^(a+b) - p^a q^b) / a.
    Character: (1, 0) is forward KL, (0, 1) reverse KL, (0.5, 0.5) of Hellinger type.
    When: to tune between the two with both exponents; the ABKD paper uses (0.2, 0.7).
    Source: ABKD (arXiv 2505.04560). Its code (commit df81318) misses a factor alpha in two limits.
    """

    kind: Literal["ab"] = "ab"
    alpha: Exponent = 0.2
    """Exponent of the teacher. A negative one gives infinite values where the teacher's probability is
    zero."""
    beta: Exponent = 0.7
    """Exponent of the student. A negative one gives infinite values where the student's probability is
    zero."""

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        u, v = both(student, teacher)
        a, b = float(self.alpha), float(self.beta)
        if max(abs(a), abs(b)) < NEAR_ZERO[u.dtype]:
            return 0.5 * (u - v).square().sum(-1)
        if abs(a) < abs(b):  # D(a, b; p, q) = D(b, a; q, p): divide by the larger exponent
            u, v, a, b = v, u, b, a
        return -(_power_slope(u, v, a + b, b) - _power_slope(u, v, a + b, a + b)).sum(-1) / a

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        a, b = float(self.alpha), float(self.beta)
        square = max(abs(a), abs(b)) < NEAR_ZERO[torch.float32]
        numbers = (0.0, 0.0, 1.0) if square else (a, b, 0.0)
        return (KernelTerm("mixtures.ab", numbers, sums=1, teacher_model=self.teacher_model),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        a, b = float(self.alpha), float(self.beta)
        if min(abs(a), abs(b), abs(a + b)) <= 0.1:
            return super().value_and_gradient(student, teacher, rows)
        q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
        log_q = student.sub_(log_normaliser(student, q))
        log_p = teacher.sub_(log_normaliser(teacher, p))
        own = torch.mul(log_q, a + b).exp_()
        powers = torch.mul(log_p, a + b, out=p).exp_()
        cross = log_p.mul_(a).add_(log_q, alpha=b).exp_()
        sums = cross.sum(-1) - a / (a + b) * powers.sum(-1) - b / (a + b) * own.sum(-1)
        force = own.sub_(cross).mul_(1 / a)
        return -sums / (a * b), force.sub_(q.mul_(force.sum(-1, keepdim=True)))


NEAR_ZERO = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Below this both exponents of `ab` count as zero: the division would lose more than the limit does."""


def _power_slope(u: Tensor, v: Tensor, total: float, x: float) -> Tensor:
    """e^(total u) (e^(x d) - 1) / x with d = v - u; its limit e^(total u) d at x = 0. Accurate for small x
    d."""
    base = (total * u).exp()
    d = v - u
    if x == 0.0:
        return base * d
    power = x * d
    far = ((total * u + power).exp() - base) / x
    if abs(x) > 0.1:
        return far
    return torch.where(power.abs() < 1.0, base * torch.expm1(power.clamp(-1.0, 1.0)) / x, far)


@register
class AlphaMixture(Objective):
    """KL divergence to a generalised mean of teacher and student (AMiD).

    Equation: KL(p || m) or KL(q || m), or their AB divergences; m proportional to
        (s p^c + (1 - s) q^c)^(1/c), c = (1 - alpha) / 2, s = `teacher_share`; m ~ p^s q^(1 - s) at alpha = 1.
    Gradient: by differentiating through m, which is renormalised.
    Character: alpha = -1 mixes probabilities as `skew_kl` does; alpha = 1 mixes logits, as `taid` does;
        larger alpha keeps only what both models find probable (seeking), smaller what either does (covering).
    When: to choose the geometry of the assistant distribution between those two.
    Source: AMiD (arXiv 2510.15982), whose code takes every alpha of 1 or more as 1 (geometric): at alpha = 3
        the value differs by 26%, the gradient by 60%.
    """

    kind: Literal["alpha_mixture"] = "alpha_mixture"
    alpha: MixtureAlpha = -1.0
    """The order of the mean: -1 arithmetic, 1 geometric, 3 harmonic."""
    teacher_share: InnerShare = 0.1
    """Share of the teacher in the mean; lambda in the paper."""
    direction: Literal["forward", "reverse"] = "forward"
    """From the teacher (forward) or from the student (reverse) to the mean."""
    ab: Annotated[tuple[PositiveExponent, PositiveExponent], Field(strict=False)] | None = None
    """Exponents of the AB divergence (see `ab`) that stands in the place of KL: the first of the model, the
    second of the mean. None: KL, which is (1, 0)."""

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        mean = log_softmax(self.log_mean(log_p, log_q))
        model = log_p if self.direction == "forward" else log_q
        if self.ab is None:
            return kl(model, mean)
        return AB(alpha=self.ab[0], beta=self.ab[1]).per_token(mean, model, rows)

    def log_mean(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The logarithm of the generalised mean before it is normalised."""
        c, share = (1 - float(self.alpha)) / 2, float(self.teacher_share)
        if c == 0.0:
            return torch.lerp(log_q, log_p, share)
        if abs(c) > 0.1:
            return mixture(c * log_p, c * log_q, share) / c
        power = c * (log_p - log_q)
        near = log_q + torch.log1p(share * torch.expm1(power.clamp(-1.0, 1.0))) / c
        return torch.where(power.abs() < 1.0, near, mixture(c * log_p, c * log_q, share) / c)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        c, share = (1 - float(self.alpha)) / 2, float(self.teacher_share)
        if c == 1.0 and self.direction == "forward" and self.ab is None:
            return (skew_kl_kernel(self.teacher_model, share),)
        kind, sums = ("mixture", 1) if self.ab is None else ("mixture_ab", 3 + (self.direction == "reverse"))
        return (
            KernelTerm(
                f"mixtures.{kind}_{self.direction}",
                (c, share, *(self.ab or ())),
                sums=sums,
                mixture="mixtures.power_mean",
                teacher_model=self.teacher_model,
            ),
        )

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        c, forward = (1 - float(self.alpha)) / 2, self.direction == "forward"
        if abs(c) <= 0.1 or self.ab is not None:
            return super().value_and_gradient(student, teacher, rows)
        if c == 1.0 and forward:
            return closed_skew_kl(student, teacher, float(self.teacher_share))
        return _closed_power_mixture(student, teacher, c, float(self.teacher_share), forward)


def _closed_power_mixture(
    student: Tensor, teacher: Tensor, c: float, share: float, forward: bool
) -> ValueAndGradient:
    """KL(p || m) or KL(q || m), m proportional to (s p^c + (1 - s) q^c)^(1/c), c not near zero.

    With b the student's part s_q q^c / (s p^c + s_q q^c), log m = log q - log(b) / c + constant, and the
    gradient for log q flows through b alone.
    """
    p, q, d = log_ratio(student.clone(), teacher)
    own = torch.mul(d, c).add_(math.log1p(-share) - math.log(share))
    log_own = torch.nn.functional.logsigmoid(own)
    log_m = student.sub_(log_own, alpha=1 / c)
    m = torch.softmax(log_m, -1)
    log_m.sub_(log_normaliser(log_m, m))
    weight = log_own.exp_()
    if forward:
        value = dot(p, teacher.sub_(log_normaliser(teacher, p)).sub_(log_m))
        force = m.sub_(p).mul_(weight)
        return value, force.sub_(q.mul_(force.sum(-1, keepdim=True)))
    gap = d.add_(teacher.sub_(log_normaliser(teacher, p))).sub_(log_m)
    value = dot(q, gap)
    force = m.sub_(q).mul_(weight)
    through = force.sum(-1, keepdim=True)
    return value, force.addcmul_(q, gap.sub_(value[:, None]).sub_(through))


@register
class TAID(Objective):
    """Forward KL from a target that moves from the student to the teacher.

    Equation: KL(p_t || q), p_t = softmax((1 - t) z + t z_teacher), the student's part constant.
    Gradient: q_i - p_t,i; a gentle one while t is small.
    Character: covering; t = 1 is forward KL, t -> 0 is no force at all.
    When: a large gap between the sizes of teacher and student. Let t follow the `momentum` schedule.
    Source: TAID (arXiv 2501.16937); released code at commit a062892, which logs the cross-entropy instead.
    """

    kind: Literal["taid"] = "taid"
    exact_gradient: ClassVar[bool] = False
    t: Share = 0.4
    """How far the target has come from the student (0) to the teacher (1)."""

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        target = torch.lerp(student.detach(), teacher, float(self.t))
        return kl(log_softmax(target), log_softmax(student))

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        numbers = (1.0, 0.0, 1.0, float(self.t))
        target = "mixtures.taid_target"
        return (
            KernelTerm("divergences.weighted_kl", numbers, target=target, teacher_model=self.teacher_model),
        )

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        target = torch.lerp(student, teacher, float(self.t), out=teacher)
        return closed_forward_kl(student, target)
