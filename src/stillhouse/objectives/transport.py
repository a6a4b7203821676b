"""Optimal transport between the tokens of one response under two tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config import ListOf, because
from stillhouse.core.alignment import Members, TokenAlignment
from stillhouse.core.host import RowIndex, known, to_device
from stillhouse.core.requirements import Requirements
from stillhouse.core.rows import Rows
from stillhouse.objectives.base import Layers, Objective
from stillhouse.objectives.registry import register
from stillhouse.schedules import NonNegative

HALF = (torch.float16, torch.bfloat16)
STEPS = 500
"""Most updates of the dual potentials."""
SYMMETRIC_STEPS = 64
"""Where both sets are one: the mean of both updates halves what is left at each step."""
TOLERANCE = {torch.float64: 1e-10}
"""Of the dual potentials, in units of cost, by the dtype of the cost; else `TOLERANCE_FP32`."""
TOLERANCE_FP32 = 1e-6
Points = Callable[[RowIndex, RowIndex], tuple[Tensor, Tensor]]
"""Rows of the student and of the teacher -> points of one space, with squared distances of at most 1."""


@register
class Transport(Objective):
    """Optimal transport between the rows of a response under both models: which belong together is found.

    Equation: S(Q, P) + v mean_l S(H_l, G_l) for each response; every row of a response has its value. S is
        the Sinkhorn divergence (transport cost with entropy `blur`, debiased) for the cost d + w (place
        distance)^2, w = `place_weight`. Sequence level: Q and P are the rows' distributions over the tokens
        that both vocabularies spell alike and one entry for the rest, d = 1 - sum_v sqrt(q_v p_v), the
        squared Hellinger distance. Layer level, for `layers` l and weight v = `layer_weight`: a row stands
        for its profile, the cosines of its centred hidden state with those of all group starts, which needs
        no common width or basis; d is the mean squared difference of two profiles over 4.
    Gradient: the transport plans weigh the gradients of the costs.
    Character: neither; bounded. Blind to what the rest of the vocabularies holds.
    When: tokenizers that cut text so differently that few positions fall together; beside `span` or
        cross-entropy.
    Source: the idea is that of CoT2Align (arXiv 2502.16806), transport over whole sequences and over layers;
        costs, entropy and debiasing are ours (Feydy et al. 2019, arXiv 1810.08278, for the divergence;
        profiles of distances as in Park et al. 2019, arXiv 1904.05068).
    """

    kind: Literal["transport"] = "transport"
    mixes_rows: ClassVar[bool] = True
    blur: Annotated[float, Field(gt=0.0)] = 0.1
    """The entropy that smooths the transport, in units of the cost: two distributions are at most 1 apart."""
    place_weight: NonNegative = 10.0
    """Cost of moving text: times the squared distance of two rows in their response, measured in bytes, whole
    response = 1."""
    layers: ListOf[Annotated[float, Field(ge=0.0, le=1.0)]] = ()
    """Layers whose hidden states are compared too, as shares of the depth: 0 is the embedding, 1 the last."""
    layer_weight: NonNegative = 1.0
    """Weight of the layers, of which the mean is taken."""

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.layers else because("no layers are compared", "layer_weight")

    def requirements(self) -> Requirements:
        layers = Requirements.of(self.teacher_model, "layers") if self.layers else Requirements()
        return (
            self.compared_with("distribution", same_tokenizer=False)
            | Requirements(
                rows=frozenset({"sequences"}), granularity="sequence", layers=frozenset(self.layers)
            )
            | layers
        )

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        alignment = _aligned(rows)
        ids = None if alignment.matching is None else alignment.matching.on(student.device)

        def points(ours: RowIndex, theirs: RowIndex) -> tuple[Tensor, Tensor]:
            q, p = ours.pick(student), theirs.pick(teacher)
            if ids is None:
                size = min(q.shape[-1], p.shape[-1])
                return _root(q[:, :size]), _root(p[:, :size])
            return _root(q, ids.student, ids.student_rest), _root(p, ids.teacher, ids.teacher_rest)

        return self._over_sequences(student, points, alignment)

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        alignment = _aligned(rows)
        found = [
            self._over_sequences(ours, self._profiles(ours, teacher[depth], alignment), alignment)
            for depth, ours in ((depth, student[depth]) for depth in self.layers)
        ]
        return self.layer_weight * torch.stack(found).mean(0)

    @staticmethod
    def _profiles(ours: Tensor, theirs: Tensor, alignment: TokenAlignment) -> Points:
        def points(student: RowIndex, teacher: RowIndex) -> tuple[Tensor, Tensor]:
            starts = (
                Members.of(alignment.student_groups[student.host], False, ours.device).anchors,
                Members.of(alignment.teacher_groups[teacher.host], False, theirs.device).anchors,
            )
            return profiles(student.pick(ours), starts[0]), profiles(teacher.pick(theirs), starts[1])

        return points

    def _over_sequences(self, like: Tensor, points: Points, alignment: TokenAlignment) -> Tensor:
        """The divergence of each sequence at each of its rows, [N]; zero where nothing is aligned."""
        value = like.new_zeros(like.shape[0], dtype=torch.promote_types(like.dtype, torch.float32))
        for student, teacher in alignment.sequences():
            places = (
                to_device(alignment.student_places[student.host], like.device),
                to_device(alignment.teacher_places[teacher.host], like.device),
            )
            found = sinkhorn_divergence(*self._costs(points(student, teacher), places), self.blur)
            sequence = alignment.student_sequences[student.host][0]
            whole = to_device(alignment.student_sequences == sequence, like.device)
            value = torch.where(whole, found, value)
        return value

    def _costs(
        self, points: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, y = points
        a, b = (place.to(x.dtype) for place in places)

        def cost(one: Tensor, other: Tensor, here: Tensor, there: Tensor) -> Tensor:
            squares = one.square().sum(-1)[:, None] + other.square().sum(-1)[None] - 2 * one @ other.t()
            return squares.clamp_min(0) + self.place_weight * (here[:, None] - there[None]).square()

        return cost(x, y, a, b), cost(x, x, a, a), cost(y, y, b, b)


def profiles(states: Tensor, anchors: Tensor) -> Tensor:
    """What each row is like, seen from the group starts: [n, G] cosines of centred states, scaled so that the
    squared distance of two rows is at most 1.

    Does not change if the states are shifted, turned or scaled as a whole.
    """
    states = states.float() if states.dtype in HALF else states
    centred = states - states[anchors].mean(0, keepdim=True)
    squares = centred.square().sum(-1, keepdim=True)
    # A row at the centre has no direction: its profile goes to zero, and its gradient stays bounded.
    unit = centred * (squares + 1e-6 * squares.mean() + 1e-12).rsqrt()
    return unit @ unit[anchors].t() / (2 * anchors.shape[0] ** 0.5)


def _root(logits: Tensor, shared: Tensor | None = None, rest: Tensor | None = None) -> Tensor:
    """sqrt(probability / 2) over the shared tokens and the rest, [n, K + 1]: half the squared distance of two
    is 1 - sum sqrt(q p)."""
    logs = logits.log_softmax(-1)
    if shared is not None and rest is not None:
        tail = logs[:, rest].logsumexp(-1, keepdim=True) if rest.numel() else None
        # Both models have an entry for the rest, or the spaces would differ.
        tail = torch.full_like(logs[:, :1], -1e30) if tail is None else tail
        logs = torch.cat([logs[:, shared], tail], -1)
    return (0.5 * logs).exp() * 0.5**0.5


def _aligned(rows: Rows) -> TokenAlignment:
    if rows.alignment is not None:
        return rows.alignment
    assert rows.sequence_ids is not None
    return TokenAlignment.identity(rows.sequence_ids)


def transport_cost(cost: Tensor, blur: float, symmetric: bool | None = None) -> tuple[Tensor, Tensor]:
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
    tolerance = TOLERANCE.get(cost.dtype, TOLERANCE_FP32) / blur
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


def sinkhorn_divergence(cost: Tensor, ours: Tensor, theirs: Tensor, blur: float) -> Tensor:
    """The Sinkhorn divergence T(C_xy) - T(C_xx) / 2 - T(C_yy) / 2: how far two sets of points are apart.

    Not negative, and zero if and only if the sets are equal, where exp(-C / blur) is a positive definite
    kernel, as it is for squared Euclidean costs (Feydy et al. 2019, arXiv 1810.08278, theorem 1).

    Args:
        cost: [n, m] between the sets.
        ours: [n, n] within the first.
        theirs: [m, m] within the second.
        blur: as for `transport_cost`.
    """
    within = transport_cost(ours, blur, symmetric=True)[0] + transport_cost(theirs, blur, symmetric=True)[0]
    return transport_cost(cost, blur)[0] - 0.5 * within
