"""The decode loop: a batch of rows in which a finished row gives its place to the next prompt.

Columns are time. Every row ends at the current column and starts where its prompt does, so prompts are
padded on the left. Prompts come in order of falling length, so a prompt always fits beside longer ones.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.engines.base import Sampling, TokenizerFacts
from stillhouse.engines.kv import GrowingCache
from stillhouse.engines.sampling import PAD, Sampler
from stillhouse.types import Completion

REFILL, DROP = 1 / 8, 1 / 4
"""Shares of the rows that have to be finished before they are refilled, or dropped when no prompt waits.

A refill costs about a step of overhead and a drop copies the cache, so neither is done for every row; half or
twice these shares measured the same.
"""

Finish = Callable[[int, Completion], None]
"""Told (index of the prompt, its completion)."""


def uniforms(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """Uniform numbers [len(indices), length] in [0, 1), each a function of (seed, prompt index, position).

    Counter-based (Philox), so the same text is written whatever shares the batch and in whatever order.
    """
    rows = []
    for index in indices:
        key = np.array([seed % 2**64, index], dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(length))
    return torch.from_numpy(np.stack(rows))


class Decoder:
    """Writes completions for prompts with a model whose layers are all attention.

    Example:
        >>> decoder = Decoder(model, TokenizerFacts((2,), 2), Sampling(), seed=0, num_layers=12)
        >>> decoder.run([[5, 9], [7]], rows=2, finish=lambda index, completion: print(index, completion))
    """

    def __init__(
        self, model: nn.Module, facts: TokenizerFacts, sampling: Sampling, seed: int, num_layers: int
    ) -> None:
        self.model = model
        self.facts = facts
        self.sampling = sampling
        self.seed = seed
        self.num_layers = num_layers
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(facts.eos_ids, dtype=torch.long, device=self.device)
        self.sampler = Sampler(sampling, self.eos)
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def run(self, prompts: Sequence[Sequence[int]], rows: int, finish: Finish) -> None:
        """Complete all prompts, at most `rows` at a time."""
        self.prompts = prompts
        self.finish = finish
        waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        while waiting:
            self._start([waiting.popleft() for _ in range(min(rows, len(waiting)))])
            while self.live:
                if self._rearrange(waiting):
                    continue
                self._step()

    def _start(self, indices: list[int]) -> None:
        width = max(len(self.prompts[index]) for index in indices)
        self.capacity = width + self.sampling.max_tokens + max(16, width // 4)
        self.cache, history, first, logprobs = self._prefill(indices, self.capacity)
        self.now = width
        rows = len(indices)
        self.history = torch.full((rows, self.capacity + 1), PAD, device=self.device)
        self.history[:, :width] = history
        self.history[:, width] = first
        self.visible = self.history[:, : self.capacity] != PAD
        self.visible[:, width:] = True
        self.logprobs = torch.zeros(rows, self.capacity + 1, device=self.device)
        if logprobs is not None:
            self.logprobs[:, width] = logprobs
        self.position = torch.tensor([len(self.prompts[index]) for index in indices], device=self.device)
        self.generated = torch.ones(rows, dtype=torch.long, device=self.device)
        self.uniform = self._uniforms(indices)
        self.owner = list(indices)
        self.first_column = [width - len(self.prompts[index]) for index in indices]
        self.alive = torch.ones(rows, dtype=torch.bool, device=self.device)
        self.live = rows
        self._settle(first)

    def _prefill(
        self, indices: list[int], capacity: int
    ) -> tuple[GrowingCache, Tensor, Tensor, Tensor | None]:
        """Run prompts and draw their first tokens: (cache, history [B, L], tokens [B], log-probabilities)."""
        width = max(len(self.prompts[index]) for index in indices)
        history = torch.tensor(
            [[PAD] * (width - len(self.prompts[index])) + list(self.prompts[index]) for index in indices],
            device=self.device,
        )
        mask = history != PAD
        cache = GrowingCache(self.num_layers, capacity)
        logits = self._logits(
            history.masked_fill(~mask, self.facts.pad_id), mask, (mask.cumsum(1) - 1).clamp_(min=0), cache
        )
        generated = torch.zeros(len(indices), dtype=torch.long, device=self.device)
        tokens, logprobs = self.sampler.draw(logits, history, generated, self._uniforms(indices)[:, 0])
        return cache, history, tokens, logprobs

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: GrowingCache) -> Tensor:
        inputs: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs, **self.extra
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _uniforms(self, indices: list[int]) -> Tensor:
        # One number more than tokens: a finished row that waits for its successor goes on drawing.
        return uniforms(self.seed, indices, self.sampling.max_tokens + 1).to(self.device)

    def _step(self) -> None:
        """Draw one token for every row."""
        column = self.now
        ids = self.history[:, column, None]
        logits = self._logits(ids, self.visible[:, : column + 1], self.position[:, None], self.cache)
        self.now = column + 1
        uniform = self.uniform.gather(1, self.generated[:, None]).squeeze(1)
        tokens, logprobs = self.sampler.draw(logits, self.history[:, : self.now], self.generated, uniform)
        self.history[:, self.now] = tokens
        if logprobs is not None:
            self.logprobs[:, self.now] = logprobs
        self.generated += 1
        self.position += 1
        self._settle(tokens)

    def _settle(self, tokens: Tensor) -> None:
        """Hand over the rows that have just ended."""
        ended = torch.isin(tokens, self.eos)
        over = (ended | (self.generated >= self.sampling.max_tokens)) & self.alive
        if not bool(over.any()):
            return
        for row in over.nonzero().squeeze(1).tolist():
            index = self.owner[row]
            start = self.first_column[row] + len(self.prompts[index])
            written = slice(start, self.now + 1)
            logprobs = tuple(self.logprobs[row, written].tolist()) if self.sampling.logprobs else None
            self.finish(
                index, Completion(tuple(self.history[row, written].tolist()), bool(ended[row]), logprobs)
            )
            self.live -= 1
        self.alive &= ~over
        self.generated.masked_fill_(over, 0)
        self.position.masked_fill_(over, 0)

    def _rearrange(self, waiting: deque[int]) -> bool:
        """Refill or drop finished rows where enough of them wait; true if a row was refilled."""
        rows = len(self.owner)
        free = rows - self.live
        if waiting and free >= rows * REFILL:
            self._refill([waiting.popleft() for _ in range(min(free, len(waiting)))])
            return True
        if not waiting and free >= rows * DROP:
            self._compact(self.alive)
        elif self.now + 1 >= self.capacity:
            self._compact(torch.ones_like(self.alive))
        return False

    def _unused(self) -> int:
        """Number of columns left of every row that still writes."""
        alive = self.alive.tolist()
        return min(first for first, here in zip(self.first_column, alive, strict=True) if here)

    def _compact(self, stay: Tensor) -> None:
        """Keep only the rows in `stay`, and the columns that a live row needs."""
        kept = stay.nonzero().squeeze(1)
        start = self._unused()
        self.cache.keep(kept, start)
        for name, fill in (("history", PAD), ("visible", True), ("logprobs", 0.0)):
            old = getattr(self, name)[kept]
            new = torch.full_like(old, fill)
            new[:, : old.shape[1] - start] = old[:, start:]
            setattr(self, name, new)
        for name in ("position", "generated", "uniform", "alive"):
            setattr(self, name, getattr(self, name)[kept])
        self.now -= start
        self.owner = [self.owner[row] for row in kept.tolist()]
        self.first_column = [self.first_column[row] - start for row in kept.tolist()]

    def _refill(self, indices: list[int]) -> None:
        """Put new prompts into rows that have ended."""
        chosen = (~self.alive).nonzero().squeeze(1)[: len(indices)]
        cache, history, first, logprobs = self._prefill(indices, max(len(self.prompts[i]) for i in indices))
        self.cache.put(chosen, cache)
        start = self.now - history.shape[1]
        self.history[chosen, :start] = PAD
        self.history[chosen, start : self.now] = history
        self.history[chosen, self.now] = first
        self.visible[chosen, : self.now] = self.history[chosen, : self.now] != PAD
        if logprobs is not None:
            self.logprobs[chosen, self.now] = logprobs
        self.position[chosen] = torch.tensor([len(self.prompts[i]) for i in indices], device=self.device)
        self.generated[chosen] = 1
        self.uniform[chosen] = self._uniforms(indices)
        self.alive[chosen] = True
        for row, index in zip(chosen.tolist(), indices, strict=True):
            self.owner[row] = index
            self.first_column[row] = self.now - len(self.prompts[index])
        self.live += len(indices)
        self._settle(self.history[:, self.now])
