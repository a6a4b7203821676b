"""What self-distillation adds to a loss: a bound, weights by agreement, a wrong context, hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.config import ListOf
from stillhouse.core.host import to_device
from stillhouse.core.requirements import MAIN, REFERENCE, Requirements, RunFacts
from stillhouse.core.rows import Rows, TeacherRows, sequence_means
from stillhouse.errors import ConfigError, Fault
from stillhouse.objectives.base import Layers, Objective
from stillhouse.objectives.combined import ObjectiveHolder
from stillhouse.objectives.registry import ObjectiveField, register
from stillhouse.schedules import NonNegative

LEAST_WEIGHT = 0.01
"""Of a token that contexts disagree about."""
MOST_DISAGREEMENT = 10.0
"""In units of the quantile: more counts as this."""
QUANTILE = 0.95
"""Of the variances, which sets their unit."""


class _AroundOne(ObjectiveHolder):
    """What objectives have in common that change another one row by row."""

    objective: ObjectiveField
    """The loss that is changed."""

    @model_validator(mode="after")
    def _one_row_at_a_time(self) -> Self:
        inner = self.objective
        if float_of(inner.loss_weight) != 1.0:
            raise ValueError(
                f"the loss_weight of what {self.name} holds has no effect; give it to {self.name}"
            )
        if inner.mixes_rows or inner.has_sequence_part or inner.depths or inner.sources is not None:
            raise ValueError(
                f"{self.name} changes the values of single tokens, which {inner.name} does not have alone; "
                f"add that to it by a sum"
            )
        return self

    def held(self) -> tuple[Objective, ...]:
        return (self.objective,)

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        yield from self.objective.check_in_run(f"{path}.objective", facts)


def float_of(weight: object) -> float | None:
    """A number as it is; None of a schedule."""
    return float(weight) if isinstance(weight, int | float) else None


@register
class Clipped(_AroundOne):
    """Any loss, of which a token counts no more than so much.

    Equation: min(l_t, c), l_t the value of the `objective` at token t and c = `most`, in nats.
    Gradient: that of the objective where l_t < c, and zero elsewhere.
    Character: that of the objective; single tokens that the teacher finds impossible do not lead.
    When: on-policy text and a teacher that reads more than the student.
    Source: UniSD (arXiv 2605.06597; code at commit beef9a0), whose constant is 10.
    """

    kind: Literal["clipped"] = "clipped"
    most: Annotated[float, Field(gt=0)] = 10.0
    """The largest value of a token, in nats."""

    def token_values(self, student: Tensor, rows: Rows) -> Tensor:
        return self.objective.token_values(student, rows).clamp(max=self.most)

    def token_values_and_gradient(self, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        value, gradient = self.objective.token_values_and_gradient(student, rows)
        below = (value <= self.most).to(gradient.dtype)
        return value.clamp(max=self.most), gradient.mul_(below[:, None])


@register
class Agreement(_AroundOne):
    """Any loss, weighted by how much several contexts agree about the text.

    Equation: w_t / mean_t w times l_t, the mean over the row's sequence, with w_t = max(0.01, 1 / (1 + g
        min(d_t / Q, 10))) and d_t = var_k log p_k(y_t) over the `contexts` k, g = `scale` and Q the 0.95
        quantile of d over the micro-batch; with `level: sequence` it is exp(-g var_k mean_t log p_k) l_t.
    Gradient: the weight times that of the objective; weights are constants.
    Character: that of the objective, where the contexts lead to the same text.
    When: a teacher that reads a demonstration or a retrieved text, which may mislead; each context is a
        teacher of its own name, and those of the same settings share their weights.
    Source: UniSD (arXiv 2605.06597; code at commit beef9a0).
    """

    kind: Literal["agreement"] = "agreement"
    contexts: ListOf[str] = Field(min_length=2)
    """The teachers whose log-probabilities of each token are compared; `main` is the one under `teacher`."""
    level: Literal["token", "sequence"] = "token"
    """A weight for each token or for the whole sequence."""
    scale: NonNegative = 1.0
    """g: how much disagreement counts."""

    @model_validator(mode="after")
    def _different_contexts(self) -> Self:
        if len(set(self.contexts)) < len(self.contexts):
            raise ValueError("contexts name a teacher twice, which agrees with itself")
        return self

    def requirements(self) -> Requirements:
        rows = frozenset({"labels", "sequences", "label_logprobs"})
        needs = super().requirements() | Requirements(rows=rows)
        for name in self.contexts:
            one = Requirements.of(name, "distribution", "topk", "sampled")
            needs |= replace(one, same_tokenizer=frozenset({name}))
        return needs

    @property
    def token_models(self) -> frozenset[str]:
        """Of other contexts only the log-probabilities of the text are needed."""
        return self.objective.token_models

    def with_sequence_facts(self, rows: Rows) -> Rows:
        known = [rows.teachers[name].label_logprobs for name in self.contexts]
        logprobs = torch.stack([one.detach() for one in known if one is not None])
        assert rows.sequence_ids is not None
        ids = rows.sequence_ids
        if self.level == "token":
            variance = logprobs.var(0, correction=0)
            unit = quantile(variance, QUANTILE).clamp_min(torch.finfo(variance.dtype).tiny)
            excess = (variance / unit).clamp(max=MOST_DISAGREEMENT)
            weight = (1 / (1 + float(self.scale) * excess)).clamp_min(LEAST_WEIGHT)
            weight = weight / sequence_means(weight, ids)[to_device(ids, weight.device)]
        else:
            means = torch.stack([sequence_means(one, ids) for one in logprobs])
            weight = (-float(self.scale) * means.var(0, correction=0)).exp()
            weight = weight[to_device(ids, weight.device)]
        first = rows.teachers[self.contexts[0]]
        return replace(rows, teachers={**rows.teachers, self.contexts[0]: replace(first, agreement=weight)})

    def token_values(self, student: Tensor, rows: Rows) -> Tensor:
        return self._weight(student, rows) * self.objective.token_values(student, rows)

    def token_values_and_gradient(self, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        weight = self._weight(student, rows)
        value, gradient = self.objective.token_values_and_gradient(student, rows)
        return weight * value, gradient.mul_(weight[:, None])

    def _weight(self, student: Tensor, rows: Rows) -> Tensor:
        weight = rows.teachers[self.contexts[0]].agreement
        assert weight is not None
        return weight.to(student.dtype)


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of [N] values by linear interpolation; nothing waits for the device."""
    place = share * (values.shape[0] - 1)
    low = int(place)
    high = min(low + 1, values.shape[0] - 1)
    ordered = values.sort().values
    return torch.lerp(ordered[low], ordered[high], place - low)


