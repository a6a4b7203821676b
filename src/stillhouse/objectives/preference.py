"""Objectives that come from preference optimisation: the teacher as reference, advantages, synthetic
teachers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stillhouse.config import because
from stillhouse.core.requirements import LOGPROBS, REFERENCE, Requirements, RunFacts
from stillhouse.core.rows import Rows
from stillhouse.core.sparse import SparseLogprobs, gathered_at, looked_up
from stillhouse.errors import Fault
from stillhouse.objectives.base import Objective
from stillhouse.objectives.divergences import both, closed_reverse_kl, dot, kl, log_softmax
from stillhouse.objectives.logits import differentiated
from stillhouse.objectives.pairs import pair_gaps
from stillhouse.objectives.registry import register
from stillhouse.schedules import NonNegative

LEAST_STORED = math.log(1e-7)
"""The least log-probability (nats) that counts where only a few tokens of a teacher are stored."""
LARGEST_LOG = 80.0
"""e^80 is the largest ratio of two probabilities that counts: beyond it fp32 has no number."""


@register
class DPKD(Objective):
    """Direct preference knowledge distillation: prefer the teacher's choice over the student's, relative to
    the teacher.

    Equation: -log sigma(b D), D = [log q(y_c) - log q(y_r)] - [log p(y_c) - log p(y_r)], b = `scale`. At the
        level of sequences y_c is the teacher-written and y_r the student-written response of a prompt, or the
        chosen and the rejected one of a preference pair; at the level of tokens they are the most probable
        tokens of teacher and student. Every row of a pair has the pair's value.
    Gradient: -b sigma(-b D) (grad log q(y_c) - grad log q(y_r)).
    Character: seeking; nothing stops q(y_r) from going to zero, and that hurts.
    When: as a baseline for `contrastive`.
    Source: DPKD (arXiv 2406.19774): tokens as in LMOps at commit 4f2a9de, sequences as in DistiLLM-2's code.
    """

    kind: Literal["dpkd"] = "dpkd"
    divergence: ClassVar[bool] = False
    scale: NonNegative = 0.1
    """How sharp the preference is; beta in DPO."""
    level: Literal["sequence", "token"] = "sequence"
    """Compare whole responses, or the two favourite tokens at each position."""
    length_normalised: bool = True
    """Average log-probabilities over a response instead of adding them (sequence level)."""

    def options_without_effect(self) -> dict[str, str]:
        return because("level is token", "length_normalised") if self.level == "token" else {}

    def requirements(self) -> Requirements:
        if self.level == "token":
            return self.compared_with("distribution")
        rows = frozenset({"labels", "sources", "sequences", "pairs", "label_logprobs"})
        return self.compared_with(*LOGPROBS) | Requirements(rows=rows)

    @property
    def has_token_part(self) -> bool:  # type: ignore[override]
        return self.level == "token"

    @property
    def has_sequence_part(self) -> bool:  # type: ignore[override]
        return self.level == "sequence"

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        if self.level == "sequence":
            return student.new_zeros(student.shape[0])
        log_p, log_q = both(student, teacher)
        chosen, rejected = log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)
        gap = (log_q - log_p).gather(-1, chosen) - (log_q - log_p).gather(-1, rejected)
        return -logsigmoid(float(self.scale) * gap.squeeze(-1))

    def per_sequence(self, rows: Rows) -> Tensor:
        assert rows.student_logprobs is not None
        ratio = rows.student_logprobs - self.label_logprobs(rows).detach()
        gaps, of_row = pair_gaps(ratio, rows, self.name, mean=self.length_normalised)
        return -logsigmoid(float(self.scale) * gaps)[of_row]


def _two_teachers(objective: Objective, reference: str, *forms: str) -> Requirements:
    """Log-probabilities of an objective's teacher and of a second model, in one of these forms each."""
    second = replace(Requirements.of(reference, *forms), same_tokenizer=frozenset({reference}))
    return objective.compared_with(*forms) | second


