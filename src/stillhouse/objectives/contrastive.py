"""DistiLLM-2: raise what the teacher writes, lower what the student writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from stillhouse.config import because
from stillhouse.core.host import Ints, RowIndex
from stillhouse.core.requirements import MAIN, Requirements, RunFacts
from stillhouse.core.rows import Rows
from stillhouse.core.types import SOURCES, Progress
from stillhouse.errors import Fault
from stillhouse.objectives.base import Objective, Split
from stillhouse.objectives.divergences import (
    both,
    closed_skew_kl,
    closed_skew_rkl,
    kl,
    mixture,
    skew_kl_kernel,
    skew_rkl_kernel,
)
from stillhouse.objectives.kernels import KernelTerm
from stillhouse.objectives.ranges import Skew
from stillhouse.objectives.registry import register
from stillhouse.schedules import NonNegative, Share

TEACHER, STUDENT = SOURCES.index("teacher"), SOURCES.index("student")


def _reference_gap(side: str) -> Any:
    """The annotation of a reference gap; `previous_round` is short for the schedule that observes it."""

    def spelt_out(value: Any) -> Any:
        return {"kind": "previous_round", "of": f"{side}_gap"} if value == "previous_round" else value

    return Annotated[Literal["batch"] | NonNegative, BeforeValidator(spelt_out)]


@register
class Contrastive(Objective):
    """Skew KL on teacher-written responses and skew reverse KL on student-written ones (CALD).

    Equation: w_T KL(p || a p + (1 - a) q) on teacher-written rows, w_S KL(q || (1 - a) p + a q) on
        student-written rows; w_T = 2 (1 - beta) `teacher_weight`, w_S = 2 beta `student_weight`, beta =
        `student_share`. With `alpha_rule: gap`, a = clip(1 - (1 - alpha) m / g, 0.01, 0.1) for each
        sequence, where g is its likelihood gap in the direction that is to close (p - q on teacher-written,
        q - p on student-written text; likelihood = geometric mean over the labels) and m the reference gap.
    Gradient: that of `skew_kl` and `skew_rkl`; a is constant.
    Character: covering on the teacher's text, seeking on the student's.
    When: pairs of a teacher-written and a student-written response per prompt, renewed each epoch.
    Source: Ko et al. 2025, DistiLLM-2 (arXiv 2503.07067), equations 2 and 7. The released code (commit
        fe4cf9b) has the rule and the rise of beta switched off. The paper's factor 1/2 is left out, as
        there.
    """

    kind: Literal["contrastive"] = "contrastive"
    alpha: Skew = 0.1
    """Share of the own side in both mixtures; with `alpha_rule: gap` the base value alpha_0."""
    alpha_rule: Literal["fixed", "gap"] = "fixed"
    """The same alpha for all, or one per sequence by its likelihood gap."""
    alpha_least: Skew = 0.01
    """Lower bound of the rule."""
    alpha_most: Skew = 0.1
    """Upper bound of the rule; also used for a gap of the other sign, which is closed already."""
    rule_after: Annotated[float, Field(ge=0.0)] = 1.0
    """Passes over the prompts before a run follows the rule; until then `alpha` is for all (paper, B.3)."""
    teacher_gap: _reference_gap("teacher") = "batch"  # type: ignore[valid-type]
    """Reference gap m of teacher-written text: `batch` (its mean over the whole optimiser step, for which
    both models read the step's text once more), `previous_round` (its mean over the pass over the prompts
    before this one, which costs nothing), or a number. Where m is not positive `alpha` is for all."""
    student_gap: _reference_gap("student") = "batch"  # type: ignore[valid-type]
    """Reference gap m of student-written text."""
    student_share: Share = 0.5
    """How the weight is shared out; beta. 0.5 is even; `{kind: gradual_beta}` raises it."""
    teacher_weight: NonNegative = 1.0
    """Weight of teacher-written rows, beside the share."""
    student_weight: NonNegative = 1.0
    """Weight of student-written rows, beside the share."""
    detach_mixture: bool = True
    """Treat the student inside the mixture of skew reverse KL as a constant, as the released code does."""

    def options_without_effect(self) -> dict[str, str]:
        if self.alpha_rule == "gap":
            return {}
        mixture = because("alpha 0 mixes nothing", "detach_mixture") if self.alpha == 0 else {}
        rule = ("alpha_least", "alpha_most", "rule_after", "teacher_gap", "student_gap")
        return mixture | because("alpha_rule is fixed", *rule)

    def source_weights(self) -> dict[str, float]:
        """How much the rows of each source count."""
        share = float(self.student_share)
        return {
            "teacher": 2 * (1 - share) * float(self.teacher_weight),
            "student": 2 * share * float(self.student_weight),
        }

    def with_references(self, teacher: float, student: float) -> Contrastive:
        """The same with numbers where the reference gap is that of the batch."""
        found = {"teacher_gap": teacher, "student_gap": student}
        update = {name: max(0.0, gap) for name, gap in found.items() if getattr(self, name) == "batch"}
        return self.model_copy(update=update) if update else self

    @property
    def references(self) -> tuple[Any, Any]:
        """Both reference gaps as they are given."""
        return self.teacher_gap, self.student_gap

    @property
    def exact_gradient(self) -> bool:  # type: ignore[override]
        return self.alpha_rule == "fixed" and not self.detach_mixture

    def requirements(self) -> Requirements:
        needs = self.compared_with("distribution", "topk") | Requirements(rows=frozenset({"sources"}))
        if self.alpha_rule == "fixed":
            return needs
        first = {"mean_likelihood_gaps"} if "batch" in self.references else set()
        return needs | Requirements(
            rows=frozenset({"labels", "sequences", "label_logprobs"}),
            batch_statistics=frozenset({"likelihood_gaps"} | first),
        )

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        if self.alpha_rule == "gap" and self.teacher_model != MAIN:
            # A further teacher is known for a block of rows at a time; the gap needs whole responses.
            yield Fault(
                f"{path}.alpha_rule",
                "gap is measured against the main teacher only",
                got=f"gap, with teacher_model={self.teacher_model}",
                allowed="fixed",
                hint=f"Make {self.teacher_model} the main teacher, or set {path}.alpha_rule: fixed.",
            )
        if self.alpha_rule == "gap" and facts.max_steps is None and self.rule_after >= facts.epochs:
            yield Fault(
                f"{path}.rule_after",
                "alpha_rule: gap would begin after the end of the training",
                got=f"{self.rule_after:g}, in a training of {facts.epochs:.3g} epochs",
                allowed=f"less than {facts.epochs:g}",
                hint=f"Train for more epochs, or set {path}.alpha_rule: fixed.",
            )

    def for_source(self, source: str) -> Objective | None:
        return self if source in self.sources else None

    def source_weight(self, source: str) -> float:
        return self.source_weights().get(source, 1.0)

    @property
    def sources(self) -> tuple[str, ...]:
        return ("teacher", "student")

    def at(self, progress: Progress) -> Objective:
        if self.alpha_rule == "gap" and progress.epoch < self.rule_after:
            return self.model_copy(update={"alpha_rule": "fixed"})
        return self

    def with_batch_statistics(self, statistics: Mapping[str, float]) -> Objective:
        if self.alpha_rule == "fixed":
            return self
        return self.with_references(statistics.get("teacher_gap", 0.0), statistics.get("student_gap", 0.0))

    def split(self, rows: Rows) -> list[Split]:
        teacher_rows, student_rows = self._written_by(rows)
        return [(1.0, self, index) for index in (teacher_rows, student_rows) if len(index)]

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        teacher_rows, student_rows = self._written_by(rows)
        if not len(student_rows):
            return self._teacher_written(student, teacher, rows)
        if not len(teacher_rows):
            return self._student_written(student, teacher, rows)
        value = student.new_zeros(student.shape[0])
        for positions, part in ((teacher_rows, self._teacher_written), (student_rows, self._student_written)):
            index = RowIndex.of(positions)
            value[index.on(value.device)] = part(index.pick(student), index.pick(teacher), rows[index])
        return value

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        teacher_rows, student_rows = self._written_by(rows)
        if self.alpha_least == 0.0 or (len(teacher_rows) and len(student_rows)):
            return None
        written_by = STUDENT if len(student_rows) else TEACHER
        alpha = self.alphas(rows, written_by)
        alpha = alpha.squeeze(-1) if isinstance(alpha, Tensor) else alpha
        if written_by == TEACHER:
            term, weight = skew_kl_kernel(self.teacher_model, alpha), self.source_weights()["teacher"]
        else:
            term = skew_rkl_kernel(self.teacher_model, alpha, self.detach_mixture)
            weight = self.source_weights()["student"]
        return (term.times(weight),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        teacher_rows, student_rows = self._written_by(rows)
        if self.alpha_least == 0.0 or self.alpha == 0.0 or (len(teacher_rows) and len(student_rows)):
            return super().value_and_gradient(student, teacher, rows)
        if not len(student_rows):
            value, gradient = closed_skew_kl(student, teacher, self.alphas(rows, TEACHER))
            weight = self.source_weights()["teacher"]
        else:
            alpha = self.alphas(rows, STUDENT)
            value, gradient = closed_skew_rkl(student, teacher, alpha, self.detach_mixture)
            weight = self.source_weights()["student"]
        return value * weight, gradient if weight == 1.0 else gradient.mul_(weight)

    def alphas(self, rows: Rows, written_by: int) -> float | Tensor:
        """The share of the own side, one number or a column [n, 1]; never a gradient through it."""
        if self.alpha_rule == "fixed":
            return float(self.alpha)
        facts = rows.teachers[self.teacher_model]
        assert facts.sequence_gaps is not None
        assert facts.mean_gaps is not None
        sign = 1.0 if written_by == TEACHER else -1.0
        given = self.references[0 if written_by == TEACHER else 1]
        gap = sign * facts.sequence_gaps.detach()
        reference = (
            sign * facts.mean_gaps.detach() if given == "batch" else torch.full_like(gap, float(given))
        )
        alpha = 1 - (1 - float(self.alpha)) * reference / (gap + 1e-5)
        # A gap of zero or less is closed already; the quotient would show that only by its sign.
        alpha = torch.where(gap + 1e-5 > 0, alpha, float(self.alpha_most))
        alpha = alpha.clamp(float(self.alpha_least), float(self.alpha_most))
        return torch.where(reference > 0, alpha, float(self.alpha))[:, None]

    def _teacher_written(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        value = kl(log_p, mixture(log_p, log_q, self.alphas(rows, TEACHER)))
        return self.source_weights()["teacher"] * value

    def _student_written(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        log_p, log_q = both(student, teacher)
        inside = log_q.detach() if self.detach_mixture else log_q
        value = kl(log_q, mixture(inside, log_p, self.alphas(rows, STUDENT)))
        return self.source_weights()["student"] * value

    def _written_by(self, rows: Rows) -> tuple[Ints, Ints]:
        assert rows.sources is not None
        teacher_rows, student_rows = rows.of_source("teacher"), rows.of_source("student")
        if len(teacher_rows) + len(student_rows) != len(rows.sources):
            others = {SOURCES[code] for code in rows.sources} - {"teacher", "student"}
            raise ValueError(
                f"contrastive is for responses of teacher and student, got {', '.join(sorted(others))}; "
                "use a map from source to objective for these"
            )
        return teacher_rows, student_rows
