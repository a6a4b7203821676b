"""One decoding step over buffers of fixed shape, which a CUDA graph can replay.

A row has its own slots: its text starts at slot 0 and grows to the right, so that a row is refilled without
regard to the others, and a row that is finished stays as it is. The step reads nothing from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from stillhouse.engines.base import Sampling
from stillhouse.engines.prefill import NextTokenLogits, Prefilled
from stillhouse.engines.sampling import PAD, Sampler
from stillhouse.engines.slot_cache import SlotCache


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """The state of B rows of at most `capacity` tokens; all of it is written in place."""

    cache: SlotCache
    """Keys and values of all tokens but each row's last."""
    history: Tensor
    """[B, capacity + 1] token ids of prompt and response, then `PAD`."""
    logprobs: Tensor
    """[B, capacity + 1] of the response's tokens, where asked for."""
    uniform: Tensor
    """[B, capacity + 1] the random number of each response token."""
    last: Tensor
    """[B] the slot of the row's last token; the cache writes there."""
    offset: Tensor
    """[B] what is added to the slot of a token to give its position; not 0 after images with M-RoPE."""
    generated: Tensor
    """[B] response tokens."""
    finished: Tensor
    """[B] whether the row's text is complete, or the row is free."""
    invalid: Tensor
    """[B] whether a row had no token to sample."""

    @classmethod
    def allocate(cls, example: Prefilled, rows: int, capacity: int) -> DecodeBuffers:
        """Free rows, for a model that fills caches like those of `example`."""
        device = example.history.device
        last, offset, generated = torch.zeros(3, rows, dtype=torch.long, device=device)
        finished = torch.ones(rows, dtype=torch.bool, device=device)
        shape = (rows, capacity + 1)
        return cls(
            SlotCache.like(example.cache, rows, capacity, last),
            torch.full(shape, PAD, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            last,
            offset,
            generated,
            finished,
            torch.zeros_like(finished),
        )

    @property
    def rows(self) -> int:
        """Rows, free ones included."""
        return len(self.last)

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.history.shape[1] - 1

    def _tensors(self) -> dict[str, Tensor]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "cache"}

    def view(self, rows: int, capacity: int) -> DecodeBuffers:
        """The first rows and slots, in the same storage."""
        parts: dict[str, Any] = {
            name: tensor[:rows, : capacity + 1] if tensor.ndim == 2 else tensor[:rows]
            for name, tensor in self._tensors().items()
        }
        return DecodeBuffers(self.cache.view(rows, capacity), **parts)

    def fill(
        self, rows: list[int], done: Prefilled, uniform: Tensor, sampling: Sampling, eos: Tensor
    ) -> None:
        """Put prompts with their first tokens into rows.

        Args:
            rows: which rows, one for each prompt.
            done: the prompts.
            uniform: [len(rows), n] their random numbers.
            sampling: its `max_tokens` ends a text.
            eos: the tokens that end a text.
        """
        device, width = self.last.device, done.history.shape[1]
        at = torch.tensor(rows, device=device)
        length = (done.history != PAD).sum(1)
        column = torch.arange(width, device=device) + (width - length)[:, None]
        columns = column.clamp(max=width - 1)
        self.cache.write_rows(at, done.cache, columns)
        self.history[at] = PAD
        self.history[at, :width] = done.history.gather(1, columns).masked_fill(column >= width, PAD)
        self.history[at, length] = done.tokens
        if done.logprobs is not None:
            self.logprobs[at, length] = done.logprobs
        self.uniform[at, : uniform.shape[1]] = uniform
        self.last[at] = length
        self.offset[at] = torch.tensor(done.next_positions, device=device) - length
        self.generated[at] = 1
        self.finished[at] = _is_end(done.tokens, eos) | (sampling.max_tokens <= 1)

    def free(self, rows: Tensor | slice) -> None:
        """Nobody's rows, which read and write slot 0 only, however few slots a view has."""
        self.finished[rows] = True
        self.invalid[rows] = False
        self.last[rows] = 0
        self.offset[rows] = 0
        self.generated[rows] = 0

    def move_rows(self, rows: list[int]) -> None:
        """Move these rows to the front and free the others."""
        at = torch.tensor(rows, device=self.last.device)
        self.cache.move_rows(at)
        for tensor in self._tensors().values():
            tensor[: len(rows)] = tensor[at]
        self.free(slice(len(rows), None))


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A token more for every row that is not finished.

    Example:
        >>> step = DecodeStep(next_logits, SlotMasks(config, dtype), sampler, eos, max_tokens=256)
        >>> step(buffers)
    """

    next_logits: NextTokenLogits
    masks: Callable[[SlotCache], Any]
    """`SlotMasks` or alike."""
    sampler: Sampler
    """One that is `static`."""
    eos: Tensor
    max_tokens: int

    def logits(self, buffers: DecodeBuffers) -> Tensor:
        """The logits [B, V] after each row's last token, whose keys and values are written."""
        ids = buffers.history.gather(1, buffers.last[:, None]).clamp(min=0)  # free rows hold PAD
        mask = self.masks(buffers.cache)
        return self.next_logits(ids, mask, (buffers.last + buffers.offset)[:, None], buffers.cache)

    def __call__(self, buffers: DecodeBuffers) -> None:
        """Sample for every row; write where the row is not finished."""
        b = buffers
        uniform = b.uniform.gather(1, b.generated[:, None]).squeeze(1)
        tokens, logprobs, valid = self.sampler.draw(self.logits(b), b.history, b.generated, uniform, b.last)
        going = ~b.finished
        place = b.last[:, None] + 1
        for buffer, new in ((b.history, tokens), (b.logprobs, logprobs)):
            if new is not None:
                old = buffer.gather(1, place).squeeze(1)
                buffer.scatter_(1, place, torch.where(going, new, old)[:, None])
        b.invalid.logical_or_(going & ~valid)
        b.last.add_(going)
        b.generated.add_(going)
        b.finished.logical_or_(_is_end(tokens, self.eos)).logical_or_(b.generated >= self.max_tokens)


def _is_end(tokens: Tensor, eos: Tensor) -> Tensor:
    return (tokens[:, None] == eos).any(1)
