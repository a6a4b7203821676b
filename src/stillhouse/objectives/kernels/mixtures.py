"""Row sums, values and gradients of divergences with a shape of their own, for the Triton template."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def taid_target(s, t, numbers):
    """The student's logits moved towards the teacher's; the fourth number is the teacher's share."""
    return (1.0 - numbers[3]) * s + numbers[3] * t


@triton.jit
def power_slope(u, v, total, x):
    """e^(total u) (e^(x d) - 1) / x with d = v - u; at x = 0 the limit. Accurate for small x d."""
    d = v - u
    y = x * d
    base = tl.exp(total * u)
    series = 1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7 * (1 + y / 8))))))
    far = (tl.exp(total * u + y) - base) / tl.where(x == 0.0, 1.0, x)
    return tl.where(tl.abs(y) < 0.5, base * d * series, far)


@triton.jit
def ab_value(log_p, log_q, a, b, square):
    """The term of the AB divergence of exponents a (of p) and b; `square` is 1 where both count as zero."""
    swapped = tl.abs(a) < tl.abs(b)  # D(a, b; p, q) = D(b, a; q, p): divide by the larger exponent
    u, v = tl.where(swapped, log_q, log_p), tl.where(swapped, log_p, log_q)
    large, small = tl.where(swapped, b, a), tl.where(swapped, a, b)
    slopes = power_slope(u, v, a + b, a + b) - power_slope(u, v, a + b, small)
    d = u - v
    return tl.where(square > 0, 0.5 * d * d, slopes / tl.where(large == 0.0, 1.0, large))


@triton.jit
def ab_force(log_p, log_q, a, b):
    """(q^(a+b) - p^a q^b) / a: the gradient for log q."""
    return -power_slope(log_q, log_p, a + b, a)


@triton.jit
def ab_sums(token, numbers):
    return (ab_force(token.log_p, token.log_q, numbers[0], numbers[1]),)


@triton.jit
def ab(token, means, sums, numbers):
    a, b = numbers[0], numbers[1]
    value = ab_value(token.log_p, token.log_q, a, b, numbers[2])
    return value, ab_force(token.log_p, token.log_q, a, b) - token.q * sums[0]


@triton.jit
def power_parts(log_q, log_p, numbers):
    """y = c (log p - log q), and the parts s p^c and (1 - s) q^c of the mean, over max(p^c, q^c)."""
    c, share = numbers[0], numbers[1]
    y = c * (log_p - log_q)
    top = tl.maximum(y, 0.0)
    return y, share * tl.exp(y - top), (1.0 - share) * tl.exp(-top)


@triton.jit
def power_mean(log_q, log_p, numbers):
    """The logarithm of (s p^c + (1 - s) q^c)^(1/c), and its limit at c = 0, before it is normalised."""
    c, s = numbers[0], numbers[1]
    y, theirs, ours = power_parts(log_q, log_p, numbers)
    k = s * (1.0 - s)  # the cumulants of a coin, for small y
    series = s + y / 2 * (k + y / 3 * (k * (1 - 2 * s) + y / 4 * k * (1 - 6 * k)))
    far = tl.where(y > 0, log_p, log_q) + tl.log(theirs + ours) / tl.where(c == 0.0, 1.0, c)
    return tl.where(tl.abs(y) < 0.03, log_q + (log_p - log_q) * series, far)


@triton.jit
def own_share(token, numbers):
    """How much log m moves with log q: the student's part of the mean."""
    _, theirs, ours = power_parts(token.log_q, token.log_p, numbers)
    return ours / (theirs + ours)


@triton.jit
def mixture_forward_sums(token, numbers):
    return ((tl.exp(token.log_m) - token.p) * own_share(token, numbers),)


@triton.jit
def mixture_forward(token, means, sums, numbers):
    """KL(p || m)."""
    force = (tl.exp(token.log_m) - token.p) * own_share(token, numbers)
    return token.p * (token.log_p - token.log_m), force - token.q * sums[0]


@triton.jit
def mixture_reverse_sums(token, numbers):
    gap = token.log_q - token.log_m
    return (token.q * gap + (tl.exp(token.log_m) - token.q) * own_share(token, numbers),)


@triton.jit
def mixture_reverse(token, means, sums, numbers):
    """KL(q || m)."""
    gap = token.log_q - token.log_m
    force = (tl.exp(token.log_m) - token.q) * own_share(token, numbers)
    return token.q * gap, token.q * gap + force - token.q * sums[0]


@triton.jit
def mixture_ab_forward_sums(token, numbers):
    own = own_share(token, numbers)
    force = ab_force(token.log_p, token.log_m, numbers[2], numbers[3])
    return force, force * own, tl.exp(token.log_m) * own


@triton.jit
def mixture_ab_forward(token, means, sums, numbers):
    """D_AB(p || m), exponents first of p, then of m, which is normalised: its force is centred first."""
    a, b = numbers[2], numbers[3]
    force = ab_force(token.log_p, token.log_m, a, b) - tl.exp(token.log_m) * sums[0]
    through = sums[1] - sums[0] * sums[2]
    value = ab_value(token.log_p, token.log_m, a, b, 0.0)
    return value, force * own_share(token, numbers) - token.q * through


@triton.jit
def mixture_ab_reverse_sums(token, numbers):
    own = own_share(token, numbers)
    force = ab_force(token.log_q, token.log_m, numbers[2], numbers[3])
    return (
        force,
        force * own,
        tl.exp(token.log_m) * own,
        ab_force(token.log_m, token.log_q, numbers[3], numbers[2]),
    )


@triton.jit
def mixture_ab_reverse(token, means, sums, numbers):
    """D_AB(q || m): q is on both sides."""
    a, b = numbers[2], numbers[3]
    force = ab_force(token.log_q, token.log_m, a, b) - tl.exp(token.log_m) * sums[0]
    direct = ab_force(token.log_m, token.log_q, b, a)
    through = sums[1] - sums[0] * sums[2] + sums[3]
    value = ab_value(token.log_q, token.log_m, a, b, 0.0)
    return value, force * own_share(token, numbers) + direct - token.q * through
