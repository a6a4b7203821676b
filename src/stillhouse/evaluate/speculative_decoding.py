"""Speculative decoding, counted: how many of a draft model's tokens the target model accepts.

The teacher is the target model, the student its draft model.

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


class DistributionTest:
    """Tests whether tokens were sampled from given distributions.

    For a token x sampled from p, -log p(x) has mean H = -sum p log p and variance sum p (log p)^2 - H^2. So
    the sum of -log p(x) - H over many tokens, each p conditional on the tokens before, divided by the root
    of the summed variances is approximately standard normal: a z beyond 3 or 4 means another distribution.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._variance = 0.0

    def update(self, p: Tensor, tokens: Tensor) -> None:
        """Add tokens.

        Args:
            p: [N, V] probabilities at each position.
            tokens: [N].
        """
        log_p = p.double().log()
        finite = torch.where(p > 0, log_p, torch.zeros_like(log_p))
        entropy = -(p * finite).sum(-1)
        self._sum += float((-log_p.gather(1, tokens[:, None])[:, 0] - entropy).sum())
        self._variance += float(((p * finite * finite).sum(-1) - entropy * entropy).clamp(min=0).sum())

    @property
    def z(self) -> float:
        """Standard deviations from the expectation; 0 for deterministic distributions that were followed."""
        if self._variance <= 0:
            return 0.0 if self._sum <= 0 else float("inf")
        return self._sum / self._variance**0.5


