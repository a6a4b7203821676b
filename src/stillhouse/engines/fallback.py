"""Generation through transformers' own `generate`, for architectures that the decode loop does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from stillhouse.core.types import Completion
from stillhouse.engines.base import Sampling, TokenizerFacts
from stillhouse.engines.sampling import Sampler, uniforms


def run_generate(
    model: nn.Module,
    facts: TokenizerFacts,
    sampling: Sampling,
    seed: int,
    prompts: Sequence[Sequence[int]],
    rows: int,
    finish: Callable[[int, Completion], None],
    numbers: Sequence[int] | None = None,
) -> None:
    """Complete all prompts, at most `rows` at a time; `numbers` as in `Engine.generate`.

    Only prompts of equal length share a batch: a recurrent state must not see padding.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), rows):
            batch = indices[start : start + rows]
            uniform = uniforms(seed, [numbers[index] for index in batch], sampling.max_tokens)
            _batch(model, facts, sampling, uniform, prompts, batch, finish)


def _batch(
    model: Any,
    facts: TokenizerFacts,
    sampling: Sampling,
    uniform: Tensor,
    prompts: Sequence[Sequence[int]],
    indices: list[int],
    finish: Callable[[int, Completion], None],
) -> None:
    device = next(model.parameters()).device
    drawing = _Drawing(
        Sampler(sampling, torch.tensor(facts.eos_ids, dtype=torch.long, device=device)),
        uniform.to(device),
        len(prompts[indices[0]]),
        facts.vocab,
    )
    inputs = torch.tensor([list(prompts[index]) for index in indices], device=device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_tokens,
        eos_token_id=list(facts.eos_ids) or None,
        pad_token_id=facts.pad_id,
    )
    # What the model's own generation_config says (a repetition penalty, say) must not leak into ours.
    kept, model.generation_config = model.generation_config, config
    try:
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            logits_processor=[drawing],
        )
    finally:
        model.generation_config = kept
    written = output[:, inputs.shape[1] :].tolist()
    logprobs = torch.stack(drawing.logprobs, 1).tolist() if drawing.logprobs else None
    for row, index in enumerate(indices):
        tokens = written[row]
        end = next((place for place, token in enumerate(tokens) if token in facts.eos_ids), None)
        length = len(tokens) if end is None else end + 1
        told = tuple(logprobs[row][:length]) if logprobs else None
        finish(index, Completion(tuple(tokens[:length]), end is not None, told))


class _Drawing:
    """A logits processor that draws the token itself and leaves only that one to choose."""

    def __init__(self, sampler: Sampler, uniform: Tensor, prompt_length: int, vocab: int | None) -> None:
        self.sampler = sampler
        self.uniform = uniform
        self.prompt_length = prompt_length
        self.vocab = vocab
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.prompt_length
        generated = torch.full((len(scores),), place, device=scores.device)
        tokens, logprobs = self.sampler.draw(
            scores[:, : self.vocab], input_ids, generated, self.uniform[:, place]
        )
        if logprobs is not None:
            self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
