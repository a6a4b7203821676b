"""Generation with transformers' own `generate`, for architectures that the decode loop does not support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from stillhouse.core.images import ImageRef
from stillhouse.core.types import Completion
from stillhouse.engines.base import Sampling, TokenizerInfo
from stillhouse.engines.decode import CompletionCallback
from stillhouse.engines.images import image_inputs, image_token
from stillhouse.engines.sampling import Sampler, uniforms
from stillhouse.models.vision import reader_of


class GenerateDecoder:
    """Generates completions with the model's own `generate`, whatever its layers are.

    Example: as `Decoder`, without its `num_layers`.
    """

    def __init__(
        self, model: nn.Module, tokenizer_info: TokenizerInfo, sampling: Sampling, seed: int
    ) -> None:
        self.model: Any = model
        self.tokenizer_info = tokenizer_info
        self.sampling = sampling
        self.seed = seed
        self.device = next(model.parameters()).device

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        rows: int,
        on_completion: CompletionCallback,
        sample_ids: Sequence[int] | None = None,
        images: Sequence[tuple[ImageRef, ...]] = (),
    ) -> None:
        """Complete all prompts in batches of at most `rows`.

        Only prompts of equal length share a batch: a recurrent state must not see padding. `sample_ids` and
        `images` are as in `Engine.generate`.
        """
        sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        for indices in by_length.values():
            for start in range(0, len(indices), rows):
                batch = indices[start : start + rows]
                uniform = uniforms(
                    self.seed, [sample_ids[index] for index in batch], self.sampling.max_tokens
                )
                shown = [images[index] for index in batch] if images else []
                completions = self._generate([prompts[index] for index in batch], shown, uniform)
                for index, completion in zip(batch, completions, strict=True):
                    on_completion(index, completion)

    def _generate(
        self, prompts: Sequence[Sequence[int]], images: Sequence[tuple[ImageRef, ...]], uniform: Tensor
    ) -> list[Completion]:
        """The completions of prompts of equal length."""
        model, info, sampling = self.model, self.tokenizer_info, self.sampling
        eos = torch.tensor(info.eos_ids, dtype=torch.long, device=self.device)
        processor = _SamplingProcessor(
            Sampler(sampling, eos),
            uniform.to(self.device),
            len(prompts[0]),
            info.vocab_size,
            image_token(model),
        )
        inputs = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(info.eos_ids) or None,
            pad_token_id=info.pad_id,
        )
        # The model's own generation_config (a repetition penalty, say) must not leak into ours.
        original, model.generation_config = model.generation_config, config
        try:
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                logits_processor=[processor],
                **self._images(prompts, images),
            )
        finally:
            model.generation_config = original
        logprobs = torch.stack(processor.logprobs, 1).tolist() if processor.logprobs else None
        completions = []
        for row, tokens in enumerate(output[:, inputs.shape[1] :].tolist()):
            end = next((at for at, token in enumerate(tokens) if token in info.eos_ids), None)
            length = len(tokens) if end is None else end + 1
            row_logprobs = tuple(logprobs[row][:length]) if logprobs else None
            completions.append(Completion(tuple(tokens[:length]), end is not None, row_logprobs))
        return completions

    def _images(
        self, prompts: Sequence[Sequence[int]], images: Sequence[tuple[ImageRef, ...]]
    ) -> dict[str, Any]:
        """What `generate` is called with for images; positions with several parts it finds itself."""
        if not any(images):
            return {}
        arguments = image_inputs(self.model, prompts, images, len(prompts[0])).arguments
        reader = reader_of(self.model)
        if reader is not None and arguments.pop("position_ids", None) is not None:
            ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
            arguments["mm_token_type_ids"] = (ids == reader.image_id).long()
        return arguments


class _SamplingProcessor:
    """A logits processor that samples the token itself and masks all others."""

    def __init__(
        self,
        sampler: Sampler,
        uniform: Tensor,
        prompt_length: int,
        vocab_size: int | None,
        never: int | None,
    ) -> None:
        self.sampler = sampler
        self.never = never
        self.uniform = uniform
        self.prompt_length = prompt_length
        self.vocab_size = vocab_size
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        generated = torch.full((len(scores),), position, device=scores.device)
        if self.never is not None:
            scores[:, self.never] = -torch.inf
        tokens, logprobs = self.sampler.sample(
            scores[:, : self.vocab_size], input_ids, generated, self.uniform[:, position]
        )
        if logprobs is not None:
            self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
