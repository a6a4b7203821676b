"""Divergences between the token distributions of teacher p and student q, summed over the whole vocabulary.

Throughout, z are the student's logits and q = softmax(z), p = softmax(teacher logits). Everything is
computed from log-probabilities, so logit gaps of 1e4 give finite numbers.

The definition of an objective is its `per_token`. Beside it stands the closed form: value and gradient in
place, over scratch logits [n, V], which halves the arithmetic; a law holds the two to each other. There
log(p / m) is taken of a ratio that is never large, so that probabilities that underflow meet a finite
logarithm and count as zero.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stillhouse.config import because
from stillhouse.core.requirements import Requirements
from stillhouse.core.rows import Rows
from stillhouse.objectives.base import Objective
from stillhouse.objectives.kernels import KernelTerm, Mean
from stillhouse.objectives.ranges import InnerShare, Skew, Temperature
from stillhouse.objectives.registry import register
from stillhouse.schedules import Share

ValueAndGradient = tuple[Tensor, Tensor]
"""[n] values and [n, V], the gradient of their sum for the student's logits."""


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last axis."""
    return torch.log_softmax(logits, -1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), [N] nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, share: float | Tensor) -> Tensor:
    """log(share p + (1 - share) q), without leaving log space."""
    if isinstance(share, Tensor):
        return torch.logaddexp(log_p + share.log(), log_q + torch.log1p(-share))
    if share in (0.0, 1.0):
        return log_p if share == 1.0 else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def both(student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """log p of the teacher and log q of the student."""
    assert teacher is not None
    return log_softmax(teacher), log_softmax(student)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row sums of the product, [n]."""
    return torch.linalg.vecdot(a, b)


def log_normaliser(logits: Tensor, probabilities: Tensor) -> Tensor:
    """logsumexp of each row, [n, 1], from its softmax: the largest logit minus the largest
    log-probability."""
    return logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()


