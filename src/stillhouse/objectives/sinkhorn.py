"""Entropic optimal transport between two sets of points, in logarithms and double precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = 500
TOLERANCE = {torch.float64: 1e-10}
"""Of the dual potentials, in units of cost, by the number format of the cost."""
OTHERWISE = 1e-6


def transport(cost: Tensor, blur: float) -> tuple[Tensor, Tensor]:
    """The entropic transport cost between uniform weights, and its plan.

    Equation: min <P, C> + e KL(P || a b^T) over plans P with row sums a = 1/n and column sums b = 1/m;
        e = `blur`. Solved in its dual by alternating f_i = -e log sum_j b_j exp((g_j - C_ij) / e) and the
        same for g (Sinkhorn), until nothing moves. The value is <f, a> + <g, b>; its gradient for the cost
        is the plan.

    Args:
        cost: [n, m], differentiable.
        blur: in units of the cost; larger is smoother and faster.

    Returns:
        The value, and the plan [n, m] without gradient.
    """
    c = cost.detach().double() / blur
    n, m = c.shape
    log_a, log_b = -math.log(n), -math.log(m)
    symmetric = n == m and torch.equal(c, c.t())
    f, g = c.new_zeros(n), c.new_zeros(m)
    tolerance = TOLERANCE.get(cost.dtype, OTHERWISE) / blur
    for _ in range(STEPS):
        if symmetric:  # the mean of both updates: converges at once and keeps f = g
            new = (f - torch.logsumexp(f[None] - c, 1) - log_a) / 2
            moved, f = (new - f).abs().max(), new
            g = f
        else:
            new = -torch.logsumexp(g[None] - c, 1) - log_b
            moved, f = (new - f).abs().max(), new
            g = -torch.logsumexp(f[:, None] - c, 0) - log_a
        if moved < tolerance:
            break
    plan = (f[:, None] + g[None] - c + log_a + log_b).exp()
    value = blur * (f.mean() + g.mean())
    through = (plan.to(cost.dtype) * cost).sum()
    return value.to(cost.dtype) + through - through.detach(), plan


def divergence(cost: Tensor, ours: Tensor, theirs: Tensor, blur: float) -> Tensor:
    """The Sinkhorn divergence T(C_xy) - T(C_xx) / 2 - T(C_yy) / 2: how far two sets of points are apart.

    Not negative, and zero if and only if the sets are equal, where exp(-C / blur) is a positive definite
    kernel, as it is for squared Euclidean costs (Feydy et al. 2019, arXiv 1810.08278, theorem 1).

    Args:
        cost: [n, m] between the sets.
        ours: [n, n] within the first.
        theirs: [m, m] within the second.
        blur: as for `transport`.
    """
    return transport(cost, blur)[0] - 0.5 * (transport(ours, blur)[0] + transport(theirs, blur)[0])
