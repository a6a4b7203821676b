"""The equations of papers and of their code in fp64, row by row and sequence by sequence, without our code.

Each takes the options of an objective and a `Problem`, and gives for each row the value and what its gradient
is that of: the same number, unless parts of it are constants. Sums over the vocabulary are written as such,
and a matrix of all pairs stands where ours is linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Options = dict[str, Any]
TokenFormula = Callable[[Options, Tensor, Tensor], Tensor]
"""Options, logits of the student and of the teacher over the tokens that count, [v] each, to a number."""


@dataclass(frozen=True)
class Problem:
    """`N` rows in sequences of unequal lengths that lie between one another."""

    student: Tensor
    """[N, V], with a gradient."""
    teachers: dict[str, Tensor]
    labels: list[int]
    sequences: list[int]
    preferred: dict[int, bool]
    """By sequence: whether it is the teacher's, or the chosen one."""
    pairs: dict[int, int]
    """By sequence: its prompt."""
    rewards: dict[int, float]
    sampled: list[float]
    """log-probability with which each label was sampled."""

    def rows_of(self, sequence: int) -> list[int]:
        return [row for row, one in enumerate(self.sequences) if one == sequence]

    def logits(self, row: int, *names: str) -> list[Tensor]:
        """Of the student and of teachers over the tokens that all of them allow."""
        found = [self.student[row], *(self.teachers[name][row] for name in names)]
        allowed = torch.stack([one.detach() > -math.inf for one in found]).all(0)
        return [one[allowed] for one in found]

    def label(self, row: int, *names: str) -> list[Tensor]:
        """Log-probabilities of the label, the student's first."""
        found = [self.student[row], *(self.teachers[name][row] for name in names)]
        allowed = torch.stack([one.detach() > -math.inf for one in found]).all(0)
        place = int(allowed[: self.labels[row]].sum())
        return [one[allowed].log_softmax(0)[place] for one in found]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


