"""Continuous batching: a decode loop in which a finished row is refilled with the next prompt.

Columns are time: every row ends at the current column, so prompts are padded on the left. Prompts are taken
in order of decreasing length, so a new prompt always fits to the left of the current column.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stillhouse.core.images import ImageRef
from stillhouse.core.types import Completion
from stillhouse.engines.base import Sampling, TokenizerInfo
from stillhouse.engines.kv_cache import PreallocatedCache
from stillhouse.engines.prefill import NextTokenLogits, Prefilled, group_by_length, prefill
from stillhouse.engines.sampling import PAD, Sampler, uniforms

REFILL_FRACTION, COMPACT_FRACTION = 1 / 8, 1 / 4
"""Fractions of the rows that must be free before they are refilled, or removed when no prompt is waiting.

A refill costs about one step of overhead and compaction copies the cache, so neither is done for every row.
Half and twice these values measured the same.
"""

CompletionCallback = Callable[[int, Completion], None]
"""Called with (index of the prompt, its completion)."""


class Decoder:
    """Generates completions with a model whose layers are all attention.

    Example:
        >>> decoder = Decoder(model, TokenizerInfo((2,), 2), Sampling(), seed=0, num_layers=12)
        >>> decoder.run([[5, 9], [7]], rows=2, on_completion=lambda index, completion: print(completion))
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer_info: TokenizerInfo,
        sampling: Sampling,
        seed: int,
        num_layers: int,
    ) -> None:
        self.tokenizer_info = tokenizer_info
        self.sampling = sampling
        self.seed = seed
        self.num_layers = num_layers
        self.next_logits = NextTokenLogits(model, tokenizer_info.vocab_size)
        self.device = self.next_logits.device
        self.eos = torch.tensor(tokenizer_info.eos_ids, dtype=torch.long, device=self.device)
        self.sampler = Sampler(sampling, self.eos)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        rows: int,
        on_completion: CompletionCallback,
        sample_ids: Sequence[int] | None = None,
        images: Sequence[tuple[ImageRef, ...]] = (),
    ) -> None:
        """Complete all prompts with a batch of at most `rows`.

        `sample_ids` and `images` are as in `Engine.generate`.
        """
        self.prompts = prompts
        self.images = images
        self.sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
        self.on_completion = on_completion
        waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        while waiting:
            self._allocate(min(rows, len(waiting)), len(prompts[waiting[0]]))
            self._refill([waiting.popleft() for _ in range(self.rows)])
            while self.num_active:
                if not self._refill_or_compact(waiting):
                    self._step()

    def _allocate(self, rows: int, width: int) -> None:
        """Buffers for `rows` free rows, with the current column at `width`."""
        self.column = width
        self.capacity = width + self.sampling.max_tokens + max(16, width // 4)
        self.cache = PreallocatedCache(self.num_layers, self.capacity, rows, width)
        self.history = torch.full((rows, self.capacity + 1), PAD, device=self.device)
        self.attention_mask = torch.ones(rows, self.capacity, dtype=torch.bool, device=self.device)
        self.logprobs = torch.zeros(rows, self.capacity + 1, device=self.device)
        self.position = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.generated = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.uniform = self._uniforms([0] * rows)
        self.active = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.prompt_index = [0] * rows
        self.start_column = [0] * rows
        self.num_active = 0

    @property
    def rows(self) -> int:
        """Rows of the batch, free ones included."""
        return len(self.prompt_index)

    def _prefill(self, indices: list[int]) -> Prefilled:
        return prefill(
            self.next_logits,
            self.sampler,
            [self.prompts[index] for index in indices],
            self._uniforms(indices)[:, 0],
            self.num_layers,
            self.tokenizer_info,
            [self.images[index] for index in indices] if self.images else (),
        )

    def _uniforms(self, indices: list[int]) -> Tensor:
        # One more than max_tokens: a finished row keeps sampling until it is refilled.
        sample_ids = [self.sample_ids[index] for index in indices]
        return uniforms(self.seed, sample_ids, self.sampling.max_tokens + 1).to(self.device)

    def _step(self) -> None:
        """Sample one token for every row."""
        column = self.column
        ids = self.history[:, column, None]
        mask = self.attention_mask[:, : column + 1]
        logits = self.next_logits(ids, mask, self.position[:, None], self.cache)
        self.column = column + 1
        uniform = self.uniform.gather(1, self.generated[:, None]).squeeze(1)
        tokens, logprobs = self.sampler.sample(
            logits, self.history[:, : self.column], self.generated, uniform
        )
        self.history[:, self.column] = tokens
        if logprobs is not None:
            self.logprobs[:, self.column] = logprobs
        self.generated += 1
        self.position += 1
        self._release_finished(tokens)

    def _release_finished(self, tokens: Tensor) -> None:
        """Report the completions that end with `tokens` [B] and free their rows."""
        ended = torch.isin(tokens, self.eos)
        finished = (ended | (self.generated >= self.sampling.max_tokens)) & self.active
        if not bool(finished.any()):
            return
        for row in finished.nonzero().squeeze(1).tolist():
            index = self.prompt_index[row]
            start = self.start_column[row] + len(self.prompts[index])
            response = slice(start, self.column + 1)
            logprobs = tuple(self.logprobs[row, response].tolist()) if self.sampling.logprobs else None
            self.on_completion(
                index, Completion(tuple(self.history[row, response].tolist()), bool(ended[row]), logprobs)
            )
            self.num_active -= 1
        self.active &= ~finished
        self.generated.masked_fill_(finished, 0)
        self.position.masked_fill_(finished, 0)

    def _refill_or_compact(self, waiting: deque[int]) -> bool:
        """Refill or remove free rows where there are enough of them; True if a row was refilled."""
        free = self.rows - self.num_active
        if waiting and free >= self.rows * REFILL_FRACTION:
            self._refill([waiting.popleft() for _ in range(min(free, len(waiting)))])
            return True
        if not waiting and free >= self.rows * COMPACT_FRACTION:
            self._compact(self.active)
        elif self.column + 1 >= self.capacity:
            self._compact(torch.ones_like(self.active))
        return False

    def _unused_columns(self) -> int:
        """The number of columns on the left that no active row uses."""
        active = self.active.tolist()
        return min(start for start, used in zip(self.start_column, active, strict=True) if used)

    def _compact(self, keep: Tensor) -> None:
        """Keep only the rows in `keep` [B], and the columns that an active row uses."""
        rows = keep.nonzero().squeeze(1)
        start = self._unused_columns()
        self.cache.select_rows(rows, start)
        for name, fill in (("history", PAD), ("attention_mask", True), ("logprobs", 0.0)):
            old = getattr(self, name)[rows]
            new = torch.full_like(old, fill)
            new[:, : old.shape[1] - start] = old[:, start:]
            setattr(self, name, new)
        for name in ("position", "generated", "uniform", "active"):
            setattr(self, name, getattr(self, name)[rows])
        self.column -= start
        self.prompt_index = [self.prompt_index[row] for row in rows.tolist()]
        self.start_column = [self.start_column[row] - start for row in rows.tolist()]

    def _refill(self, indices: list[int]) -> None:
        """Prefill new prompts, in order of decreasing length, into free rows."""
        for group in group_by_length(indices, self.prompts):
            chosen = (~self.active).nonzero().squeeze(1)[: len(group)]
            done = self._prefill(group)
            self.cache.write_rows(chosen, done.cache)
            start = self.column - done.history.shape[1]
            self.history[chosen, :start] = PAD
            self.history[chosen, start : self.column] = done.history
            self.history[chosen, self.column] = done.tokens
            self.attention_mask[chosen, : self.column] = self.history[chosen, : self.column] != PAD
            if done.logprobs is not None:
                self.logprobs[chosen, self.column] = done.logprobs
            lengths = [len(self.prompts[index]) for index in group]
            self.position[chosen] = torch.tensor(done.next_positions, device=self.device)
            self.generated[chosen] = 1
            self.uniform[chosen] = self._uniforms(group)
            self.active[chosen] = True
            for row, index, length in zip(chosen.tolist(), group, lengths, strict=True):
                self.prompt_index[row] = index
                self.start_column[row] = self.column - length
            self.num_active += len(group)
        self._release_finished(self.history[:, self.column])
