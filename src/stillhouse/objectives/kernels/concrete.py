"""Values and gradients of objectives on differences of logits, for the Triton template."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it


@triton.jit
def csd(token, means, sums, numbers):
    """sum w1(y) w2(x) (r_x - r_y)^2; each weight is a mixture of the three."""
    w1 = numbers[0] * token.q + numbers[1] * token.p + numbers[2] * means.share
    w2 = numbers[3] * token.q + numbers[4] * token.p + numbers[5] * means.share
    mean1 = numbers[0] * means.student + numbers[1] * means.teacher + numbers[2] * means.uniform
    mean2 = numbers[3] * means.student + numbers[4] * means.teacher + numbers[5] * means.uniform
    first, second = token.residual - mean1, token.residual - mean2
    apart = (mean1 - mean2) * (mean1 - mean2)
    value = w1 * first * first + w2 * (second * second + apart)
    return value, 2.0 * (w2 * first + w1 * second)


@triton.jit
def dld(token, means, sums, numbers):
    """1/4 sum w r^2, the weight as in `csd`; the fourth number is 1 where r is reduced by its plain mean."""
    w = numbers[0] * token.q + numbers[1] * token.p + numbers[2] * means.share
    mean = numbers[0] * means.student + numbers[1] * means.teacher + numbers[2] * means.uniform
    centre = numbers[3] * means.uniform
    r = token.residual - centre
    return 0.25 * w * r * r, 0.5 * (w * r - numbers[3] * means.share * (mean - centre))
