"""Speculative decoding, counted: how many of a draft student's tokens its teacher accepts.

Source: Leviathan, Kalman and Matias (2023), "Fast Inference from Transformers via Speculative Decoding",
Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError


class Surprise:
    """Whether tokens were drawn from the distributions that they are said to have.

    Of a token x drawn from p, -log p(x) has the mean H = -sum p log p and the variance sum p (log p)^2 - H^2.
    So the sum of -log p(x) - H over many tokens, each p given what stands before, over the root of the summed
    variances is near a standard normal number: beyond 3 or 4, the tokens are from somewhere else.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._variance = 0.0

    def add(self, p: Tensor, tokens: Tensor) -> None:
        """Take in tokens.

        Args:
            p: [N, V] probabilities of the token at each place.
            tokens: [N].
        """
        log_p = p.double().log()
        known = torch.where(p > 0, log_p, torch.zeros_like(log_p))
        entropy = -(p * known).sum(-1)
        self._sum += float((-log_p.gather(1, tokens[:, None])[:, 0] - entropy).sum())
        self._variance += float(((p * known * known).sum(-1) - entropy * entropy).clamp(min=0).sum())

    @property
    def z(self) -> float:
        """Standard deviations from what the distributions give; 0 where they leave nothing to chance."""
        if self._variance <= 0:
            return 0.0 if self._sum <= 0 else float("inf")
        return self._sum / self._variance**0.5


@dataclass
class Counts:
    """What happened while text was written.

    Example: `Counts(blocks=10, tested=31, accepted=24, overlap=23.7)`
    """

    blocks: int = 0
    """Passes of the teacher, each over one block of proposals."""
    tested: int = 0
    """Proposals that were looked at: those up to and with the first rejected one of each block."""
    accepted: int = 0
    overlap: float = 0.0
    """Sum over the tested places of 1 - TVD(teacher, student): how many were expected to be accepted."""
    tokens: int = 0
    """Tokens written: accepted ones and those that the teacher gives at the end of each block."""
    surprise: Surprise = field(default_factory=Surprise)
    """Of the tokens written, under the teacher's distributions."""
    texts: list[list[int]] = field(default_factory=list)
    """What was written for each prompt."""

    @property
    def acceptance(self) -> float:
        """Accepted proposals of those tested."""
        return self.accepted / max(1, self.tested)

    @property
    def expected(self) -> float:
        """The mean of 1 - TVD over the tested places."""
        return self.overlap / max(1, self.tested)

    @property
    def block_efficiency(self) -> float:
        """Tokens for each pass of the teacher; 1 to gamma + 1."""
        return self.tokens / max(1, self.blocks)


def accept(teacher: Tensor, student: Tensor, proposed: Tensor, uniform: Tensor) -> tuple[int, Tensor]:
    """How many proposals stand, and the distribution of the token after them.

    Proposal x at place i stands with probability min(1, p_i(x) / q_i(x)). After the first that does not, the
    next token is drawn from max(p_i - q_i, 0), normalised; if all stand, from the teacher's own distribution
    after them. Then every token has the teacher's distribution.

    Args:
        teacher: [gamma + 1, V] the teacher's probabilities p.
        student: [gamma, V] the student's q.
        proposed: [gamma] tokens drawn from q.
        uniform: [gamma] numbers in [0, 1).

    Returns:
        The number of accepted proposals and [V], unnormalised weights of the next token.
    """
    place = torch.arange(len(proposed), device=proposed.device)
    p, q = teacher[place, proposed], student[place, proposed]
    rejected = (uniform * q >= p).nonzero()
    if not len(rejected):
        return len(proposed), teacher[-1]
    first = int(rejected[0])
    left = (teacher[first] - student[first]).clamp(min=0)
    # Where both are equal but for rounding nothing is left over, and any draw from p is right.
    return first, left if float(left.sum()) > 0 else teacher[first]


