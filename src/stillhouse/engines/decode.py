"""The decode loop: a batch of rows in which a finished row gives its place to the next prompt.

Columns are time. Every row ends at the current column and starts where its prompt does, so prompts are
padded on the left. Prompts come in order of falling length, so a prompt always fits beside longer ones.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.types import Completion
from stillhouse.engines.base import Sampling, TokenizerFacts
from stillhouse.engines.kv import GrowingCache
from stillhouse.engines.sampling import PAD, Sampler, uniforms

GROUP_TOKENS = 256
"""Least tokens, padding included, for which prompts are run apart from longer ones."""

REFILL, DROP = 1 / 8, 1 / 4
"""Shares of the rows that have to be finished before they are refilled, or dropped when no prompt waits.

A refill costs about a step of overhead and a drop copies the cache, so neither is done for every row; half or
twice these shares measured the same.
"""

Finish = Callable[[int, Completion], None]
"""Told (index of the prompt, its completion)."""


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
        self.vocab = facts.vocab
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(facts.eos_ids, dtype=torch.long, device=self.device)
        self.sampler = Sampler(sampling, self.eos)
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        rows: int,
        finish: Finish,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Complete all prompts, at most `rows` at a time; `numbers` as in `Engine.generate`."""
        self.prompts = prompts
        self.numbers = range(len(prompts)) if numbers is None else numbers
        self.finish = finish
        waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        while waiting:
            self._start(min(rows, len(waiting)), len(prompts[waiting[0]]))
            self._refill([waiting.popleft() for _ in range(self.rows)])
            while self.live:
                if not self._rearrange(waiting):
                    self._step()

    def _start(self, rows: int, width: int) -> None:
        """An empty table of rows that are free to be filled, at the column `width`."""
        self.now = width
        self.capacity = width + self.sampling.max_tokens + max(16, width // 4)
        self.cache = GrowingCache(self.num_layers, self.capacity, rows, width)
        self.history = torch.full((rows, self.capacity + 1), PAD, device=self.device)
        self.visible = torch.ones(rows, self.capacity, dtype=torch.bool, device=self.device)
        self.logprobs = torch.zeros(rows, self.capacity + 1, device=self.device)
        self.position = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.generated = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.uniform = self._uniforms([0] * rows)
        self.alive = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.owner = [0] * rows
        self.first_column = [0] * rows
        self.live = 0

    @property
    def rows(self) -> int:
        """Number of rows of the table, free ones included."""
        return len(self.owner)

    def _prefill(self, indices: list[int]) -> tuple[GrowingCache, Tensor, Tensor, Tensor | None]:
        """Run prompts and draw their first tokens: (cache, history [B, L], tokens [B], log-probabilities)."""
        width = max(len(self.prompts[index]) for index in indices)
        history = torch.tensor(
            [[PAD] * (width - len(self.prompts[index])) + list(self.prompts[index]) for index in indices],
            device=self.device,
        )
        mask = history != PAD
        cache = GrowingCache(self.num_layers, width)
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
        logits: Tensor = output.logits[:, -1, : self.vocab].float()
        return logits

    def _uniforms(self, indices: list[int]) -> Tensor:
        # One number more than tokens: a finished row that waits for its successor goes on drawing.
        numbers = [self.numbers[index] for index in indices]
        return uniforms(self.seed, numbers, self.sampling.max_tokens + 1).to(self.device)

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
        free = self.rows - self.live
        if waiting and free >= self.rows * REFILL:
            self._refill([waiting.popleft() for _ in range(min(free, len(waiting)))])
            return True
        if not waiting and free >= self.rows * DROP:
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
        """Put new prompts, in order of falling length, into rows that are free."""
        for group in similar(indices, self.prompts):
            chosen = (~self.alive).nonzero().squeeze(1)[: len(group)]
            cache, history, first, logprobs = self._prefill(group)
            self.cache.put(chosen, cache)
            start = self.now - history.shape[1]
            self.history[chosen, :start] = PAD
            self.history[chosen, start : self.now] = history
            self.history[chosen, self.now] = first
            self.visible[chosen, : self.now] = self.history[chosen, : self.now] != PAD
            if logprobs is not None:
                self.logprobs[chosen, self.now] = logprobs
            lengths = [len(self.prompts[index]) for index in group]
            self.position[chosen] = torch.tensor(lengths, device=self.device)
            self.generated[chosen] = 1
            self.uniform[chosen] = self._uniforms(group)
            self.alive[chosen] = True
            for row, index, length in zip(chosen.tolist(), group, lengths, strict=True):
                self.owner[row] = index
                self.first_column[row] = self.now - length
            self.live += len(group)
        self._settle(self.history[:, self.now])


def similar(indices: list[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Split prompts of falling length into groups of which little is padding, each worth a forward pass.

    A group ends where a prompt is shorter than 3/4 of its longest, once it holds `GROUP_TOKENS`.
    """
    groups: list[list[int]] = []
    widest = 0
    for index in indices:
        length = len(prompts[index])
        if not groups or (length < widest * 3 / 4 and len(groups[-1]) * widest >= GROUP_TOKENS):
            groups.append([])
            widest = length
        groups[-1].append(index)
    return groups
