"""From logits to tokens: penalties and bans, the warpers, and a draw by the inverse of the CDF.

Each step gives what the logits processor of the same name in transformers 5 gives. The draw uses one
uniform number a token, so that which rows share a batch does not change what is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stillhouse.engines.base import Sampling
from stillhouse.errors import EngineError

PAD = -1
"""Stands left of the prompt in a history of token ids."""

_BLOCK = 256
_PREFIX = 512


def uniforms(seed: int, numbers: Sequence[int], length: int) -> Tensor:
    """Uniform numbers [len(numbers), length] in [0, 1), each a function of (seed, prompt number, position).

    Counter-based (Philox), so the same text is written whatever shares the batch and in whatever order.
    """
    rows = []
    for number in numbers:
        key = np.array([seed % 2**64, number], dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(length))
    return torch.from_numpy(np.stack(rows))


class Sampler:
    """Draws the next token for a batch of rows.

    Example:
        >>> sampler = Sampler(Sampling(temperature=0.7), eos_ids=torch.tensor([2]))
        >>> tokens, logprobs = sampler.draw(logits, history, generated, uniform)
    """

    def __init__(self, sampling: Sampling, eos_ids: Tensor) -> None:
        self.sampling = sampling
        self.eos_ids = eos_ids

    def draw(
        self, logits: Tensor, history: Tensor, generated: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B] and, where asked for, their log-probabilities [B] in nats.

        Args:
            logits: [B, V] floats; overwritten.
            history: [B, T] token ids of prompt and response so far, `PAD` on the left.
            generated: [B] number of response tokens in the history.
            uniform: [B] numbers in [0, 1).

        Raises:
            EngineError: a row has no token with a finite logit, or a NaN.
        """
        logits = self.scores(logits, history, generated)
        top, tokens = logits.max(-1)
        if not bool(top.isfinite().all()):
            raise EngineError(
                "a row of logits is not finite or leaves no token to draw. Either the model's weights have "
                "diverged, or min_tokens and no_repeat_ngram_size together ban every token."
            )
        if self.sampling.temperature == 0:
            return tokens, _logprob(logits, tokens) if self.sampling.logprobs else None
        weights = logits.sub_(top[:, None]).exp_()
        tokens = inverse_cdf(weights, uniform)
        if not self.sampling.logprobs:
            return tokens, None
        chosen = weights.gather(1, tokens[:, None]).squeeze(1)
        return tokens, torch.log(chosen) - torch.log(weights.sum(-1))

    def scores(self, logits: Tensor, history: Tensor, generated: Tensor) -> Tensor:
        """The logits [B, V] of the distribution that is drawn from; excluded tokens have -inf."""
        s = self.sampling
        if s.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, history, s.repetition_penalty)
        if s.no_repeat_ngram_size:
            logits = ban_repeated_ngrams(logits, history, s.no_repeat_ngram_size)
        if s.min_tokens and len(self.eos_ids):
            early = (generated < s.min_tokens)[:, None]
            logits[:, self.eos_ids] = logits[:, self.eos_ids].masked_fill(early, -torch.inf)
        if s.temperature == 0:
            return logits
        if s.temperature != 1.0:
            logits = logits.div_(s.temperature)
        if 0 < s.top_k < logits.shape[1]:
            least = torch.topk(logits, s.top_k).values[:, -1:]
            logits = logits.masked_fill_(logits < least, -torch.inf)
        if s.top_p < 1.0:
            logits = keep_nucleus(logits, s.top_p)
        if s.min_p > 0.0:
            least = logits.amax(-1, keepdim=True) + torch.log(torch.tensor(s.min_p))
            logits = logits.masked_fill_(logits < least, -torch.inf)
        return logits


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The least index whose cumulative weight exceeds `uniform` times the total; [B].

    Two levels, blocks and then the tokens of one block: a cumulative sum over a whole vocabulary cannot be
    vectorised, sums of blocks can.

    Args:
        weights: [B, V] non-negative, not all zero in any row; they need not sum to one.
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
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, places.clamp(max=vocab - 1)).double().masked_fill_(places >= vocab, 0.0)
    offset = _first_above(inside.cumsum(1), target - below)
    return (block * _BLOCK + offset).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index [B, 1] with cumulative > target; the cap keeps a rounded target inside."""
    target = torch.minimum(target.clamp(min=0.0), cumulative[:, -1:] * (1 - 1e-12))
    return (cumulative <= target).sum(1, keepdim=True)


def _logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """-inf for every token that has at least `top_p` of probability above it.

    The vocabulary is sorted as a whole only in rows whose nucleus is larger than a short prefix.
    """
    kept, whole = _nucleus(logits, top_p, min(_PREFIX, logits.shape[1]))
    if not bool(whole.all()):
        rows = (~whole).nonzero().squeeze(1)
        kept[rows], _ = _nucleus(logits[rows], top_p, logits.shape[1])
    return kept


def _nucleus(logits: Tensor, top_p: float, size: int) -> tuple[Tensor, Tensor]:
    """The part of the nucleus [B, V] among the `size` most likely tokens; whether [B] that is all."""
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


def penalise_repetition(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of tokens in the history by `penalty`, multiply negative ones by it."""
    rows, vocab = logits.shape
    seen = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=logits.device)
    seen.scatter_(1, torch.where(history == PAD, vocab, history), True)
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen[:, :vocab], penalised, logits)


def ban_repeated_ngrams(logits: Tensor, history: Tensor, size: int) -> Tensor:
    """-inf for every token that would complete an n-gram which is in the history already."""
    if history.shape[1] < size:
        return logits
    grams = history.unfold(1, size, 1)
    last = history[:, history.shape[1] - size + 1 :]
    repeats = (grams[:, :, :-1] == last[:, None, :]).all(-1) & (grams[:, :, 0] != PAD)
    row, place = repeats.nonzero(as_tuple=True)
    logits[row, grams[row, place, -1]] = -torch.inf
    return logits
