"""A teacher's log-probabilities of a few tokens of each row only: the most probable ones, random samples, or
that of the label alone.

Three forms, and how objectives are computed from them:

- "topk": the K most probable tokens and the mass of all others, the tail. Student and teacher are both
  coarsened to K + 1 outcomes, the last of which is "any other token". An f-divergence of coarsened
  distributions is at most that of the whole ones (the data-processing inequality), so the loss is biased
  downwards and blind to how the student spreads its tail.
- "sampled": tokens sampled at random, with importance weights w such that sum_i w_i f(i) has the expectation
  E_p[f]. Value and gradient of an objective E_p[f] are then unbiased, however few the samples, and noisy.
  Sparse Logit Sampling (arXiv 2503.16870) shows why that beats an uncorrected top-k.
- "labels": the log-probability of the token that the text has, and nothing else. It is enough for estimates
  from text that the student itself has sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from stillhouse.core.host import carried

Form = Literal["distribution", "topk", "sampled", "labels"]
"""What a teacher gives for a row: all log-probabilities, the most probable ones, weighted samples, or that of
the label."""

ALL_FORMS: frozenset[str] = frozenset({"distribution", "topk", "sampled", "labels"})

EXCLUDED = -1e30
"""The logit of an entry that takes no part: finite, so that differences stay numbers, and of probability
zero."""

MIN_TAIL = -23.0
"""The smallest log-mass of a tail, about 1e-10: less is rounding, and would give reverse KL no bound."""


@dataclass(frozen=True, slots=True)
class SparseLogprobs:
    """A teacher's log-probabilities of K tokens in each of N rows, in nats, with `tail` or `weights`; or
    of the labels alone, with neither and K = 0.

    Example: `SparseLogprobs(top.indices, top.values, tail=torch.log1p(-top.values.exp().sum(-1)))`
    """

    ids: Tensor
    """[N, K] int64; -1 where a row has fewer entries. No id comes twice in a row."""
    logprobs: Tensor
    """[N, K]: the teacher's log-probability of each."""
    tail: Tensor | None = None
    """[N]: the log of the mass of all tokens that are not among `ids`; makes the form "topk"."""
    weights: Tensor | None = None
    """[N, K]: importance weights; makes the form "sampled"."""
    labels: Tensor | None = None
    """[N]: the teacher's log-probability of the row's label, whether or not it is among `ids`."""

    def __post_init__(self) -> None:
        alone = self.tail is None and self.labels is not None and self.ids.shape[1] == 0
        if (self.tail is None) == (self.weights is None) and not alone:
            raise ValueError(
                "sparse log-probabilities have either a tail (topk) or weights (sampled), or are those of "
                "the labels alone"
            )

    @classmethod
    def of_labels(cls, logprobs: Tensor) -> SparseLogprobs:
        """The log-probability of each label [N] and nothing else."""
        none = logprobs.new_zeros(logprobs.shape[0], 0)
        return cls(none.long(), none, labels=logprobs)

    @property
    def form(self) -> Form:
        """Which of the three forms it is."""
        if self.weights is not None:
            return "sampled"
        return "labels" if self.tail is None else "topk"

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def __getitem__(self, index: Tensor | slice) -> SparseLogprobs:
        """The rows that `index` picks."""
        return self.each(lambda tensor: tensor[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SparseLogprobs:
        """The same on a device, with log-probabilities and weights in a dtype."""
        tensors = self.tensors()
        moved: dict[str, Any] = dict(zip(tensors, carried(list(tensors.values()), device), strict=True))
        if dtype is not None:
            moved = {name: one.to(dtype) if one.is_floating_point() else one for name, one in moved.items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the name of their field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: one for name, one in values.items() if one is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> SparseLogprobs:
        """With every tensor changed alike."""
        values: dict[str, Any] = {}
        for field in fields(self):
            one = getattr(self, field.name)
            values[field.name] = None if one is None else change(one)
        return SparseLogprobs(**values)


def concat_sparse(parts: Sequence[SparseLogprobs]) -> SparseLogprobs:
    """The rows of all parts; parts of fewer tokens are padded with absent entries."""
    width = max(part.ids.shape[1] for part in parts)

    def wide(name: str, filler: float) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        if any(one is None for one in found):
            return None
        return torch.cat([pad(one, (0, width - one.shape[1]), value=filler) for one in found])

    def flat(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if any(one is None for one in found) else torch.cat(found)

    ids, logprobs = wide("ids", -1), wide("logprobs", EXCLUDED)
    assert ids is not None
    assert logprobs is not None
    return SparseLogprobs(ids, logprobs, flat("tail"), wide("weights", 0.0), flat("labels"))


def scatter_sparse(part: SparseLogprobs, rows: Tensor, count: int) -> SparseLogprobs:
    """`count` rows, of which those numbered `rows` [n] are `part`'s and all others have no entries."""

    def scatter(one: Tensor | None, filler: float) -> Tensor | None:
        if one is None:
            return None
        return one.new_full((count, *one.shape[1:]), filler).index_copy(0, rows, one)

    ids, logprobs = scatter(part.ids, -1), scatter(part.logprobs, EXCLUDED)
    assert ids is not None
    assert logprobs is not None
    return SparseLogprobs(
        ids, logprobs, scatter(part.tail, 0.0), scatter(part.weights, 0.0), scatter(part.labels, 0.0)
    )


def empty_sparse(form: str, count: int, device: torch.device) -> SparseLogprobs:
    """`count` rows without entries."""
    one = torch.zeros(count, 1, device=device)
    ids = torch.full((count, 1), -1, dtype=torch.int64, device=device)
    if form == "labels":
        return SparseLogprobs.of_labels(one[:, 0])
    if form == "sampled":
        return SparseLogprobs(ids, one + EXCLUDED, weights=one, labels=one[:, 0])
    return SparseLogprobs(ids, one + EXCLUDED, tail=one[:, 0], labels=one[:, 0])


def topk_of(logprobs: Tensor, count: int, labels: Tensor | None = None) -> SparseLogprobs:
    """The `count` most probable tokens of whole distributions [N, V], and the mass of the others."""
    top = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    rest = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return SparseLogprobs(top.indices, top.values, rest.clamp_min(MIN_TAIL), labels=_picked(logprobs, labels))


def sampled_of(
    logprobs: Tensor,
    count: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    labels: Tensor | None = None,
) -> SparseLogprobs:
    """`count` samples, with replacement, of the tempered distribution r, proportional to p^(1 / temperature).

    A token sampled c times has weight c / count p / r, so that sum w f is an unbiased estimate of E_p[f]; at
    temperature 1 weights are shares of samples. Temperatures above 1 see more of the tail.
    """
    proposal = torch.log_softmax(logprobs / temperature, -1)
    drawn = torch.multinomial(proposal.exp(), count, replacement=True, generator=generator).sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(-1) - 1
    width = int(place.max()) + 1
    ids = torch.full((drawn.shape[0], width), -1, dtype=torch.int64, device=drawn.device)
    ids.scatter_(-1, place, drawn)
    times = torch.zeros(ids.shape, dtype=logprobs.dtype, device=drawn.device)
    times.scatter_add_(-1, place, torch.ones_like(drawn, dtype=times.dtype))
    there = ids >= 0
    chosen = ids.clamp_min(0)
    ours, theirs = logprobs.gather(-1, chosen), proposal.gather(-1, chosen)
    weights = torch.where(there, times / count * (ours - theirs).exp(), 0.0)
    ours = ours.masked_fill(~there, EXCLUDED)
    return SparseLogprobs(ids, ours, weights=weights, labels=_picked(logprobs, labels))


def buckets(student: Tensor, sparse: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """Both models over the teacher's most probable tokens and one bucket for all others, logits [n, K + 1].

    An entry that is not there (id -1, or beyond the student's vocabulary, or excluded by the student) takes
    no part on either side; the rest is renormalised.
    """
    assert sparse.tail is not None
    padded, index = _padded(student, sparse)
    rest = padded.scatter(-1, index, EXCLUDED).logsumexp(-1, keepdim=True)
    ours = torch.cat([padded.gather(-1, index), rest], -1)
    theirs = torch.cat([sparse.logprobs, sparse.tail.clamp_min(MIN_TAIL)[:, None]], -1).to(ours.dtype)
    absent = ours.detach() < EXCLUDED / 2
    return ours.masked_fill(absent, EXCLUDED), theirs.masked_fill(absent, EXCLUDED)


def sampled_entries(student: Tensor, sparse: SparseLogprobs) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of teacher and student at the sampled tokens, and their weights, [n, K] each."""
    assert sparse.weights is not None
    padded, index = _padded(student, sparse)
    there = index < student.shape[-1]
    ours = padded.gather(-1, index) - student.logsumexp(-1, keepdim=True)
    logprobs, weights = sparse.logprobs.to(ours.dtype), sparse.weights.to(ours.dtype)
    return (
        logprobs.masked_fill(~there, 0.0),
        ours.masked_fill(~there, 0.0),
        weights.masked_fill(~there, 0.0),
    )


def gathered_at(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The entries [n, K] of `logprobs` [n, V] at these ids; of an id that is none of them `EXCLUDED`."""
    there = (ids >= 0) & (ids < logprobs.shape[-1])
    return logprobs.gather(-1, ids.clamp(0, logprobs.shape[-1] - 1)).masked_fill(~there, EXCLUDED)


def looked_up(sparse: SparseLogprobs, ids: Tensor, vocab: int, missing: Tensor) -> Tensor:
    """What `sparse` says about each of `ids` [n, K], and `missing` [n, 1] where it says nothing."""
    there = (sparse.ids >= 0) & (sparse.ids < vocab)
    table = missing.expand(-1, vocab + 1).scatter(
        -1, torch.where(there, sparse.ids, vocab), sparse.logprobs.to(missing.dtype)
    )
    return table.gather(-1, ids.clamp(0, vocab - 1))


def _padded(student: Tensor, sparse: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """The student's logits with one excluded entry more, [n, V + 1], and where each id is in it."""
    vocab = student.shape[-1]
    there = (sparse.ids >= 0) & (sparse.ids < vocab)
    return pad(student, (0, 1), value=EXCLUDED), torch.where(there, sparse.ids, vocab)


def _picked(logprobs: Tensor, labels: Tensor | None) -> Tensor | None:
    return None if labels is None else logprobs.gather(-1, labels[:, None]).squeeze(-1)