def log_ratio(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, q, and log(q / p), which overwrites the student's logits."""
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    shift = log_normaliser(teacher, p) - log_normaliser(student, q)
    return p, q, student.sub_(teacher).add_(shift)


def mix_probabilities(first: Tensor, second: Tensor, share: float | Tensor) -> Tensor:
    """(1 - share) first + share second, never zero."""
    weight = share if isinstance(share, Tensor) else float(share)
    return torch.lerp(first, second, weight).clamp_min_(torch.finfo(first.dtype).tiny)


def finite_log(ratio: Tensor, out: Tensor) -> Tensor:
    """log(ratio), finite where the ratio is zero."""
    return torch.clamp_min(ratio, torch.finfo(ratio.dtype).tiny, out=out).log_()


def closed_forward_kl(student: Tensor, teacher: Tensor) -> ValueAndGradient:
    """KL(p || q) and q - p."""
    p, q, d = log_ratio(student, teacher)
    return -dot(p, d), q.sub_(p)


def closed_reverse_kl(student: Tensor, teacher: Tensor) -> ValueAndGradient:
    """KL(q || p) and q (log(q / p) - KL)."""
    _, q, d = log_ratio(student, teacher)
    value = dot(q, d)
    return value, d.sub_(value[:, None]).mul_(q)


def closed_weighted_kl(
    p: Tensor, q: Tensor, d: Tensor, forward: float | Tensor, reverse: float | Tensor
) -> ValueAndGradient:
    """forward KL(p || q) + reverse KL(q || p) from what `log_ratio` gives; the weights are numbers or [n]."""
    to_teacher, to_student = -dot(p, d), dot(q, d)
    f, r = (w[:, None] if isinstance(w, Tensor) else w for w in (forward, reverse))
    gradient = d.sub_(to_student[:, None]).mul_(r).add_(f).mul_(q).sub_(p.mul_(f))
    return forward * to_teacher + reverse * to_student, gradient


def closed_skew_kl(student: Tensor, teacher: Tensor, alpha: float | Tensor) -> ValueAndGradient:
    """KL(p || m), m = a p + (1 - a) q, 0 < a; a is a number or a column [n, 1]."""
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    m = mix_probabilities(q, p, alpha)
    ratio = torch.div(p, m, out=m)
    value = dot(p, finite_log(ratio, out=teacher))
    gain = ratio.mul_(q).mul_(1 - alpha)
    return value, q.mul_(gain.sum(-1, keepdim=True)).sub_(gain)


def closed_skew_rkl(
    student: Tensor, teacher: Tensor, alpha: float | Tensor, detach_mixture: bool
) -> ValueAndGradient:
    """KL(q || m), m = (1 - a) p + a q, 0 < a; with the student inside m constant or not."""
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    m = mix_probabilities(p, q, alpha)
    ratio = torch.div(q, m, out=m)
    force = finite_log(ratio, out=teacher)
    value = dot(q, force)
    if not detach_mixture:
        force = force.sub_(ratio.mul_(alpha))
        return value, force.sub_(dot(q, force)[:, None]).mul_(q)
    return value, force.sub_(value[:, None]).mul_(q)


def kl_kernel(teacher: str, forward: float, reverse: float, temperature: float = 1.0) -> KernelTerm:
    """forward KL(p || q) + reverse KL(q || p) at a temperature."""
    means = frozenset[Mean]({"student"} if reverse else ())
    numbers = (forward, reverse, 1 / temperature)
    return KernelTerm(
        "divergences.weighted_kl", numbers, means=means, temperature=temperature, teacher_model=teacher
    )


def skew_kl_kernel(teacher: str, alpha: float | Tensor) -> KernelTerm:
    """KL(p || m), m = a p + (1 - a) q; a is a number or [n] that are not zero."""
    if not isinstance(alpha, Tensor) and alpha == 0.0:
        return kl_kernel(teacher, 1.0, 0.0)
    return KernelTerm("divergences.skew_kl", (alpha,), sums=1, teacher_model=teacher)


def skew_rkl_kernel(teacher: str, alpha: float | Tensor, detach_mixture: bool) -> KernelTerm:
    """KL(q || m), m = (1 - a) p + a q; a is a number or [n] that are not zero."""
    if not isinstance(alpha, Tensor) and alpha == 0.0:
        return kl_kernel(teacher, 0.0, 1.0)
    numbers = (alpha, 0.0 if detach_mixture else 1.0)
    return KernelTerm("divergences.skew_rkl", numbers, sums=1, teacher_model=teacher)


@register
class ForwardKL(Objective):
    """Forward KL divergence KL(p || q): the plain distillation loss.

    Equation: sum_i p_i log(p_i / q_i), with both softmaxes at `temperature`.
    Gradient: (q_i - p_i) / temperature; bounded.
    Character: covers every mode of the teacher.
    When: the teacher's text, or data; a student that is not much smaller than its teacher; as the first
        thing to try.
    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), equation 1, without the factor temperature^2.
    """

    kind: Literal["forward_kl"] = "forward_kl"
    temperature: Temperature = 1.0
    """Divides the logits of both models. The value is that of the softened distributions, not scaled back."""

    def requirements(self) -> Requirements:
        sparse = ("topk", "sampled") if self.temperature == 1.0 else ()  # a softened tail is unknown
        return self.compared_with("distribution", *sparse)

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        log_p, log_q = both(student / self.temperature, teacher / self.temperature)
        return kl(log_p, log_q)

    def per_sample(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p - log_q

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        return (kl_kernel(self.teacher_model, 1.0, 0.0, float(self.temperature)),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        if self.temperature == 1.0:
            return closed_forward_kl(student, teacher)
        value, gradient = closed_forward_kl(student.div_(self.temperature), teacher.div_(self.temperature))
        return value, gradient.div_(self.temperature)


@register
class ReverseKL(Objective):
    """Reverse KL divergence KL(q || p).

    Equation: sum_i q_i log(q_i / p_i), with both softmaxes at `temperature`.
    Gradient: q_i (log(q_i / p_i) - KL(q || p)) / temperature; no force where q_i is zero, unbounded where
        p_i is.
    Character: seeks the modes of the teacher.
    When: the student's own text, and a student too small to cover the teacher.
    Source: Gu et al. 2024, MiniLLM (arXiv 2306.08543), the single-step part.
    """

    kind: Literal["reverse_kl"] = "reverse_kl"
    temperature: Temperature = 1.0
    """Divides the logits of both models. The value is that of the softened distributions, not scaled back."""

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", *(("topk",) if self.temperature == 1.0 else ()))

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        log_p, log_q = both(student / self.temperature, teacher / self.temperature)
        return kl(log_q, log_p)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        return (kl_kernel(self.teacher_model, 0.0, 1.0, float(self.temperature)),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        if self.temperature == 1.0:
            return closed_reverse_kl(student, teacher)
        value, gradient = closed_reverse_kl(student.div_(self.temperature), teacher.div_(self.temperature))
        return value, gradient.div_(self.temperature)


@register
class SymmetricKL(Objective):
    """A weighted sum of both KL divergences on the same text.

    Equation: (1 - w) KL(p || q) + w KL(q || p), w = `reverse_weight`.
    Gradient: (1 - w)(q_i - p_i) + w q_i (log(q_i / p_i) - KL(q || p)).
    Character: between covering and seeking, by the weight.
    When: as a compromise where one weight per source is not wanted.
    Source: DistiLLM code at commit d47e77f (its default weight is 0.9).
    """

    kind: Literal["symmetric_kl"] = "symmetric_kl"
    reverse_weight: Share = 0.5
    """The weight of KL(q || p), the student's side; lambda in the released code."""

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        w = self.reverse_weight
        return (((1 - w) * log_p.exp() - w * log_q.exp()) * (log_p - log_q)).sum(-1)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        weight = float(self.reverse_weight)
        return (kl_kernel(self.teacher_model, 1 - weight, weight),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        weight = float(self.reverse_weight)
        return closed_weighted_kl(*log_ratio(student, teacher), 1 - weight, weight)


@register
class Jeffreys(Objective):
    """Jeffreys divergence: both KL divergences with weight one each.

    Equation: sum_i (p_i - q_i)(log p_i - log q_i) = KL(p || q) + KL(q || p).
    Gradient: (q_i - p_i) + q_i (log(q_i / p_i) - KL(q || p)).
    Character: between covering and seeking; as unbounded as reverse KL.
    When: as a baseline.
    Source: Jeffreys 1946; the CSD code at commit c77a3a7.
    """

    kind: Literal["jeffreys"] = "jeffreys"

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        return (kl_kernel(self.teacher_model, 1.0, 1.0),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        return closed_weighted_kl(*log_ratio(student, teacher), 1.0, 1.0)


@register
class JSD(Objective):
    """Generalised Jensen-Shannon divergence.

    Equation: w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q, w = `teacher_weight`.
    Gradient: (1 - w) q_i (log(q_i / m_i) - KL(q || m)); bounded.
    Character: covering for small w (divided by w it tends to forward KL), seeking for large w.
    When: on-policy distillation with bounded gradients (GKD).
    Source: Agarwal et al. 2024, GKD (arXiv 2306.13649), where w is beta. The DistiLLM code names the
        student's weight.
    """

    kind: Literal["jsd"] = "jsd"
    teacher_weight: InnerShare = 0.5
    """Weight of the teacher, beta in GKD. At exactly 0 or 1 the divergence is zero for all q, so that is
    refused;
    use `forward_kl` or `reverse_kl`, which GKD means by these two numbers."""

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        w = self.teacher_weight
        log_m = mixture(log_p, log_q, w)
        return w * kl(log_p, log_m) + (1 - w) * kl(log_q, log_m)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        numbers = (float(self.teacher_weight),)
        return (KernelTerm("divergences.jsd", numbers, sums=1, teacher_model=self.teacher_model),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        w = float(self.teacher_weight)
        p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
        log_p = teacher.sub_(log_normaliser(teacher, p))
        log_q = student.sub_(log_normaliser(student, q))
        log_m = mix_probabilities(q, p, w).log_()  # one logarithm for both sides
        from_teacher = dot(p, log_p.sub_(log_m))
        force = log_q.sub_(log_m)
        from_student = dot(q, force)
        gradient = force.sub_(from_student[:, None]).mul_(q).mul_(1 - w)
        return w * from_teacher + (1 - w) * from_student, gradient


@register
class TVD(Objective):
    """Total variation distance.

    Equation: 1/2 sum_i |p_i - q_i|.
    Gradient: 1/2 q_i (s_i - sum_j q_j s_j), s = sign(q - p); bounded by 1/2, a subgradient where q_i = p_i.
    Character: neither; treats every unit of mass alike.
    When: to raise the acceptance rate of a draft model, which is 1 - TVD on its own text.
    Source: DistillSpec (arXiv 2310.08461), Wen et al. 2023 (arXiv 2307.15190).
    """

    kind: Literal["tvd"] = "tvd"

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        return 0.5 * (torch.softmax(teacher, -1) - torch.softmax(student, -1)).abs().sum(-1)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        return (KernelTerm("divergences.tvd", sums=1, teacher_model=self.teacher_model),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        q = torch.softmax(student, -1)
        difference = torch.softmax(teacher, -1).sub_(q).neg_()
        sign = torch.sign(difference, out=student)
        value = 0.5 * dot(difference, sign)
        return value, sign.sub_(dot(q, sign)[:, None]).mul_(q).mul_(0.5)


@register
class SkewKL(Objective):
    """Skew KL divergence: forward KL to a mixture with a share of the teacher in it.

    Equation: KL(p || m), m = a p + (1 - a) q, a = `alpha`.
    Gradient: (1 - a) q_i (sum_j p_j q_j / m_j - p_i / m_i); p / m is at most 1 / a, so it is bounded.
    Character: covering; alpha -> 0 is forward KL.
    When: teacher-written text.
    Source: Ko et al. 2024, DistiLLM (arXiv 2402.03898), equation 4.
    """

    kind: Literal["skew_kl"] = "skew_kl"
    alpha: Skew = 0.1
    """Share of the teacher in the mixture."""

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk", "sampled")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        return kl(log_p, mixture(log_p, log_q, self.alpha))

    def per_sample(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p - mixture(log_p, log_q, self.alpha)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        return (skew_kl_kernel(self.teacher_model, float(self.alpha)),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        if self.alpha == 0.0:
            return closed_forward_kl(student, teacher)
        return closed_skew_kl(student, teacher, float(self.alpha))


@register
class SkewRKL(Objective):
    """Skew reverse KL divergence: reverse KL to a mixture with a share of the student in it.

    Equation: KL(q || m), m = (1 - a) p + a q, a = `alpha`.
    Gradient: q_i (c_i - sum_j q_j c_j), c = log(q / m) - a q / m; with `detach_mixture` c = log(q / m) alone.
    Character: seeking, with bounded coefficients; alpha -> 0 is reverse KL.
    When: student-written text.
    Source: Ko et al. 2024, DistiLLM (arXiv 2402.03898), equation 5; DistiLLM-2's code detaches the mixture.
    """

    kind: Literal["skew_rkl"] = "skew_rkl"
    alpha: Skew = 0.1
    """Share of the student in the mixture."""
    detach_mixture: bool = False
    """Treat the student inside the mixture as a constant, as the DistiLLM-2 code (commit fe4cf9b) does. Same
    value and same zero, but another direction: the two gradients can even point apart."""

    def options_without_effect(self) -> dict[str, str]:
        return because("alpha 0 mixes nothing", "detach_mixture") if self.alpha == 0 else {}

    @property
    def exact_gradient(self) -> bool:  # type: ignore[override]
        return not self.detach_mixture

    def requirements(self) -> Requirements:
        return self.compared_with("distribution", "topk")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        inside = log_q.detach() if self.detach_mixture else log_q
        return kl(log_q, mixture(log_p, inside, 1 - self.alpha))

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        return (skew_rkl_kernel(self.teacher_model, float(self.alpha), self.detach_mixture),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        if self.alpha == 0.0:
            return closed_reverse_kl(student, teacher)
        return closed_skew_rkl(student, teacher, float(self.alpha), self.detach_mixture)