class Reader:
    """A model with the keys and values of what it has read; its last tokens can be taken back."""

    def __init__(self, model: nn.Module, vocab: int, temperature: float) -> None:
        from transformers import DynamicCache

        self._model = model
        self._vocab = vocab
        self._temperature = temperature
        self._cache: Any = DynamicCache(config=model.config)
        self.length = 0

    def read(self, ids: Sequence[int]) -> Tensor:
        """[len(ids), V] probabilities of the token after each of `ids`."""
        given = torch.tensor([list(ids)], device=next(self._model.parameters()).device)
        output = self._model(input_ids=given, past_key_values=self._cache, use_cache=True)
        self.length += len(ids)
        logits = output.logits[0, :, : self._vocab].double()
        if self._temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return (logits / self._temperature).softmax(-1)

    def back(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if length < self.length:
            self._cache.crop(length - self.length)
            self.length = length


@dataclass(frozen=True, slots=True)
class Settings:
    """How text is written.

    Example: `Settings(gamma=4, max_tokens=64, eos_id=2, vocab=49152)`
    """

    gamma: int
    """Tokens that the student proposes at a time."""
    max_tokens: int
    """Length limit of a text."""
    eos_id: int
    """Ends a text."""
    vocab: int
    """Number of token ids that both models share."""
    temperature: float = 1.0
    """Of both; 0 is greedy."""
    seed: int = 0


@torch.no_grad()
def write(
    teacher: nn.Module, student: nn.Module, prompts: Sequence[Sequence[int]], settings: Settings
) -> Counts:
    """Write one text for each prompt, distributed as the teacher's, with the student as its draft.

    Args:
        teacher: whose distribution the text has.
        student: proposes.
        prompts: token ids, at least one each.
        settings: the same settings and models give the same text.

    Raises:
        ModelError: a model keeps a state that cannot be taken back (recurrent or sliding layers).
    """
    counts = Counts()
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        readers = [Reader(model, settings.vocab, settings.temperature) for model in (teacher, student)]
        try:
            counts.texts.append(_one(readers[0], readers[1], list(prompt), settings, generator, counts))
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise ModelError(
                "speculative: needs models whose layers are all full attention, because rejected tokens are "
                f"taken back ({type(error).__name__}: {error})"
            ) from error
    return counts


def _one(
    teacher: Reader,
    student: Reader,
    ids: list[int],
    settings: Settings,
    generator: torch.Generator,
    counts: Counts,
) -> list[int]:
    start, end = len(ids), len(ids) + settings.max_tokens
    while len(ids) < end and settings.eos_id not in ids[start:]:
        known = len(ids)
        drafts: list[Tensor] = []
        for _ in range(min(settings.gamma, end - known)):
            drafts.append(student.read(ids[student.length :])[-1])
            ids.append(int(torch.multinomial(drafts[-1].cpu(), 1, generator=generator)))
            if ids[-1] == settings.eos_id:
                break
        q = torch.stack(drafts)
        proposed = torch.tensor(ids[known:], device=q.device)
        p = teacher.read(ids[teacher.length :])[-len(proposed) - 1 :].to(q.device)
        uniform = torch.rand(len(proposed), generator=generator, dtype=torch.float64).to(q.device)
        kept, weights = accept(p, q, proposed, uniform)
        tested = min(kept + 1, len(proposed))
        counts.blocks += 1
        counts.tested += tested
        counts.accepted += kept
        counts.overlap += float(torch.minimum(p[:tested], q[:tested]).sum())
        ids = ids[: known + kept]
        if settings.eos_id not in ids[start:] and len(ids) < end:
            ids.append(int(torch.multinomial(weights.cpu(), 1, generator=generator)))
        written = torch.tensor(ids[known:], device=p.device)
        counts.surprise.add(p[: len(written)], written)
        counts.tokens += len(written)
        for reader in (teacher, student):
            reader.back(len(ids) - 1)
    return ids[start:]
