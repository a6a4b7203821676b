"""Generation with transformers' own `generate`, for architectures that the decode loop does not support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from stillhouse.core.types import Completion
from stillhouse.engines.base import Sampling, TokenizerInfo
from stillhouse.engines.sampling import Sampler, uniforms


def run_generate(
    model: nn.Module,
    tokenizer_info: TokenizerInfo,
    sampling: Sampling,
    seed: int,
    prompts: Sequence[Sequence[int]],
    rows: int,
    on_completion: Callable[[int, Completion], None],
    sample_ids: Sequence[int] | None = None,
) -> None:
    """Complete all prompts in batches of at most `rows`; `sample_ids` as in `Engine.generate`.

    Only prompts of equal length share a batch: a recurrent state must not see padding.
    """
    sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), rows):
            batch = indices[start : start + rows]
            uniform = uniforms(seed, [sample_ids[index] for index in batch], sampling.max_tokens)
            _generate_batch(model, tokenizer_info, sampling, uniform, prompts, batch, on_completion)


def _generate_batch(
    model: Any,
    tokenizer_info: TokenizerInfo,
    sampling: Sampling,
    uniform: Tensor,
    prompts: Sequence[Sequence[int]],
    indices: list[int],
    on_completion: Callable[[int, Completion], None],
) -> None:
    device = next(model.parameters()).device
    processor = _SamplingProcessor(
        Sampler(sampling, torch.tensor(tokenizer_info.eos_ids, dtype=torch.long, device=device)),
        uniform.to(device),
        len(prompts[indices[0]]),
        tokenizer_info.vocab_size,
    )
    inputs = torch.tensor([list(prompts[index]) for index in indices], device=device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_tokens,
        eos_token_id=list(tokenizer_info.eos_ids) or None,
        pad_token_id=tokenizer_info.pad_id,
    )
    # The model's own generation_config (a repetition penalty, say) must not leak into ours.
    original, model.generation_config = model.generation_config, config
    try:
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            logits_processor=[processor],
        )
    finally:
        model.generation_config = original
    responses = output[:, inputs.shape[1] :].tolist()
    logprobs = torch.stack(processor.logprobs, 1).tolist() if processor.logprobs else None
    for row, index in enumerate(indices):
        tokens = responses[row]
        end = next((at for at, token in enumerate(tokens) if token in tokenizer_info.eos_ids), None)
        length = len(tokens) if end is None else end + 1
        row_logprobs = tuple(logprobs[row][:length]) if logprobs else None
        on_completion(index, Completion(tuple(tokens[:length]), end is not None, row_logprobs))


class _SamplingProcessor:
    """A logits processor that samples the token itself and masks all others."""

    def __init__(self, sampler: Sampler, uniform: Tensor, prompt_length: int, vocab_size: int | None) -> None:
        self.sampler = sampler
        self.uniform = uniform
        self.prompt_length = prompt_length
        self.vocab_size = vocab_size
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        generated = torch.full((len(scores),), position, device=scores.device)
        tokens, logprobs = self.sampler.sample(
            scores[:, : self.vocab_size], input_ids, generated, self.uniform[:, position]
        )
        if logprobs is not None:
            self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