@dataclass
class SpeculativeResult:
    """Responses and counts of speculative decoding.

    Example: `SpeculativeResult(target_passes=10, tested=31, accepted=24, expected_accepted=23.7)`
    """

    target_passes: int = 0
    """Forward passes of the target model, each over one block of proposed tokens."""
    tested: int = 0
    """Proposed tokens up to and including the first rejected one of each block."""
    accepted: int = 0
    expected_accepted: float = 0.0
    """Sum over the tested positions of 1 - TVD(target, draft)."""
    tokens: int = 0
    """Generated tokens: accepted ones and those that the target model adds at the end of each block."""
    distribution: DistributionTest = field(default_factory=DistributionTest)
    """Of the generated tokens under the target model."""
    responses: list[list[int]] = field(default_factory=list)
    """Token ids for each prompt."""
    by_prompt: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    """For each prompt what it adds to the rates: numerator and denominator by name."""

    def counts(self) -> dict[str, tuple[float, float]]:
        """Numerators and denominators of the rates so far."""
        return {
            "acceptance_rate": (self.accepted, self.tested),
            "expected_acceptance_rate": (self.expected_accepted, self.tested),
            "block_efficiency": (self.tokens, self.target_passes),
        }

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of the tested tokens."""
        return self.accepted / max(1, self.tested)

    @property
    def expected_acceptance_rate(self) -> float:
        """Mean of 1 - TVD over the tested positions."""
        return self.expected_accepted / max(1, self.tested)

    @property
    def block_efficiency(self) -> float:
        """Generated tokens per forward pass of the target model; 1 to gamma + 1."""
        return self.tokens / max(1, self.target_passes)


def accept(target: Tensor, draft: Tensor, proposed: Tensor, uniform: Tensor) -> tuple[int, Tensor]:
    """The number of accepted tokens of one block, and the distribution of the token after them.

    Token x at position i is accepted with probability min(1, p_i(x) / q_i(x)). After the first rejection
    the next token is sampled from max(p_i - q_i, 0), normalised; if all are accepted, from the target's
    distribution after them. Then every token has the target's distribution.

    Args:
        target: [gamma + 1, V] the target model's probabilities p.
        draft: [gamma, V] the draft model's probabilities q.
        proposed: [gamma] tokens sampled from q.
        uniform: [gamma] numbers in [0, 1).

    Returns:
        The number of accepted tokens and [V] unnormalised weights of the next token.
    """
    position = torch.arange(len(proposed), device=proposed.device)
    p, q = target[position, proposed], draft[position, proposed]
    rejected = (uniform * q >= p).nonzero()
    if not len(rejected):
        return len(proposed), target[-1]
    first = int(rejected[0])
    residual = (target[first] - draft[first]).clamp(min=0)
    # Where both are equal up to rounding the residual is empty, and any sample from p is correct.
    return first, residual if float(residual.sum()) > 0 else target[first]


class CachedModel:
    """A model with its key-value cache; the last tokens can be rolled back."""

    def __init__(self, model: nn.Module, vocab_size: int, temperature: float) -> None:
        from transformers import DynamicCache

        self._model = model
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._cache: Any = DynamicCache(config=model.config)
        self.length = 0

    def forward(self, ids: Sequence[int]) -> Tensor:
        """[len(ids), V] probabilities of the token after each of `ids`."""
        inputs = torch.tensor([list(ids)], device=next(self._model.parameters()).device)
        output = self._model(input_ids=inputs, past_key_values=self._cache, use_cache=True)
        self.length += len(ids)
        logits = output.logits[0, :, : self._vocab_size].double()
        if self._temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return (logits / self._temperature).softmax(-1)

    def roll_back(self, length: int) -> None:
        """Drop everything after the first `length` tokens from the cache."""
        if length < self.length:
            self._cache.crop(length - self.length)
            self.length = length


@dataclass(frozen=True, slots=True)
class SpeculativeDecoder:
    """Settings of speculative decoding.

    Example: `SpeculativeDecoder(gamma=4, max_tokens=64, eos_ids=(2,), vocab_size=49152)`
    """

    gamma: int
    """Tokens that the draft model proposes per block."""
    max_tokens: int
    """Length limit of a response."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response."""
    vocab_size: int
    """Number of token ids that both models share."""
    temperature: float = 1.0
    """Of both models; 0 is greedy."""
    seed: int = 0

    @torch.no_grad()
    def generate(
        self, target: nn.Module, draft: nn.Module, prompts: Sequence[Sequence[int]]
    ) -> SpeculativeResult:
        """Generate one response per prompt, distributed as the target model's.

        Args:
            target: whose distribution the responses have.
            draft: proposes tokens.
            prompts: token ids, at least one each.

        Raises:
            ModelError: a model keeps a state that cannot be rolled back (recurrent or sliding-window layers).
        """
        result = SpeculativeResult()
        for index, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            before = result.counts()
            models = [CachedModel(model, self.vocab_size, self.temperature) for model in (target, draft)]
            try:
                response = self._generate_one(models[0], models[1], list(prompt), generator, result)
            except (NotImplementedError, ValueError, AttributeError) as error:
                raise ModelError(
                    "speculative: needs models whose layers are all full attention, because rejected tokens "
                    f"are rolled back ({type(error).__name__}: {error})"
                ) from error
            result.responses.append(response)
            result.by_prompt.append(
                {
                    name: (above - before[name][0], below - before[name][1])
                    for name, (above, below) in result.counts().items()
                }
            )
        return result

    def _generate_one(
        self,
        target: CachedModel,
        draft: CachedModel,
        ids: list[int],
        generator: torch.Generator,
        result: SpeculativeResult,
    ) -> list[int]:
        start, end = len(ids), len(ids) + self.max_tokens
        while len(ids) < end and not self._ended(ids[start:]):
            prefix = len(ids)
            draft_probabilities: list[Tensor] = []
            for _ in range(min(self.gamma, end - prefix)):
                draft_probabilities.append(draft.forward(ids[draft.length :])[-1])
                ids.append(int(torch.multinomial(draft_probabilities[-1].cpu(), 1, generator=generator)))
                if ids[-1] in self.eos_ids:
                    break
            q = torch.stack(draft_probabilities)
            proposed = torch.tensor(ids[prefix:], device=q.device)
            p = target.forward(ids[target.length :])[-len(proposed) - 1 :].to(q.device)
            uniform = torch.rand(len(proposed), generator=generator, dtype=torch.float64).to(q.device)
            accepted, weights = accept(p, q, proposed, uniform)
            tested = min(accepted + 1, len(proposed))
            result.target_passes += 1
            result.tested += tested
            result.accepted += accepted
            result.expected_accepted += float(torch.minimum(p[:tested], q[:tested]).sum())
            ids = ids[: prefix + accepted]
            if not self._ended(ids[start:]) and len(ids) < end:
                ids.append(int(torch.multinomial(weights.cpu(), 1, generator=generator)))
            generated = torch.tensor(ids[prefix:], device=p.device)
            result.distribution.update(p[: len(generated)], generated)
            result.tokens += len(generated)
            for model in (target, draft):
                model.roll_back(len(ids) - 1)
        return ids[start:]

    def _ended(self, ids: Sequence[int]) -> bool:
        return not set(self.eos_ids).isdisjoint(ids)
