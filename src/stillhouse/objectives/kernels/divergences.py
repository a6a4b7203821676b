"""Row sums, values and gradients of divergences, for the Triton template.

The equations are those of the objectives; gradients are for the student's logits. `slope` is 1 / temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stillhouse.objectives.kernels.token import TINY


@triton.jit
def weighted_kl(token, means, sums, numbers):
    """forward KL(p || q) + reverse KL(q || p); needs the mean residual under the student."""
    forward, reverse, slope = numbers[0], numbers[1], numbers[2]
    d = token.log_q - token.log_p
    value = (reverse * token.q - forward * token.p) * d
    pull = reverse * slope * token.q * (token.residual - means.student)
    return value, slope * (forward * (token.q - token.p) + pull)


@triton.jit
def skew_kl_sums(token, numbers):
    m = tl.maximum(numbers[0] * token.p + (1.0 - numbers[0]) * token.q, TINY)
    return (token.q * (token.p / m),)


@triton.jit
def skew_kl(token, means, sums, numbers):
    """KL(p || m), m = a p + (1 - a) q, 0 < a."""
    share = 1.0 - numbers[0]
    ratio = token.p / tl.maximum(numbers[0] * token.p + share * token.q, TINY)
    return token.p * tl.log(tl.maximum(ratio, TINY)), share * token.q * (sums[0] - ratio)


@triton.jit
def skew_rkl_force(token, numbers):
    """log(q / m), and what its mean under q is centred by in the gradient."""
    ratio = token.q / tl.maximum((1.0 - numbers[0]) * token.p + numbers[0] * token.q, TINY)
    gap = tl.log(tl.maximum(ratio, TINY))
    return gap, gap - numbers[1] * numbers[0] * ratio


@triton.jit
def skew_rkl_sums(token, numbers):
    return (token.q * skew_rkl_force(token, numbers)[1],)


@triton.jit
def skew_rkl(token, means, sums, numbers):
    """KL(q || m), m = (1 - a) p + a q, 0 < a; the second number is 0 if the q in m is constant."""
    gap, force = skew_rkl_force(token, numbers)
    return token.q * gap, token.q * (force - sums[0])


@triton.jit
def jsd_sums(token, numbers):
    m = tl.maximum(numbers[0] * token.p + (1.0 - numbers[0]) * token.q, TINY)
    return (token.q * (token.log_q - tl.log(m)),)


@triton.jit
def jsd(token, means, sums, numbers):
    """w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q."""
    w, rest = numbers[0], 1.0 - numbers[0]
    log_m = tl.log(tl.maximum(w * token.p + rest * token.q, TINY))
    value = w * token.p * (token.log_p - log_m) + rest * token.q * (token.log_q - log_m)
    return value, rest * token.q * (token.log_q - log_m - sums[0])


@triton.jit
def sign(token):
    return tl.where(token.q > token.p, 1.0, tl.where(token.q < token.p, -1.0, 0.0))


@triton.jit
def tvd_sums(token, numbers):
    return (token.q * sign(token),)


@triton.jit
def tvd(token, means, sums, numbers):
    """1/2 sum |p - q|."""
    return 0.5 * tl.abs(token.q - token.p), 0.5 * token.q * (sign(token) - sums[0])
