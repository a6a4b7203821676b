"""Continuous batching with a decoding step of fixed shape: the host only starts steps and refills rows."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.core.images import ImageRef
from stillhouse.core.types import Completion
from stillhouse.engines.base import Sampling, TokenizerInfo
from stillhouse.engines.cuda_graphs import CastWeights, CudaGraphs, EagerSteps, Replay, addresses
from stillhouse.engines.decode import CompletionCallback
from stillhouse.engines.prefill import NextTokenLogits, Prefilled, group_by_length, prefill
from stillhouse.engines.sampling import NothingToSample, Sampler, uniforms
from stillhouse.engines.slot_cache import SlotMasks
from stillhouse.engines.static_probe import why_not_static
from stillhouse.engines.static_step import DecodeBuffers, DecodeStep
from stillhouse.engines.transformers import SLOTS, buffer_rows, buffer_slots, power_of_two

logger = logging.getLogger("stillhouse")

CHECK_EVERY = 8
"""Steps between two looks at which rows are finished: a look waits for the device, a step does not."""

REFILL_FRACTION = 1 / 4
"""Fraction of the rows that must be free before they are refilled: a prefill takes as long as many steps."""

MIN_PREFILL_TOKENS = 4096
"""As `prefill.MIN_PREFILL_TOKENS`, on a GPU, where a small prefill takes no less time than a larger one."""

MIN_ROWS = 32
"""A batch is not made smaller than this: for fewer rows a step takes as long."""


class StaticDecoder:
    """Generates with `DecodeStep`; keeps its buffers, and what `replay` makes of them, between calls.

    Example:
        >>> decoder = StaticDecoder(model, TokenizerInfo((2,), 2), num_layers=12)
        >>> if decoder.why_not([5, 9]) is None:
        ...     decoder.run([[5, 9], [7]], Sampling(), 0, 2, lambda index, completion: print(completion))
    """

    def __init__(self, model: nn.Module, tokenizer_info: TokenizerInfo, num_layers: int) -> None:
        self.model = model
        self.tokenizer_info = tokenizer_info
        self.num_layers = num_layers
        self.next_logits = NextTokenLogits(model, tokenizer_info.vocab_size)
        self.device = self.next_logits.device
        self.replay: Replay = CudaGraphs(self.device) if self.device.type == "cuda" else EagerSteps()
        self.cast_weights = CastWeights(model)
        self.addresses = addresses(model)
        self.masks = SlotMasks.of(model)
        self.eos = torch.tensor(tokenizer_info.eos_ids, dtype=torch.long, device=self.device)
        self.buffers: DecodeBuffers | None = None

    def why_not(self, prompt: Sequence[int]) -> str | None:
        """Why the model cannot decode this way, tried on the beginning of a prompt; None if it can."""
        with self.cast_weights.recorded():
            return why_not_static(self.next_logits, self.masks, self.num_layers, self.tokenizer_info, prompt)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        rows: int,
        on_completion: CompletionCallback,
        sample_ids: Sequence[int] | None = None,
        images: Sequence[tuple[ImageRef, ...]] = (),
    ) -> None:
        """Complete all prompts with a batch of at most `rows`.

        `sample_ids` and `images` are as in `Engine.generate`.
        """
        self.prompts, self.sampling, self.seed, self.on_completion = prompts, sampling, seed, on_completion
        self.images = images
        self.sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
        self.first = Sampler(sampling, self.eos)
        self.step = DecodeStep(
            self.next_logits,
            self.masks,
            Sampler(sampling, self.eos, static=True),
            self.eos,
            sampling.max_tokens,
        )
        self.cast_weights.refresh()
        waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        self.capacity = buffer_slots(len(prompts[waiting[0]]) + sampling.max_tokens)
        self.running: list[int | None] = [None] * buffer_rows(len(prompts), rows)
        if self.buffers is not None:
            self.buffers.free(slice(None))  # an error may have left some in use
        with self.cast_weights.in_place():
            self._decode(waiting)

    def _decode(self, waiting: deque[int]) -> None:
        while waiting or any(index is not None for index in self.running):
            free = [row for row, index in enumerate(self.running) if index is None]
            if waiting and len(free) >= len(self.running) * REFILL_FRACTION:
                self._refill(free, [waiting.popleft() for _ in range(min(len(free), len(waiting)))])
            elif not waiting:
                self._compact()
            self._steps()

    def _refill(self, free: list[int], indices: list[int]) -> None:
        """Prefill prompts of decreasing length into free rows."""
        for group in group_by_length(indices, self.prompts, MIN_PREFILL_TOKENS):
            rows, free = free[: len(group)], free[len(group) :]
            sample_ids = [self.sample_ids[index] for index in group]
            # One more than max_tokens: a finished row goes on reading until it is refilled.
            uniform = uniforms(self.seed, sample_ids, self.sampling.max_tokens + 1).to(self.device)
            done = prefill(
                self.next_logits,
                self.first,
                [self.prompts[index] for index in group],
                uniform[:, 0],
                self.num_layers,
                self.tokenizer_info,
                [self.images[index] for index in group] if self.images else (),
            )
            buffers = self._room(done)
            buffers.fill(rows, done, uniform, self.sampling, self.eos)
            for row, index in zip(rows, group, strict=True):
                self.running[row] = index

    def _room(self, example: Prefilled) -> DecodeBuffers:
        """The buffers; larger ones if this run, which has not begun, needs more rows or slots."""
        rows, capacity, old = len(self.running), self.capacity, self.buffers
        if old is not None and old.rows >= rows and old.capacity >= capacity:
            return old
        if old is not None:
            rows, capacity = max(rows, old.rows), max(capacity, old.capacity)
            self.buffers = old = None  # its memory is free for the new ones
            self.replay.forget()
        self.buffers = DecodeBuffers.allocate(example, rows, capacity)
        return self.buffers

    def _compact(self) -> None:
        """Halve the batch as long as half of its rows are free."""
        assert self.buffers is not None
        used = [row for row, index in enumerate(self.running) if index is not None]
        rows = len(self.running)
        while rows // 2 >= MIN_ROWS and len(used) <= rows // 2:
            rows //= 2
        if rows < len(self.running):
            self.buffers.move_rows(used)
            self.running = [self.running[row] for row in used] + [None] * (rows - len(used))

    def _steps(self) -> None:
        """Some steps, then a look at the rows: report texts that are complete and free their rows."""
        buffers = self.buffers
        assert buffers is not None
        last, generated, finished = self._look(buffers)
        going = [row for row, index in enumerate(self.running) if index is not None and not finished[row]]
        if going:
            most = self.sampling.max_tokens - min(generated[row] for row in going)
            steps = min(CHECK_EVERY, most)
            need = max(last[row] for row, index in enumerate(self.running) if index is not None) + steps + 1
            capacity = min(buffers.capacity, max(SLOTS, power_of_two(need)))
            rows = len(self.running)
            view, step = buffers.view(rows, capacity), self.step
            for _ in range(steps):
                self.replay((rows, capacity, self.sampling), lambda: step(view))
            last, generated, finished = self._look(buffers)
        self._release(buffers, last, generated, finished)

    def _look(self, buffers: DecodeBuffers) -> tuple[list[int], list[int], list[int]]:
        """The slot of the last token, the response tokens and whether it is finished, for each row."""
        state = torch.stack([buffers.last, buffers.generated, buffers.finished, buffers.invalid])
        last, generated, finished, invalid = state[:, : len(self.running)].tolist()
        if any(invalid):
            raise NothingToSample
        return last, generated, finished

    def _release(
        self, buffers: DecodeBuffers, last: list[int], generated: list[int], finished: list[int]
    ) -> None:
        """Report the texts of finished rows and free these."""
        done = [row for row, index in enumerate(self.running) if index is not None and finished[row]]
        if not done:
            return
        at = torch.tensor(done, device=self.device)
        history, logprobs = _to_host(buffers.history, at), _to_host(buffers.logprobs, at)
        for place, row in enumerate(done):
            index = self.running[row]
            assert index is not None
            response = slice(last[row] + 1 - generated[row], last[row] + 1)
            tokens = tuple(history[place][response])
            scores = tuple(logprobs[place][response]) if self.sampling.logprobs else None
            self.on_completion(index, Completion(tokens, tokens[-1] in self.tokenizer_info.eos_ids, scores))
            self.running[row] = None
        buffers.free(at)


class StaticDecoding:
    """The static decoder of a model, where it is wanted and there is one.

    Example:
        >>> static = StaticDecoding(tokenizer_info, "auto")
        >>> if (decoder := static.decoder(model, 12, [[5, 9]], trained=True)) is not None:
        ...     decoder.run([[5, 9]], Sampling(), 0, 1, on_completion)
    """

    def __init__(self, tokenizer_info: TokenizerInfo, kv_cache: Literal["auto", "growing", "static"]) -> None:
        self.tokenizer_info = tokenizer_info
        self.kv_cache = kv_cache
        self.refused = False
        self._decoder: StaticDecoder | None = None

    def wanted(self, model: nn.Module) -> bool:
        """Whether a model is to decode so: `auto` is for CUDA."""
        on_cuda = next(model.parameters()).device.type == "cuda"
        return not self.refused and (self.kv_cache == "static" or (self.kv_cache == "auto" and on_cuda))

    def decoder(
        self,
        model: nn.Module,
        num_layers: int | None,
        prompts: Sequence[Sequence[int]],
        trained: bool,
    ) -> StaticDecoder | None:
        """The model's decoder; None where another is to be used, of which a line says why, once.

        It is kept if the model is `trained`: one that is not writes many texts in few calls, and the memory
        is worth more than the time to set it up again.
        """
        if not self.wanted(model):
            return None
        old = self._decoder
        if old is not None and old.model is model and old.addresses == addresses(model):
            return old
        self._decoder, made, reason = None, None, "its layers are not all attention"
        if num_layers is not None:
            made = StaticDecoder(model, self.tokenizer_info, num_layers)
            reason = made.why_not(max(prompts, key=len)) or ""
        if reason:
            self.refused = True
            logger.warning(
                "engine: %s decodes with a growing cache, without CUDA graphs: %s",
                type(model).__name__,
                reason,
            )
            return None
        self._decoder = made if trained else None
        return made


def _to_host(buffer: Tensor, rows: Tensor) -> list[list[Any]]:
    found: list[list[Any]] = buffer[rows].tolist()
    return found