@register
class ContextContrast(Objective):
    """Be nearer to the teacher with a right context than to one with a wrong context.

    Equation: max(0, m + |log q - log p| - |log q - log p_wrong|), each at the token of the text; p is the
        teacher and p_wrong that of `wrong_model`, m = `margin`.
    Gradient: (sign(log q - log p) - sign(log q - log p_wrong)) grad log q(y) where the value is positive.
    Character: neither; it says nothing where both contexts say the same.
    When: beside a divergence, to leave out what any context would change.
    Source: UniSD (arXiv 2605.06597; code at commit beef9a0), with weight 0.1 and margin 0.5.
    """

    kind: Literal["context_contrast"] = "context_contrast"
    divergence: ClassVar[bool] = False
    has_token_part: ClassVar[bool] = False
    has_sequence_part: ClassVar[bool] = True
    wrong_model: str = REFERENCE
    """The teacher that reads a wrong context: a name under `teachers`."""
    margin: NonNegative = 0.5
    """By how much nearer, in nats."""

    def requirements(self) -> Requirements:
        forms = ("distribution", "topk", "sampled")
        wrong = replace(
            Requirements.of(self.wrong_model, *forms), same_tokenizer=frozenset({self.wrong_model})
        )
        rows = frozenset({"labels", "sequences", "label_logprobs"})
        return self.compared_with(*forms) | wrong | Requirements(rows=rows)

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        return student.new_zeros(student.shape[0])

    def per_sequence(self, rows: Rows) -> Tensor:
        ours, wrong = rows.student_logprobs, rows.teachers.get(self.wrong_model, TeacherRows()).label_logprobs
        assert ours is not None
        assert wrong is not None
        near = (ours - self.label_logprobs(rows).detach()).abs()
        return (float(self.margin) + near - (ours - wrong.detach()).abs()).clamp_min(0)


@register
class HiddenStates(ObjectiveHolder):
    """Any loss, and the squared distance of the hidden states of student and teacher.

    Equation: l_t + v mean_i (h_i - g_i)^2 at the row, l_t the value of the `objective`, h and g the student's
        and the teacher's hidden states at `depth`, v = `weight`.
    Gradient: that of the objective, and 2 v (h - g) / D for the states.
    Character: that of the objective.
    When: a teacher of the student's own width, such as the student itself.
    Source: UniSD (arXiv 2605.06597; code at commit beef9a0), with weight 0.1 on the last hidden states.
    """

    kind: Literal["hidden_states"] = "hidden_states"
    objective: ObjectiveField
    """The loss on what models say."""
    weight: NonNegative = 0.1
    """v, of the squared distance."""
    depth: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Which hidden states, as a share of the depth: 0 is the embedding, 1 the last."""

    @model_validator(mode="after")
    def _one_mean(self) -> Self:
        if self.objective.sources is not None or float_of(self.objective.loss_weight) != 1.0:
            raise ValueError("objective has neither a loss_weight nor a map from sources here")
        return self

    def held(self) -> tuple[Objective, ...]:
        return (self.objective,)

    def requirements(self) -> Requirements:
        layers = Requirements(layers=frozenset({self.depth}))
        return super().requirements() | Requirements.of(MAIN, "layers") | layers

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        yield from self.objective.check_in_run(f"{path}.objective", facts)

    def token_values(self, student: Tensor, rows: Rows) -> Tensor:
        return self.objective.token_values(student, rows)

    def token_values_and_gradient(self, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.objective.token_values_and_gradient(student, rows)

    def per_sequence(self, rows: Rows) -> Tensor:
        return self.objective.per_sequence(rows)

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        ours, theirs = student[self.depth].float(), teacher[self.depth].float()
        if ours.shape != theirs.shape:
            problem = "compares hidden states number by number, which needs a teacher of the student's width"
            raise ConfigError(
                Fault(
                    "objective.kind",
                    f"hidden_states {problem} and tokenizer",
                    got=f"widths {ours.shape[-1]} and {theirs.shape[-1]}",
                    hint="Take teacher: {kind: student}, or transport with layers, which compares profiles.",
                )
            )
        value = float(self.weight) * (ours - theirs).square().mean(-1)
        return value + self.objective.per_layers(student, teacher, rows) if self.objective.depths else value
