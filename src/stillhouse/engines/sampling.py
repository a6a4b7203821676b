"""From logits to tokens: penalties and bans, the warpers, and sampling by the inverse CDF.

Each step gives what the logits processor of the same name in transformers 5 gives. Sampling uses one uniform
number per token, so that which rows share a batch does not change the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stillhouse.engines.base import Sampling
from stillhouse.errors import EngineError

PAD = -1
"""Fills a history of token ids to the left of the prompt."""

_BLOCK = 256
_PREFIX = 512


def uniforms(seed: int, sample_ids: Sequence[int], length: int) -> Tensor:
    """Uniform numbers [len(sample_ids), length] in [0, 1), each a function of (seed, sample id, position).

    Counter-based (Philox): independent of the composition and the order of the batch.
    """
    rows = []
    for sample_id in sample_ids:
        key = np.array([seed % 2**64, sample_id], dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(length))
    return torch.from_numpy(np.stack(rows))


class NothingToSample(EngineError):
    """A row of logits has a NaN or no finite entry."""

    def __init__(self) -> None:
        super().__init__(
            "a row of logits is not finite or leaves no token to sample. Either the model's weights have "
            "diverged, or min_tokens and no_repeat_ngram_size together ban every token."
        )


class Sampler:
    """Samples the next token for a batch of rows.

    Example:
        >>> sampler = Sampler(Sampling(temperature=0.7), eos_ids=torch.tensor([2]))
        >>> tokens, logprobs = sampler.sample(logits, history, generated, uniform)
    """

    def __init__(self, sampling: Sampling, eos_ids: Tensor, *, static: bool = False) -> None:
        """A sampler that, if `static`, never waits for the device: every shape is known to the host."""
        self.sampling = sampling
        self.eos_ids = eos_ids
        self.static = static

    def sample(
        self, logits: Tensor, history: Tensor, generated: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B] and, with `sampling.logprobs`, their log-probabilities [B] in nats.

        Args:
            logits: [B, V]; overwritten.
            history: [B, T] token ids of prompt and response so far, left-padded with `PAD`.
            generated: [B] number of response tokens in the history.
            uniform: [B] numbers in [0, 1).

        Raises:
            EngineError: a row has a NaN or no finite logit: the model diverged or every token is banned.
        """
        tokens, logprobs, valid = self.draw(logits, history, generated, uniform)
        if not bool(valid.all()):
            raise NothingToSample
        return tokens, logprobs

    def draw(
        self,
        logits: Tensor,
        history: Tensor,
        generated: Tensor,
        uniform: Tensor,
        last: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `sample`, and [B] whether a row has a token to sample; where it has none its token is arbitrary.

        `last` [B] is the column of each row's last token, for a history that is padded on the right.
        """
        logits = self.process_logits(logits, history, generated, last)
        top, tokens = logits.max(-1)
        valid = top.isfinite()
        if self.sampling.temperature == 0:
            return tokens, _logprob(logits, tokens) if self.sampling.logprobs else None, valid
        weights = logits.sub_(top[:, None]).exp_()
        tokens = inverse_cdf(weights, uniform)
        if not self.sampling.logprobs:
            return tokens, None, valid
        chosen = weights.gather(1, tokens[:, None]).squeeze(1)
        return tokens, torch.log(chosen) - torch.log(weights.sum(-1)), valid

    def process_logits(
        self, logits: Tensor, history: Tensor, generated: Tensor, last: Tensor | None = None
    ) -> Tensor:
        """The logits [B, V] of the sampling distribution; -inf for excluded tokens. `last` as in `draw`."""
        s = self.sampling
        if s.repetition_penalty != 1.0:
            logits = apply_repetition_penalty(logits, history, s.repetition_penalty)
        if s.no_repeat_ngram_size:
            logits = ban_repeated_ngrams(logits, history, s.no_repeat_ngram_size, last)
        if s.min_tokens and len(self.eos_ids):
            early = (generated < s.min_tokens)[:, None]
            logits[:, self.eos_ids] = logits[:, self.eos_ids].masked_fill(early, -torch.inf)
        if s.temperature == 0:
            return logits
        if s.temperature != 1.0:
            logits = logits.div_(s.temperature)
        if 0 < s.top_k < logits.shape[1]:
            threshold = torch.topk(logits, s.top_k).values[:, -1:]
            logits = logits.masked_fill_(logits < threshold, -torch.inf)
        if s.top_p < 1.0:
            logits = apply_top_p(logits, s.top_p, whole=self.static)
        if s.min_p > 0.0:
            threshold = logits.amax(-1, keepdim=True) + torch.log(torch.tensor(s.min_p))
            logits = logits.masked_fill_(logits < threshold, -torch.inf)
        return logits


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The smallest index whose cumulative weight exceeds `uniform` times the total, [B].

    In two levels, blocks and then the tokens of one block: a cumulative sum over a whole vocabulary is
    sequential, sums of blocks are not.

    Args:
        weights: [B, V] non-negative, not all zero in any row; need not sum to one.
        uniform: [B] numbers in [0, 1).
    """
    vocab = weights.shape[1]
    whole = vocab - vocab % _BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < vocab:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    cumulative = sums.double().cumsum(1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    below = cumulative.gather(1, block) - sums.gather(1, block)
    positions = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, positions.clamp(max=vocab - 1)).double().masked_fill_(positions >= vocab, 0.0)
    offset = _first_above(inside.cumsum(1), target - below)
    return (block * _BLOCK + offset).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index [B, 1] with cumulative > target; a target rounded up to the total is capped."""
    target = torch.minimum(target.clamp(min=0.0), cumulative[:, -1:] * (1 - 1e-12))
    return (cumulative <= target).sum(1, keepdim=True)


def _logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


def apply_top_p(logits: Tensor, top_p: float, *, whole: bool = False) -> Tensor:
    """Nucleus sampling: -inf for every token above which there is at least `top_p` of probability.

    The whole vocabulary is sorted with `whole`; else only for rows whose nucleus is larger than a short
    prefix, which has to be asked of the device.
    """
    if whole:
        return _nucleus(logits, top_p, logits.shape[1])[0]
    kept, complete = _nucleus(logits, top_p, min(_PREFIX, logits.shape[1]))
    if not bool(complete.all()):
        rows = (~complete).nonzero().squeeze(1)
        kept[rows], _ = _nucleus(logits[rows], top_p, logits.shape[1])
    return kept


def _nucleus(logits: Tensor, top_p: float, size: int) -> tuple[Tensor, Tensor]:
    """The nucleus among the `size` most likely tokens [B, V], and whether it is complete [B]."""
    if size < logits.shape[1]:
        values, indices = torch.topk(logits, size)
    else:
        values, indices = torch.sort(logits, descending=True)
    probs = (values - logits.logsumexp(-1, keepdim=True)).exp_()
    cumulative = probs.cumsum(1)
    keep = cumulative - probs < top_p
    keep[:, 0] = True
    kept = torch.full_like(logits, -torch.inf)
    kept.scatter_(1, indices, values.masked_fill_(~keep, -torch.inf))
    return kept, cumulative[:, -1] >= top_p


def apply_repetition_penalty(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of tokens in the history by `penalty`, multiply negative ones by it."""
    rows, vocab = logits.shape
    seen = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=logits.device)
    seen.scatter_(1, torch.where(history == PAD, vocab, history), True)
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen[:, :vocab], penalised, logits)


def ban_repeated_ngrams(logits: Tensor, history: Tensor, size: int, last: Tensor | None = None) -> Tensor:
    """-inf for every token that would complete an n-gram that is already in the history.

    `last` [B] is the column of each row's last token; by default all rows end at the last column.
    """
    length = history.shape[1]
    if length < size:
        return logits
    grams = history.unfold(1, size, 1)
    if last is None:
        ending = history[:, length - size + 1 :]
    else:
        back = torch.arange(2 - size, 1, device=history.device)
        ending = history.gather(1, (last[:, None] + back).clamp(min=0))
    within = (grams[:, :, 0] != PAD) & (grams[:, :, -1] != PAD)
    repeats = (grams[:, :, :-1] == ending[:, None, :]).all(-1) & within
    rows, vocab = logits.shape
    banned = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=logits.device)
    banned.scatter_(1, torch.where(repeats, grams[:, :, -1], vocab), True)
    return logits.masked_fill_(banned[:, :vocab], -torch.inf)