def log_mean(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)"""
    parts = [log_a + math.log(share)] if share > 0 else []
    parts += [log_b + math.log(1 - share)] if share < 1 else []
    return torch.stack(parts).logsumexp(0)


def forward_kl(o: Options, z: Tensor, t: Tensor) -> Tensor:
    tau = o.get("temperature", 1.0)
    return kl((t / tau).log_softmax(0), (z / tau).log_softmax(0))


def reverse_kl(o: Options, z: Tensor, t: Tensor) -> Tensor:
    return forward_kl(o, t, z)


def symmetric_kl(o: Options, z: Tensor, t: Tensor) -> Tensor:
    share = o["reverse_weight"]
    return (1 - share) * forward_kl(o, z, t) + share * reverse_kl(o, z, t)


def jeffreys(o: Options, z: Tensor, t: Tensor) -> Tensor:
    p, q = t.softmax(0), z.softmax(0)
    return ((p - q) * (t.log_softmax(0) - z.log_softmax(0))).sum()


def jsd(o: Options, z: Tensor, t: Tensor) -> Tensor:
    share, p, q = o["teacher_weight"], t.log_softmax(0), z.log_softmax(0)
    mean = log_mean(p, q, share)
    return share * kl(p, mean) + (1 - share) * kl(q, mean)


def tvd(o: Options, z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (t.softmax(0) - z.softmax(0)).abs().sum()


def skew_kl(o: Options, z: Tensor, t: Tensor) -> Tensor:
    p, q = t.log_softmax(0), z.log_softmax(0)
    return kl(p, log_mean(p, q, o["alpha"]))


def skew_rkl(o: Options, z: Tensor, t: Tensor) -> Tensor:
    p, q = t.log_softmax(0), z.log_softmax(0)
    inside = q.detach() if o.get("detach_mixture") else q
    return kl(q, log_mean(inside, p, o["alpha"]))


def adaptive_kl(o: Options, z: Tensor, t: Tensor) -> Tensor:
    p, gap = t.softmax(0), (t.softmax(0) - z.softmax(0)).abs().detach()
    head, mass = 0.0, 0.0
    for token in sorted(range(len(p)), key=lambda token: -float(p[token])):
        if mass >= o["head_mass"]:
            break
        head, mass = head + float(gap[token]), mass + float(p[token])
    share = head / float(gap.sum())
    return share * forward_kl({}, z, t) + (1 - share) * reverse_kl({}, z, t)


def ab(o: Options, z: Tensor, t: Tensor) -> Tensor:
    a, b, p, q = o["alpha"], o["beta"], t.softmax(0), z.softmax(0)
    parts = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -parts.sum() / (a * b)


def alpha_mixture(o: Options, z: Tensor, t: Tensor) -> Tensor:
    p, q, share, c = t.log_softmax(0), z.log_softmax(0), o["teacher_share"], (1 - o["alpha"]) / 2
    mean = share * p + (1 - share) * q if c == 0 else log_mean(c * p, c * q, share) / c
    return kl(p if o["direction"] == "forward" else q, mean.log_softmax(0))


def taid(o: Options, z: Tensor, t: Tensor) -> Tensor:
    target = (1 - o["t"]) * z.detach() + o["t"] * t
    return kl(target.log_softmax(0), z.log_softmax(0))


def _weights(which: str, z: Tensor, t: Tensor, temperature: float, share: float) -> Tensor:
    q, p = (z.detach() / temperature).softmax(0), (t / temperature).softmax(0)
    even = torch.full_like(q, 1 / len(q))
    return {"student": q, "teacher": p, "uniform": even, "mix": share * p + (1 - share) * q}[which]


def csd(o: Options, z: Tensor, t: Tensor) -> Tensor:
    """Over all pairs of tokens."""
    r = z - t
    first, second = (
        _weights(o[name], z, t, o.get("temperature", 1.0), o.get("teacher_share", 0.15))
        for name in ("w1", "w2")
    )
    half = 0.5 if o.get("factor") == "paper" else 0.25
    return half * (first[:, None] * second[None] * (r[None] - r[:, None]) ** 2).sum()


def dld(o: Options, z: Tensor, t: Tensor) -> Tensor:
    r = z - t
    if o.get("center"):
        r = r - r.mean()
    return 0.25 * (_weights(o["weight"], z, t, 1.0, 0.0) * r**2).sum()


def uld(o: Options, z: Tensor, t: Tensor) -> Tensor:
    q, p = z.softmax(0), t.softmax(0)
    rank = [sorted(range(len(one)), key=lambda token, one=one: -float(one[token])) for one in (q.detach(), p)]
    return torch.stack([(q[i] - p[j]).abs() for i, j in zip(*rank, strict=True)]).sum()


def dpkd_of_tokens(o: Options, z: Tensor, t: Tensor) -> Tensor:
    ratio = z.log_softmax(0) - t.log_softmax(0)
    return -logsigmoid(o["scale"] * (ratio[int(t.argmax())] - ratio[int(z.argmax())]))


TOKEN: dict[str, TokenFormula] = {
    **{
        one.__name__: one
        for one in (forward_kl, reverse_kl, symmetric_kl, jeffreys, jsd, tvd, skew_kl, skew_rkl)
    },
    **{one.__name__: one for one in (adaptive_kl, ab, alpha_mixture, taid, csd, dld, uld)},
    "dpkd": dpkd_of_tokens,
}
"""Those of one row and one teacher."""


def contrastive(o: Options, given: Problem, compared: Callable[[int], list[Tensor]]) -> Tensor:
    """Eq. 2 with the factor 2 of the released code; alpha by section 4.2, each on its own text."""
    gaps = {}
    for sequence in given.pairs:
        own = [[one.detach() for one in given.label(row, "main")] for row in given.rows_of(sequence)]
        likelihood = [math.exp(sum(float(row[side]) for row in own) / len(own)) for side in (0, 1)]
        gap = likelihood[1] - likelihood[0]
        gaps[sequence] = gap if given.preferred[sequence] else -gap
    values = []
    for row, sequence in enumerate(given.sequences):
        side = given.preferred[sequence]
        alpha = o["alpha"]
        alike = [gap for other, gap in gaps.items() if given.preferred[other] == side]
        typical = sum(alike) / len(alike)
        if o["alpha_rule"] == "gap" and typical > 0:
            found = (
                1 - (1 - alpha) * typical / (gaps[sequence] + 1e-5) if gaps[sequence] > -1e-5 else math.inf
            )
            alpha = min(max(found, o["alpha_least"]), o["alpha_most"])
        share = o["student_share"]
        if side:
            value = 2 * (1 - share) * skew_kl({"alpha": alpha}, *compared(row))
        else:
            value = 2 * share * skew_rkl({"alpha": alpha, "detach_mixture": True}, *compared(row))
        values.append(value)
    return torch.stack(values)


def advantage(o: Options, given: Problem) -> Tensor:
    values = []
    for row, sequence in enumerate(given.sequences):
        z, t, reference = given.logits(row, "main", "reference")
        rows = {"none": [], "token": [row], "sequence": given.rows_of(sequence)}[o["importance"]]
        weight = math.exp(
            sum(given.label(one, "main", "reference")[0].item() - given.sampled[one] for one in rows)
        )
        values.append(-weight * (z.softmax(0) * (t.log_softmax(0) - reference.log_softmax(0))).sum())
    return torch.stack(values)


def aligned_teacher(o: Options, given: Problem) -> Tensor:
    values = []
    for row in range(len(given.labels)):
        z, t, reference = given.logits(row, "main", "reference")
        w = o["extrapolation"]
        if o["weight_rule"] == "adaptive":
            w = w * (t.softmax(0) - reference.softmax(0)).abs().sum() + 1e-3
        start = t if o["start"] == "teacher" else reference
        target = start + w * (t - reference)
        values.append(o["scale"] / w * kl(z.log_softmax(0), target.log_softmax(0)))
    return torch.stack(values)


def of_pairs(given: Problem, margin: Callable[[Tensor], Tensor], teacher: str, mean: bool) -> Tensor:
    """A function of log q(y_w) / p(y_w) - log q(y_l) / p(y_l) at all rows of a pair."""
    ratio: dict[tuple[int, bool], Tensor] = {}
    for sequence, pair in given.pairs.items():
        labels = [given.label(row, teacher) for row in given.rows_of(sequence)]
        total = sum((q - p for q, p in labels), torch.zeros(()))
        ratio[pair, given.preferred[sequence]] = total / len(labels) if mean else total
    of = {pair: margin(ratio[pair, True] - ratio[pair, False]) for pair in given.pairs.values()}
    return torch.stack([of[given.pairs[sequence]] for sequence in given.sequences])


def dpkd(o: Options, given: Problem) -> Tensor:
    return of_pairs(given, lambda gap: -logsigmoid(o["scale"] * gap), "main", o["length_normalised"])


def dpo(o: Options, given: Problem) -> Tensor:
    beta, e = o["beta"], o.get("label_smoothing", 0.0)
    right, wrong = (lambda gap, sign=sign: -logsigmoid(sign * beta * gap) for sign in (1, -1))
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": lambda gap: (1 - e) * right(gap) + e * wrong(gap),
        "robust": lambda gap: ((1 - e) * right(gap) - e * wrong(gap)) / (1 - 2 * e),
        "hinge": lambda gap: (1 - beta * gap).clamp(min=0),
        "ipo": lambda gap: (gap - 1 / (2 * beta)) ** 2,
    }
    return of_pairs(given, losses[o["loss"]], "reference", o["loss"] == "ipo")


def simper(o: Options, given: Problem) -> Tensor:
    values = []
    for sequence in given.sequences:
        labels = [given.label(row)[0] for row in given.rows_of(sequence)]
        likelihood = torch.stack(labels).mean().exp()
        values.append((-2 if given.preferred[sequence] else 2) * likelihood)
    return torch.stack(values)


def context_contrast(o: Options, given: Problem) -> Tensor:
    values = []
    for row in range(len(given.labels)):
        q, p, wrong = given.label(row, "main", "reference")
        values.append((o["margin"] + (q - p).abs() - (q - wrong).abs()).clamp(min=0))
    return torch.stack(values)


def policy_gradient(o: Options, given: Problem) -> tuple[Tensor, Tensor]:
    """Value, and the surrogate that has MiniLLM's gradient: single step, long horizon, PPO's clip."""
    count, share, gamma = len(given.labels), o["sampling_teacher_share"], o["discount"]
    log_q, log_p = (
        torch.stack(one) for one in zip(*(given.label(n, "main") for n in range(count)), strict=True)
    )
    rewards = [o["ratio_weight"] * (p - q).item() for p, q in zip(log_p, log_q, strict=True)]
    bound = o["reward_clip"] or math.inf
    clipped = [min(max(one / o["reward_scale"], -bound), bound) for one in rewards]
    returns, of_response = [0.0] * count, [0.0] * count
    for sequence in given.pairs:
        rows = given.rows_of(sequence)
        for place, row in enumerate(rows):
            first = place if o["include_current"] else place + 1
            later = [gamma ** (at - place) * clipped[rows[at]] for at in range(first, len(rows))]
            returns[row] = sum(later) / (max(len(later), 1) if o["length_normalised"] else 1)
            reward = o["reward_weight"] * given.rewards[sequence]
            returns[row] += gamma ** (len(rows) - 1 - place) * reward
            of_response[row] = reward / len(rows)
    if o["whiten"]:
        mean = sum(returns) / count
        spread = math.sqrt(sum((one - mean) ** 2 for one in returns) / count + 1e-8)
        returns = [(one - mean) / spread for one in returns]
    values, surrogates = [], []
    for row, sequence in enumerate(given.sequences):
        q, p, m = log_q[row].exp().item(), log_p[row].exp().item(), math.exp(given.sampled[row])
        own = given.rows_of(sequence) if o["importance"] == "sequence" else [row]
        weight = q / ((1 - share) * q + share * p)
        surrogate = returns[row] * log_q[row]
        if o["ratio_clip"] is not None:
            before = max(
                (m - share * p) / (1 - share), 1e-3 * m
            )  # the least that ours takes for more than rounding
            weight, ratio = before / m, log_q[row].exp() / before
            bounded = ratio.clamp(1 - o["ratio_clip"], 1 + o["ratio_clip"])
            surrogate = torch.minimum(returns[row] * ratio, returns[row] * bounded)
        elif o["importance"] != "none":
            weight = math.exp(sum(log_q[one].item() - given.sampled[one] for one in own))
            weight = min(weight, o["importance_cap"] or math.inf)
        value, exact = log_q.new_zeros(()), log_q.new_zeros(())
        if o["single_step"]:
            value = exact = o["ratio_weight"] * reverse_kl({}, *given.logits(row, "main"))
        else:
            value = value - rewards[row]
            if o["estimator"] == "k3":
                value = value + o["ratio_weight"] * (p / q - 1)
        values.append(weight * (value - of_response[row]))
        surrogates.append(weight * (exact - surrogate))
    return torch.stack(values), torch.stack(surrogates)


SEQUENCE: dict[str, Callable[[Options, Problem], Any]] = {
    one.__name__: one
    for one in (advantage, aligned_teacher, dpkd, dpo, simper, context_contrast, policy_gradient)
}
"""Those of several models or of whole sequences."""


def formula(o: Options, given: Problem, compared: Callable[[int], list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Values [N], and what the gradient is that of.

    Args:
        o: the objective's options, `kind` among them.
        given: the rows.
        compared: of a row the student's and the teacher's logits, over single tokens or over the few that a
            teacher tells and one outcome for the rest.
    """
    kind = o["kind"]
    if kind == "contrastive":
        value = contrastive(o, given, compared)
    elif kind in SEQUENCE and o.get("level") != "token":
        found = SEQUENCE[kind](o, given)
        if isinstance(found, tuple):
            return found
        value = found
    else:
        value = torch.stack([TOKEN[kind](o, *compared(row)) for row in range(len(given.labels))])
    return value, value
