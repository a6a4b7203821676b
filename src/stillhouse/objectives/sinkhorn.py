"""Entropic optimal transport between two sets of points, in logarithms and double precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillhouse.core.host import known

STEPS = 500
SYMMETRIC_STEPS = 64
"""Where both sets are one: the mean of both updates halves what is left at each step."""
TOLERANCE = {torch.float64: 1e-10}
"""Of the dual potentials, in units of cost, by the number format of the cost."""
OTHERWISE = 1e-6


def transport(cost: Tensor, blur: float, symmetric: bool | None = None) -> tuple[Tensor, Tensor]:
    """The entropic transport cost between uniform weights, and its plan.

    Equation: min <P, C> + e KL(P || a b^T) over plans P with row sums a = 1/n and column sums b = 1/m;
        e = `blur`. Solved in its dual by alternating f_i = -e log sum_j b_j exp((g_j - C_ij) / e) and the
        same for g (Sinkhorn), until nothing moves. The value is <f, a> + <g, b>; its gradient for the cost
        is the plan.

    Args:
        cost: [n, m], differentiable.
        blur: in units of the cost; larger is smoother and faster.
        symmetric: whether the cost is that of a set with itself; None: nobody has said.

    Returns:
        The value, and the plan [n, m] without gradient.
    """
    c = cost.detach().double() / blur
    n, m = c.shape
    log_a, log_b = -math.log(n), -math.log(m)
    tolerance = TOLERANCE.get(cost.dtype, OTHERWISE) / blur
    f, g = _potentials(c, tolerance, symmetric)
    plan = (f[:, None] + g[None] - c + log_a + log_b).exp()
    value = blur * (f.mean() + g.mean())
    through = (plan.to(cost.dtype) * cost).sum()
    return value.to(cost.dtype) + through - through.detach(), plan


def _potentials(c: Tensor, tolerance: float, symmetric: bool | None) -> tuple[Tensor, Tensor]:
    """f [n] and g [m] in units of `blur`.

    A CPU stops once nothing moves. A GPU would have to be waited for to know that, so it takes all steps, of
    which those after that point change nothing.
    """
    n, m = c.shape
    log_a, log_b = -math.log(n), -math.log(m)
    f, g = c.new_zeros(n), c.new_zeros(m)
    equal = (c == c.t()).all() if n == m else None
    if symmetric is None:
        symmetric = False if equal is None else known(equal)
    done = torch.zeros((), dtype=torch.bool, device=c.device)
    for _ in range(SYMMETRIC_STEPS if symmetric else STEPS):
        onto = torch.logsumexp(g[None] - c, 1)
        # Of a symmetric cost the mean of both updates: converges at once and keeps f = g.
        mean = (f - onto - log_a) / 2
        if symmetric:
            new_f = new_g = mean
        else:
            new_f = -onto - log_b
            new_g = -torch.logsumexp(new_f[:, None] - c, 0) - log_a
            if symmetric is None and equal is not None:
                new_f, new_g = torch.where(equal, mean, new_f), torch.where(equal, mean, new_g)
        moved = (new_f - f).abs().max()
        f, g = torch.where(done, f, new_f), torch.where(done, g, new_g)
        done = done | (moved < tolerance)
        if known(done):
            break
    return f, g


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
    within = transport(ours, blur, symmetric=True)[0] + transport(theirs, blur, symmetric=True)[0]
    return transport(cost, blur)[0] - 0.5 * within