@register
class Advantage(Objective):
    """Expected advantage under the student, where the advantage is what preference training did to the
    teacher.

    Equation: -w sum_a q(a) A(a), A = log p - log p_ref, with p the preference-trained teacher and p_ref its
        reference; w = 1, or by `importance` the probability of the text under the student over that under
        the student that wrote it. Where a teacher says something about its most probable tokens only, the
        sum is over those of p (of p_ref, where p is whole); a token that p_ref says nothing about has the
        least probability stored for p, and probabilities are at least 1e-7.
    Gradient: -w q_i (A_i - sum_j q_j A_j); w is a constant.
    Character: seeking; the value may be negative, and it is a reward, not a divergence.
    When: a teacher trained by DPO together with its reference; add cross-entropy on chosen responses.
    Source: ADPA (arXiv 2502.17927), equation of the policy loss; its trainer for the stored tokens.
    """

    kind: Literal["advantage"] = "advantage"
    divergence: ClassVar[bool] = False
    reference_model: str = REFERENCE
    """The teacher before its preference training, or the student at its start: a name under `teachers`."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Weight by q / (q when the text was sampled) of each token or of the whole sequence, for text that an
    earlier student wrote."""

    @property
    def exact_gradient(self) -> bool:  # type: ignore[override]
        return self.importance == "none"

    def requirements(self) -> Requirements:
        needs = _two_teachers(self, self.reference_model, "distribution", "topk")
        if self.importance == "none":
            return needs
        rows = {"labels", "sequences", "label_logprobs", "sampled_logprobs"}
        return needs | Requirements(rows=frozenset(rows))

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        if self.importance != "none" and facts.sources != {"student"}:
            yield Fault(
                f"{path}.importance",
                "compares with the student that wrote the text, and other text has none",
                got=", ".join(sorted(facts.sources)),
                hint="Map the objective to the student's text alone, objective: {student: {kind: advantage, "
                "importance: ...}, ...}, or leave importance out.",
            )

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        reference = rows.teachers[self.reference_model].signal
        if isinstance(reference, SparseLogprobs):
            few = replace(reference, logprobs=gathered_at(log_p, reference.ids))
            return self.per_token_sparse(student, few, rows)
        assert reference is not None
        return -self._weight(student, rows) * (log_q.exp() * (log_p - log_softmax(reference))).sum(-1)

    def per_token_sparse(self, student: Tensor, teacher: SparseLogprobs, rows: Rows) -> Tensor:
        there = (teacher.ids >= 0) & (teacher.ids < student.shape[-1])
        log_p = teacher.logprobs.to(student.dtype)
        reference = rows.teachers[self.reference_model].signal
        if isinstance(reference, SparseLogprobs):
            least = log_p.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
            log_ref = looked_up(reference, teacher.ids, student.shape[-1], least)
        else:
            assert reference is not None
            log_ref = gathered_at(log_softmax(reference), teacher.ids)
        advantage = log_p.clamp_min(LEAST_STORED) - log_ref.clamp_min(LEAST_STORED)
        q = gathered_at(log_softmax(student), teacher.ids).exp()
        return -self._weight(student, rows) * (q * advantage).masked_fill(~there, 0.0).sum(-1)

    def _weight(self, student: Tensor, rows: Rows) -> Tensor:
        """w of each row, [n], without gradient; one where there is no correction."""
        if self.importance == "none":
            return student.new_ones(student.shape[0])
        if self.importance == "sequence":
            ratio = rows.sequence_ratios
        else:
            assert rows.student_logprobs is not None
            assert rows.sampled_logprobs is not None
            ratio = rows.student_logprobs - rows.sampled_logprobs.to(rows.student_logprobs.dtype)
        assert ratio is not None
        return ratio.detach().clamp(max=LARGEST_LOG).exp().to(student.dtype)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        reference = rows.teachers[self.reference_model].signal
        if not isinstance(reference, Tensor):
            return differentiated(student, lambda leaf: self.per_token(leaf, teacher, rows))
        reward = log_softmax(teacher).sub_(log_softmax(reference))
        q = torch.softmax(student, -1)
        mean = dot(q, reward)
        gradient = reward.sub_(mean[:, None]).mul_(q).neg_()
        if self.importance == "none":
            return -mean, gradient
        weight = self._weight(student, rows)
        return -weight * mean, gradient.mul_(weight[:, None])


@register
class AlignedTeacher(Objective):
    """Reverse KL to a synthetic teacher that goes further than the teacher in the direction of its alignment.

    Equation: s / w KL(q || softmax(z_0 + w (z_T - z_ref))), s = `scale`, z_0 the logits of `start` (the
        teacher z_T); with `weight_rule: adaptive` w = `extrapolation` sum |p - p_ref| + 0.001 for each token,
        else w = `extrapolation`.
    Gradient: s / w q_i (d_i - sum_j q_j d_j), d = z - z_0 - w (z_T - z_ref).
    Character: seeking.
    When: a teacher trained by DPO, and one trained by DPO on reversed pairs (or its reference) as
        `reference`. With `start: reference` and `weight_rule: fixed` the optimum is that of RLHF whose
        reward is s log p / p_ref, at the KL weight s / w (theorem 1 of the paper).
    Source: AlignDistil (arXiv 2503.02832); the code (commit f80ca4e) uses the L1 distance in w, as here.
    """

    kind: Literal["aligned_teacher"] = "aligned_teacher"
    divergence: ClassVar[bool] = False
    reference_model: str = REFERENCE
    """The teacher before its preference training: a name under `teachers`."""
    scale: NonNegative = 0.1
    """beta in the paper."""
    extrapolation: NonNegative = 15.0
    """beta_2 of the adaptive rule (15 on-policy, 10 off-policy), or the fixed weight itself."""
    weight_rule: Literal["adaptive", "fixed"] = "adaptive"
    """A weight per token by how much the two teachers differ there, or the same for all."""
    start: Literal["teacher", "reference"] = "teacher"
    """Whose logits the difference is added to."""

    def requirements(self) -> Requirements:
        return _two_teachers(self, self.reference_model, "distribution")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        target, factor = self._target(teacher, rows)
        return factor * kl(log_softmax(student), log_softmax(target))

    def _target(self, teacher: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Logits of the synthetic teacher [n, V], and scale / weight [n]."""
        reference = rows.logits(self.reference_model)
        if self.weight_rule == "adaptive":
            distance = (torch.softmax(teacher, -1) - torch.softmax(reference, -1)).abs().sum(-1, keepdim=True)
            weight = float(self.extrapolation) * distance + 1e-3
        else:
            weight = teacher.new_full((teacher.shape[0], 1), float(self.extrapolation))
        target = (teacher - reference).mul_(weight).add_(teacher if self.start == "teacher" else reference)
        return target, float(self.scale) / weight.squeeze(-1).clamp_min(1e-3)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        target, factor = self._target(teacher, rows)
        value, gradient = closed_reverse_kl(student, target)
        return factor * value, gradient.mul_(factor[:, None])
