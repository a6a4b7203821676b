"""Generation from a mixture of two models: each token is sampled from the mixture of their distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from stillhouse.core.images import ImageRef
from stillhouse.core.types import Completion
from stillhouse.engines.base import CompletionCollector, Engine, ProgressCallback, Sampling, TokenizerInfo
from stillhouse.engines.decode import Decoder
from stillhouse.engines.images import ImageInputs, image_inputs
from stillhouse.engines.kv_cache import num_attention_layers
from stillhouse.engines.slot_cache import SlotCache, SlotMask, SlotMasks
from stillhouse.engines.static_decode import StaticDecoding
from stillhouse.engines.transformers import KvCache, TransformersEngine, check_prompts, evaluating, is_trained
from stillhouse.errors import EngineError, ModelError
from stillhouse.models.hidden import unwrap

ALONE = (
    "Responses that student and teacher generate together need images of as many tokens for both; set "
    "responses.teacher_share: 0."
)


class MixtureModel(nn.Module):
    """A model with the next-token distribution (1 - share) q + share p; q is the student's, p the teacher's.

    Its KV cache holds the layers of the student, then those of the teacher.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, share: float, vocab_size: int) -> None:
        """A mixture of two models over the first `vocab_size` token ids, which both share.

        Raises:
            EngineError: one of the architectures has layers other than attention.
        """
        super().__init__()
        self.models = nn.ModuleList([unwrap(student), unwrap(teacher)])
        self.share = share
        self.vocab_size = vocab_size
        self.config: Any = unwrap(student).config
        layers = [num_attention_layers(unwrap(model).config) for model in (student, teacher)]
        if None in layers:
            raise EngineError(
                "responses that student and teacher generate together need models whose layers are all "
                "attention; set responses.teacher_share: 0."
            )
        self.num_layers: list[int] = [count for count in layers if count is not None]
        device = next(self.models[0].parameters()).device
        self.log_shares: Tensor
        self.register_buffer("log_shares", torch.tensor([1 - share, share], device=device).log())

    def slot_masks(self, cache: SlotCache) -> list[SlotMask]:
        """As `SlotMasks`, a mask for each model."""
        first = self.num_layers[0]
        parts = [SlotCache(layers, cache.slots) for layers in (cache.layers[:first], cache.layers[first:])]
        return [SlotMasks(model.config)(part) for model, part in zip(self.models, parts, strict=True)]

    def image_inputs(
        self, prompts: Sequence[Sequence[int]], images: Sequence[tuple[ImageRef, ...]], width: int
    ) -> ImageInputs:
        """As `engines.images.image_inputs`, those of each model through its own processor.

        Raises:
            EngineError: the images take other tokens or positions of one model than of the other.
        """
        try:
            parts = [image_inputs(model, prompts, images, width) for model in self.models]
        except ModelError as error:
            raise EngineError(f"{error} {ALONE}") from error
        if parts[0].next_positions != parts[1].next_positions:
            raise EngineError(f"the positions after an image are not those of the teacher. {ALONE}")
        return ImageInputs({"images": [part.arguments for part in parts]}, parts[0].next_positions)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | list[SlotMask],
        past_key_values: Cache,
        position_ids: Tensor,
        use_cache: bool = True,
        images: Sequence[dict[str, Any]] = ({}, {}),
    ) -> CausalLMOutputWithPast:
        """The log-probabilities of the mixture as logits [B, 1, vocab_size].

        `attention_mask` is for both models, or a list of one for each; `images` has further arguments of
        each.
        """
        first = self.num_layers[0]
        layers = (past_key_values.layers[:first], past_key_values.layers[first:])
        masks = attention_mask if isinstance(attention_mask, list) else [attention_mask] * 2
        with torch.autocast(input_ids.device.type, enabled=False):  # each model enters its own, if it has one
            log_probs = [
                model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    past_key_values=Cache(layers=part),
                    use_cache=use_cache,
                    logits_to_keep=1,
                    **{"position_ids": position_ids, **own},
                )
                .logits[..., : self.vocab_size]
                .float()
                .log_softmax(-1)
                for model, part, mask, own in zip(self.models, layers, masks, images, strict=True)
            ]
        mixed = torch.logaddexp(log_probs[0] + self.log_shares[0], log_probs[1] + self.log_shares[1])
        return CausalLMOutputWithPast(logits=mixed)


class MixtureEngine:
    """Generates with a `MixtureModel`.

    Example:
        >>> model = MixtureModel(student, teacher, share=0.2, vocab_size=49152)
        >>> engine = MixtureEngine(model, tokenizer_info)
        >>> engine.generate([[5, 9, 12]], Sampling(max_tokens=20), seed=0)
    """

    def __init__(
        self,
        mixture: MixtureModel,
        tokenizer_info: TokenizerInfo,
        batch_size: int = 64,
        kv_cache: KvCache = "auto",
    ) -> None:
        self.mixture = mixture
        self.tokenizer_info = tokenizer_info
        self.batch_size = batch_size
        self.static = StaticDecoding(tokenizer_info, kv_cache)

    @classmethod
    def beside(cls, engine: Engine, mixture: MixtureModel, tokenizer_info: TokenizerInfo) -> MixtureEngine:
        """With batch size and KV cache of the student's engine, where that decodes in this process too."""
        if isinstance(engine, TransformersEngine):
            return cls(mixture, tokenizer_info, engine.batch_size, engine.kv_cache)
        return cls(mixture, tokenizer_info)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        sample_ids: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
        images: Sequence[tuple[ImageRef, ...]] = (),
    ) -> list[Completion]:
        """One completion for each prompt; see `Engine.generate`. `sampling` applies to the mixture."""
        for model in self.mixture.models:
            check_prompts(prompts, sampling, model.config)
        if not prompts:
            return []
        completions = CompletionCollector(len(prompts), progress)
        num_layers = sum(self.mixture.num_layers)
        with evaluating(self.mixture):
            trained = is_trained(self.mixture)
            if (static := self.static.decoder(self.mixture, num_layers, prompts, trained)) is not None:
                static.run(prompts, sampling, seed, self.batch_size, completions, sample_ids, images)
            else:
                decoder = Decoder(self.mixture, self.tokenizer_info, sampling, seed, num_layers)
                decoder.run(prompts, self.batch_size, completions, sample_ids, images)
        return completions.in_order()
