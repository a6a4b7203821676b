"""Values and gradients in closed form, in place, for the objectives where that halves the arithmetic.

Every function takes scratch logits [n, V] in fp32 or fp64 and returns values [n] and the gradient of their
sum [n, V].
The definitions are the `per_token` of the objectives; a law holds both to each other. `log(p / m)` is taken
of a ratio that is never large, so probabilities that underflow meet a finite logarithm and count as zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]


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


def forward_kl(student: Tensor, teacher: Tensor) -> Result:
    """KL(p || q) and q - p."""
    p, q, d = log_ratio(student, teacher)
    return -dot(p, d), q.sub_(p)


def reverse_kl(student: Tensor, teacher: Tensor) -> Result:
    """KL(q || p) and q (log(q / p) - KL)."""
    _, q, d = log_ratio(student, teacher)
    value = dot(q, d)
    return value, d.sub_(value[:, None]).mul_(q)


def symmetric_kl(
    student: Tensor, teacher: Tensor, forward: float | Tensor, reverse: float | Tensor
) -> Result:
    """forward KL(p || q) + reverse KL(q || p); the weights are numbers or [n]."""
    return weighed(*log_ratio(student, teacher), forward, reverse)


def weighed(p: Tensor, q: Tensor, d: Tensor, forward: float | Tensor, reverse: float | Tensor) -> Result:
    """As `symmetric_kl`, from what `log_ratio` gives."""
    to_teacher, to_student = -dot(p, d), dot(q, d)
    f, r = _column(forward), _column(reverse)
    gradient = d.sub_(to_student[:, None]).mul_(r).add_(f).mul_(q).sub_(p.mul_(f))
    return forward * to_teacher + reverse * to_student, gradient


def jsd(student: Tensor, teacher: Tensor, teacher_weight: float) -> Result:
    """w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q."""
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    log_p = teacher.sub_(log_normaliser(teacher, p))
    log_q = student.sub_(log_normaliser(student, q))
    log_m = _mixture(q, p, teacher_weight).log_()  # one logarithm for both sides
    from_teacher = dot(p, log_p.sub_(log_m))
    force = log_q.sub_(log_m)
    from_student = dot(q, force)
    gradient = force.sub_(from_student[:, None]).mul_(q).mul_(1 - teacher_weight)
    return teacher_weight * from_teacher + (1 - teacher_weight) * from_student, gradient


def tvd(student: Tensor, teacher: Tensor) -> Result:
    """1/2 sum |p - q| and 1/2 q (s - E_q s)."""
    q = torch.softmax(student, -1)
    difference = torch.softmax(teacher, -1).sub_(q).neg_()
    sign = torch.sign(difference, out=student)
    value = 0.5 * dot(difference, sign)
    return value, sign.sub_(dot(q, sign)[:, None]).mul_(q).mul_(0.5)


def skew_kl(student: Tensor, teacher: Tensor, alpha: float | Tensor) -> Result:
    """KL(p || m), m = a p + (1 - a) q, 0 < a; a is a number or a column [n, 1]."""
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    m = _mixture(q, p, alpha)
    ratio = torch.div(p, m, out=m)
    value = dot(p, _log(ratio, out=teacher))
    gain = ratio.mul_(q).mul_(1 - alpha)
    return value, q.mul_(gain.sum(-1, keepdim=True)).sub_(gain)


def skew_rkl(student: Tensor, teacher: Tensor, alpha: float | Tensor, detach_mixture: bool) -> Result:
    """KL(q || m), m = (1 - a) p + a q, 0 < a; with the student inside m constant or not."""
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    m = _mixture(p, q, alpha)
    ratio = torch.div(q, m, out=m)
    force = _log(ratio, out=teacher)
    value = dot(q, force)
    if not detach_mixture:
        force = force.sub_(ratio.mul_(alpha))
        return value, force.sub_(dot(q, force)[:, None]).mul_(q)
    return value, force.sub_(value[:, None]).mul_(q)


def csd(residual: Tensor, w1: Tensor, w2: Tensor, factor: float) -> Result:
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


def cross_entropy(student: Tensor, labels: Tensor) -> Result:
    """-log q(label) and q - [i = label]."""
    q = torch.softmax(student, -1)
    picked = student.gather(-1, labels[:, None])
    value = (log_normaliser(student, q) - picked).squeeze(-1)
    return value, q.scatter_add_(1, labels[:, None], q.new_full((1, 1), -1.0).expand_as(picked))


def expectation(student: Tensor, reward: Tensor) -> Result:
    """-sum q A and -q (A - E_q A); the reward is overwritten."""
    q = torch.softmax(student, -1)
    mean = dot(q, reward)
    return -mean, reward.sub_(mean[:, None]).mul_(q).neg_()


def ab(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Result:
    """The AB divergence for exponents that are not near zero."""
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    log_q = student.sub_(log_normaliser(student, q))
    log_p = teacher.sub_(log_normaliser(teacher, p))
    total = alpha + beta
    own = torch.mul(log_q, total).exp_()
    theirs = torch.mul(log_p, total, out=p).exp_()
    cross = log_p.mul_(alpha).add_(log_q, alpha=beta).exp_()
    sums = cross.sum(-1) - alpha / total * theirs.sum(-1) - beta / total * own.sum(-1)
    force = own.sub_(cross).mul_(1 / alpha)
    return -sums / (alpha * beta), force.sub_(q.mul_(force.sum(-1, keepdim=True)))


def power_mixture(student: Tensor, teacher: Tensor, c: float, share: float, forward: bool) -> Result:
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


def _column(weight: float | Tensor) -> float | Tensor:
    return weight[:, None] if isinstance(weight, Tensor) else weight


def _mixture(first: Tensor, second: Tensor, share: float | Tensor) -> Tensor:
    """(1 - share) first + share second, never zero."""
    weight = share if isinstance(share, Tensor) else float(share)
    return torch.lerp(first, second, weight).clamp_min_(torch.finfo(first.dtype).tiny)


def _log(ratio: Tensor, out: Tensor) -> Tensor:
    """log(ratio), finite where the ratio is zero."""
    return torch.clamp_min(ratio, torch.finfo(ratio.dtype).tiny, out=out).log_()
