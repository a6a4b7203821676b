"""Reverse KL over whole responses by policy gradient: MiniLLM and on-policy distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.config import because
from stillhouse.core.host import Ints, to_device
from stillhouse.core.requirements import LOGPROBS, Requirements, RunFacts
from stillhouse.core.rows import Rows
from stillhouse.errors import Fault
from stillhouse.objectives.base import Objective
from stillhouse.objectives.divergences import both, kl
from stillhouse.objectives.logits import with_gradient
from stillhouse.objectives.ranges import Discount
from stillhouse.objectives.registry import register
from stillhouse.schedules import NonNegative, Share

LARGEST = 80.0
"""e^80 is the largest p / q that k3 reports: beyond it fp32 has no number."""
LEAST_SHARE = 1e-3
"""Least share of the student in the probability that a token was sampled with; below it rounding decides."""


def returns(rewards: Tensor, ids: Ints, discount: float, include_current: bool) -> tuple[Tensor, Tensor]:
    """For each row the discounted sum of the rewards after it in its sequence, and how many they are, both
    [N].

    Rows of a sequence count in the order in which they stand, whatever lies between them.
    """
    count = np.bincount(ids)
    order = np.argsort(ids, kind="stable")
    place = np.empty_like(ids)
    place[order] = np.arange(len(ids)) - (count.cumsum() - count)[ids[order]]
    where = to_device(ids, rewards.device), to_device(place, rewards.device)
    table = rewards.new_zeros(len(count), int(count.max()) + 1).index_put(where, rewards)
    sums = torch.zeros_like(table)
    for column in range(table.shape[1] - 2, -1, -1):
        later = sums[:, column + 1] if include_current else sums[:, column + 1] + table[:, column + 1]
        sums[:, column] = discount * later + (table[:, column] if include_current else 0.0)
    left = count[ids] - place - (0 if include_current else 1)
    return sums[where], to_device(left, rewards.device)


def left_of(ids: Ints, device: torch.device) -> Tensor:
    """For each row how many rows of its sequence come after it, [N]."""
    count = np.bincount(ids)
    order = np.argsort(ids, kind="stable")
    left = np.empty_like(ids)
    left[order] = count.cumsum()[ids[order]] - 1 - np.arange(len(ids))
    return to_device(left, device)


@register
class PolicyGradient(Objective):
    """Reverse KL of whole responses, from the tokens that were sampled.

    Equation: sum_t KL(q_t || p_t) along the student's responses. The gradient has two parts: that of each
        KL(q_t || p_t) (`single_step`; without it leave that part to a `reverse_kl` beside), and
        -G_t grad log q(y_t), G_t = sum_{t' > t} discount^(t' - t) r_t' + b discount^(T - t) R, with
        r = a (log p(y) - log q(y)), a = `ratio_weight`, and the reward R of the whole response at its last
        token T, b = `reward_weight`; then a KL counts a times, and -b R / T is added to each token's value.
    Gradient: w_t [grad KL(q_t || p_t) - G_t grad log q(y_t)], G_t and the sampling weight w_t constant.
    Character: seeking, over sequences and not only tokens.
    When: student-written text. MiniLLM: `single_step`, `sampling_teacher_share` 0.2. On-policy distillation:
        `discount` 0 with `include_current`, where only the sampled token counts, so that the teacher need
        score the text's own tokens only; `importance: token` for text of an earlier student. PPO, as in
        MiniLLM's code: several steps on the same text (`responses: {kind: batched, epochs: 4}`) with
        `ratio_clip` 0.2.
        A reward model: `reward_weight`, with the log-ratio as the penalty that keeps the student near the
        model that it started from (`teacher_model: reference`).
    Source: MiniLLM (arXiv 2306.08543), equations 3 to 6; Thinking Machines 2025, on-policy distillation.
    """

    kind: Literal["policy_gradient"] = "policy_gradient"
    divergence: ClassVar[bool] = False
    exact_gradient: ClassVar[bool] = False
    single_step: bool = False
    """Add the exact KL(q_t || p_t) of every token, value and gradient."""
    ratio_weight: NonNegative = 1.0
    """How much the teacher's log-ratio counts."""
    reward_weight: NonNegative = 0.0
    """How much the reward counts that a model gives the whole response (`responses.reward_model`)."""
    discount: Discount = 1.0
    """How much a reward one token later counts; gamma."""
    include_current: bool = False
    """Count the reward of the token itself too. Not together with `single_step`, which has it exactly."""
    length_normalised: bool = False
    """Divide each return by the number of its rewards."""
    reward_scale: float = Field(1.0, gt=0)
    """Rewards are divided by it, before they are cut; MiniLLM's code: 0.5."""
    reward_clip: float | None = None
    """Rewards are cut to this absolute value (nats); None: not."""
    whiten: bool = False
    """Shift and scale the returns to mean 0 and variance 1 over the tokens of a micro-batch, as MiniLLM's
    code does. The only option with which the gradient depends on how a step is split into micro-batches."""
    ratio_clip: float | None = None
    """PPO's clip of q / (q when sampled) to 1 plus or minus this; None: plain score function."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Weight, as a constant, by q / (q when the text was sampled) of each token or of the whole response, for
    text that an earlier student wrote, or the same student with other rounding. By "token" the estimate stays
    unbiased over the prefixes that the earlier student wrote, by "sequence" over whole responses, with far
    more variance."""
    importance_cap: float | None = Field(None, gt=0)
    """Weights of `importance` are cut to at most this (truncated importance sampling): less variance for some
    bias; None: not."""
    sampling_teacher_share: Share = 0.0
    """Share of the teacher in the distribution that the text was sampled from; gives the weight
    w = q / ((1 - share) q + share p). `importance` weighs by what the text was sampled from anyway."""
    estimator: Literal["k1", "k3"] = "k1"
    """What is reported without `single_step`: log q/p, or p/q - 1 + log q/p, which is never negative and
    varies
    less. Both are unbiased. The gradient is that of reverse KL in either case; differentiating k3 itself
    would give that of forward KL."""

    has_sequence_part: ClassVar[bool] = True

    @property
    def _weighed(self) -> bool:
        """Whether `importance` applies; the ratio of PPO corrects for stale text by itself."""
        return self.importance != "none" and self.ratio_clip is None

    def options_without_effect(self) -> dict[str, str]:
        found = because("single_step reports the exact value", "estimator") if self.single_step else {}
        if self.ratio_weight == 0:
            names = ("estimator", "single_step", "include_current", "length_normalised", "reward_scale")
            found |= because("ratio_weight is 0", *names, "reward_clip")
        if self.ratio_clip is not None:
            return found | because("ratio_clip corrects for stale text", "importance", "importance_cap")
        if self.importance == "none":
            return found | because("importance is none", "importance_cap")
        return found | because("importance knows what the text was sampled from", "sampling_teacher_share")

    @model_validator(mode="after")
    def _has_a_reward(self) -> Self:
        if self.reward_weight == 0 and self.ratio_weight == 0:
            raise ValueError("ratio_weight and reward_weight are both 0: there is nothing to be rewarded")
        return self

    def requirements(self) -> Requirements:
        rows = frozenset({"labels", "sequences", "label_logprobs"})
        if self._weighed or self.ratio_clip is not None:
            rows |= {"sampled_logprobs"}
        if self.reward_weight != 0:
            rows |= {"rewards"}
        if self.ratio_weight == 0 and (self._weighed or not self.sampling_teacher_share):
            return Requirements(rows=rows)
        # Without the exact part only the labels' log-probabilities count, which every form has.
        forms = ("distribution", "topk") if self.single_step else LOGPROBS
        return self.compared_with(*forms) | Requirements(rows=rows)

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        if not self._weighed and self.sampling_teacher_share != facts.sampling_teacher_share:
            yield Fault(
                f"{path}.sampling_teacher_share",
                "must be the teacher's share in the text that is trained on",
                got=str(self.sampling_teacher_share),
                allowed=f"{facts.sampling_teacher_share:g}, as responses.kind={facts.responses} writes",
                hint="Set both to the same number (on_policy and batched responses have teacher_share).",
            )
        if facts.altered_sampling:
            yield Fault(
                path,
                "policy_gradient is for text from the student's own distribution; on other text it is biased",
                got=f"sampling with {facts.altered_sampling}",
                hint="Set responses.sampling: {temperature: 1.0}, without cuts, limits or penalties.",
            )
        others = facts.sources - {"student"}
        if others:
            yield Fault(
                path,
                "policy_gradient is for text that the student has sampled; on other text it is biased",
                got=", ".join(sorted(others)),
                hint="Map it to the student's text alone, objective: {student: {kind: policy_gradient}, "
                f"{min(others)}: ...}}, or set responses.kind to on_policy or batched.",
            )

    @property
    def has_token_part(self) -> bool:  # type: ignore[override]
        return self.single_step and self.ratio_weight != 0

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        if not self.has_token_part:
            return student.new_zeros(student.shape[0])
        log_p, log_q = both(student, teacher)
        return float(self.ratio_weight) * self.sampling_weight(rows) * kl(log_q, log_p)

    def per_sequence(self, rows: Rows) -> Tensor:
        log_q, ids = rows.student_logprobs, rows.sequence_ids
        assert log_q is not None
        assert ids is not None
        share = float(self.ratio_weight)
        reward = share * (self.label_logprobs(rows) - log_q).detach() if share else torch.zeros_like(log_q)
        clipped = reward / self.reward_scale
        if self.reward_clip is not None:
            clipped = clipped.clamp(-self.reward_clip, self.reward_clip)
        gain, terms = returns(clipped, ids, float(self.discount), self.include_current)
        if self.length_normalised:
            gain = gain / terms.clamp_min(1)
        of_response = torch.zeros_like(reward)
        if rows.rewards is not None and self.reward_weight != 0:
            of_response = float(self.reward_weight) * rows.rewards.to(reward.dtype)
            left = left_of(ids, reward.device).to(reward.dtype)  # of integers a power would be one of fp32
            gain = gain + of_response * float(self.discount) ** left
        if self.whiten:
            gain = (gain - gain.mean()) * (gain.var(correction=0) + 1e-8).rsqrt()
        weight = self.sampling_weight(rows)
        value = -of_response / to_device(np.bincount(ids)[ids], reward.device)
        if not self.single_step:
            value = value + self._estimate(reward)
        value = weight * value
        return with_gradient(value, -weight * self._surrogate(log_q, gain, rows))

    def _estimate(self, reward: Tensor) -> Tensor:
        """What is reported of the log-ratio of each token."""
        share = float(self.ratio_weight)
        if self.estimator == "k1" or share == 0:
            return -reward
        return share * torch.expm1((reward / share).clamp(max=LARGEST)) - reward

    def _surrogate(self, log_q: Tensor, gain: Tensor, rows: Rows) -> Tensor:
        """What is to be raised: gain log q, or PPO's clipped gain q / q_sampled."""
        if self.ratio_clip is None:
            return gain * log_q
        ratio = (log_q - self._logprobs_when_sampled(rows)).clamp(max=LARGEST).exp()
        return torch.minimum(gain * ratio, gain * ratio.clamp(1 - self.ratio_clip, 1 + self.ratio_clip))

    def sampling_weight(self, rows: Rows) -> Tensor:
        """q / ((1 - share) q + share p) of each sampled token, [N]; one where the share is zero.

        q is the student that sampled where PPO's ratio leads from it to the student of now. With `importance`
        it is q of now over whatever the text was sampled from.
        """
        assert rows.student_logprobs is not None
        if self._weighed:
            return self._importance_weight(rows)
        share = float(self.sampling_teacher_share)
        if share == 0.0:
            return torch.ones_like(rows.student_logprobs)
        if self.ratio_clip is not None:
            assert rows.sampled_logprobs is not None
            sampled = rows.sampled_logprobs.to(rows.student_logprobs.dtype)
            return (self._logprobs_when_sampled(rows) - sampled).exp()
        ratio = (self.label_logprobs(rows) - rows.student_logprobs).detach().exp()
        return 1 / ((1 - share) + share * ratio)

    def _importance_weight(self, rows: Rows) -> Tensor:
        """q / (the probability when sampled) of each token or of its response, [N], cut and constant."""
        log_q, sampled = rows.student_logprobs, rows.sampled_logprobs
        assert log_q is not None
        assert sampled is not None
        ratio = rows.sequence_ratios if self.importance == "sequence" else log_q - sampled
        assert ratio is not None
        weight = ratio.detach().to(log_q.dtype).clamp(max=LARGEST).exp()
        return weight if self.importance_cap is None else weight.clamp(max=self.importance_cap)

    def _logprobs_when_sampled(self, rows: Rows) -> Tensor:
        """log q of each token under the student that wrote the text, [N].

        What was kept is the log-probability m under the mixture: q = (m - share p) / (1 - share).
        """
        assert rows.sampled_logprobs is not None
        assert rows.student_logprobs is not None
        share = float(self.sampling_teacher_share)
        sampled = rows.sampled_logprobs.to(rows.student_logprobs.dtype)
        if share == 0.0:
            return sampled
        of_teacher = share * (self.label_logprobs(rows) - sampled).exp()
        return sampled + ((1 - of_teacher) / (1 - share)).clamp_min(LEAST_SHARE).log()
