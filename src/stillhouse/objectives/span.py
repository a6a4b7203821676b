"""Span alignment: distributions of two tokenizers, merged by the chain rule over spans of the same bytes."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from stillhouse.config import because
from stillhouse.core.alignment import Members, VocabularyMatch
from stillhouse.core.host import to_device
from stillhouse.core.requirements import Requirements
from stillhouse.core.rows import Rows
from stillhouse.objectives.base import Objective
from stillhouse.objectives.divergences import kl, mixture
from stillhouse.objectives.logits import label_logprobs
from stillhouse.objectives.ranges import InnerShare
from stillhouse.objectives.registry import register
from stillhouse.objectives.uld import ascending, ascending_values
from stillhouse.schedules import NonNegative


@register
class Span(Objective):
    """Compares merged distributions over spans of equal bytes, so that tokenizers may differ.

    Equation: w D(q_M, p_M) + v sum_k |q_R(k) - p_R(k)| for each span. A span's distribution is that of one
        of its rows times the probabilities of its other tokens as they were written (chain rule): with
        `order: observed` the first row, times what followed; with `bayesian` the last row, times what
        preceded. M are the tokens that both vocabularies spell alike, R the rest, sorted. D is a divergence
        of measures: with m the mixture, jsd is a sum p log(p/m) + (1 - a) sum q log(q/m), and forward_kl
        is sum p log(p/q) - p + q. w is the matched share of the teacher's vocabulary and v = 1 - w unless
        set. The value stands at the row that stands for the span; the span's other rows have zero.
    Gradient: that of D and of the sorted distance, through the distribution and through the other tokens.
    Character: as the divergence on shared tokens; blind to which token is which on the rest.
    When: a teacher with another tokenizer. With the same tokenizer it is the divergence itself.
    Source: GOLD in TRL (commit of version 1.16.0), which aligns by bytes and merges likewise. There the
        default `observed` reads each distribution one row late, after the token that it should predict, and
        leaves the end of a response out; here it does neither.
    """

    kind: Literal["span"] = "span"
    mixes_rows: ClassVar[bool] = True
    order: Literal["observed", "bayesian"] = "observed"
    """Whose distribution stands for a span of several tokens: its first row's or its last one's."""
    compare: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    """The divergence on the tokens that both have."""
    teacher_weight: InnerShare = 0.5
    """Weight of the teacher in the mixture of jsd, a in the equation."""
    matched_weight: NonNegative | None = None
    """Weight of the tokens that both have; default: their share of the teacher's vocabulary."""
    rest_weight: NonNegative | None = None
    """Weight of the other tokens; default: 1 minus that share."""

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.compare == "jsd" else because("compare is not jsd", "teacher_weight")

    def requirements(self) -> Requirements:
        needs = self.compared_with("distribution", same_tokenizer=False)
        return needs | Requirements(granularity="group")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        alignment = rows.alignment
        matching = None if alignment is None else alignment.matching
        if matching is None:  # of heads of different height the shared ids are compared
            size = min(student.shape[-1], teacher.shape[-1])
            student, teacher = student[:, :size], teacher[:, :size]
        if alignment is None:
            return self._value(student.log_softmax(-1), teacher.log_softmax(-1), None)
        assert rows.labels is not None
        ours, theirs = alignment.members(student.device, last=self.order == "bayesian")
        log_q = merged(student, rows.labels, ours)
        log_p = merged(teacher, to_device(alignment.teacher_labels, teacher.device), theirs)
        value = self._value(log_q, log_p, matching)
        return student.new_zeros(student.shape[0]).index_put((ours.anchors,), value)

    def _value(self, log_q: Tensor, log_p: Tensor, matching: VocabularyMatch | None) -> Tensor:
        """From measures [G, V] and [G, V'] in logarithms to [G]."""
        share = 1.0 if matching is None else matching.share
        on_matched = share if self.matched_weight is None else self.matched_weight
        on_rest = 1.0 - share if self.rest_weight is None else self.rest_weight
        if matching is None:
            return on_matched * self._divergence(log_q, log_p)
        value, ids = log_q.new_zeros(log_q.shape[0]), matching.on(log_q.device)
        if ids.student.numel():
            both = log_q[:, ids.student], log_p[:, ids.teacher]
            value = value + on_matched * self._divergence(*both)
        if on_rest:
            rest = log_q[:, ids.student_rest].exp(), log_p[:, ids.teacher_rest].exp()
            value = value + on_rest * sorted_distance(*rest)
        return value

    def _divergence(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Of two measures of any mass: not negative, zero if and only if they are equal."""
        if self.compare == "forward_kl":
            return _kl(log_p, log_q)
        if self.compare == "reverse_kl":
            return _kl(log_q, log_p)
        w = self.teacher_weight
        log_m = mixture(log_p, log_q, w)
        return w * kl(log_p, log_m) + (1 - w) * kl(log_q, log_m)


def merged(logits: Tensor, labels: Tensor, members: Members) -> Tensor:
    """The logarithm of each group's measure, [G, V]: one row's distribution times the other rows' labels."""
    others = members.others
    chain = members.chained(label_logprobs(logits[others], labels[others]))
    return logits[members.anchors].log_softmax(-1) + chain[:, None]


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """sum_k |q_(k) - p_(k)| of the k-th largest, zeros padded, [G]; the gradient reaches q only."""
    with torch.no_grad():
        ours, place = ascending(q.detach())
        theirs = ascending_values(p.detach())
        size = max(ours.shape[-1], theirs.shape[-1])
        theirs = torch.nn.functional.pad(theirs, (size - theirs.shape[-1], 0))
        sign = torch.sign(torch.nn.functional.pad(ours, (size - ours.shape[-1], 0)) - theirs)
        slope = torch.empty_like(q).scatter_(-1, place, sign[:, size - ours.shape[-1] :])
        constant = (sign * theirs).sum(-1)
    return (slope * q).sum(-1) - constant


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p log(p / q) - p + q, for measures of any mass."""
    return kl(log_p, log_q) - log_p.exp().sum(-1) + log_q.exp().sum(-1)
