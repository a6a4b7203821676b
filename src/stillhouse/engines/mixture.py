"""Text from two models at once: each token is drawn from a mixture of their distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from stillhouse.core.types import Completion
from stillhouse.engines.base import Finished, ProgressCall, Sampling, TokenizerFacts
from stillhouse.engines.decode import Decoder
from stillhouse.engines.kv import num_attention_layers
from stillhouse.engines.transformers import check_prompts, evaluating
from stillhouse.errors import EngineError
from stillhouse.models.hidden import unwrap


class Mixture(nn.Module):
    """A model whose next token comes from (1 - share) q + share p, q of the student and p of the teacher.

    Its cache holds the layers of the student, then those of the teacher.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, share: float, vocab: int) -> None:
        """Put two models that share the first `vocab` token ids side by side."""
        super().__init__()
        self.models = nn.ModuleList([unwrap(student), unwrap(teacher)])
        self.share = share
        self.vocab = vocab
        self.config: Any = unwrap(student).config
        layers = [num_attention_layers(unwrap(model).config) for model in (student, teacher)]
        if None in layers:
            raise EngineError(
                "text that student and teacher write together needs models whose layers are all attention; "
                "set responses.teacher_share: 0."
            )
        self.num_layers: list[int] = [count for count in layers if count is not None]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Cache,
        position_ids: Tensor,
        use_cache: bool = True,
    ) -> CausalLMOutputWithPast:
        """Log-probabilities of the mixture as logits [B, 1, vocab]."""
        first = self.num_layers[0]
        layers = (past_key_values.layers[:first], past_key_values.layers[first:])
        with torch.autocast(input_ids.device.type, enabled=False):  # each enters its own, if it has one
            log_probs = [
                model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=Cache(layers=part),
                    use_cache=use_cache,
                    logits_to_keep=1,
                )
                .logits[..., : self.vocab]
                .float()
                .log_softmax(-1)
                for model, part in zip(self.models, layers, strict=True)
            ]
        shares = torch.tensor([1 - self.share, self.share], device=input_ids.device).log()
        mixed = torch.logaddexp(log_probs[0] + shares[0], log_probs[1] + shares[1])
        return CausalLMOutputWithPast(logits=mixed)


class MixtureEngine:
    """Samples from the mixture of two models.

    Example:
        >>> engine = MixtureEngine(Mixture(student, teacher, share=0.2, vocab=49152), facts)
        >>> engine.generate([[5, 9, 12]], Sampling(max_tokens=20), seed=0)
    """

    def __init__(self, mixture: Mixture, facts: TokenizerFacts, batch_size: int = 64) -> None:
        self.mixture = mixture
        self.facts = facts
        self.batch_size = batch_size

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        numbers: Sequence[int] | None = None,
        progress: ProgressCall | None = None,
    ) -> list[Completion]:
        """One completion for each prompt; see `Engine.generate`. The sampling acts on the mixture."""
        for model in self.mixture.models:
            check_prompts(prompts, sampling, model.config)
        finish = Finished(len(prompts), progress)
        with evaluating(self.mixture):
            decoder = Decoder(self.mixture, self.facts, sampling, seed, sum(self.mixture.num_layers))
            decoder.run(prompts, self.batch_size, finish, numbers)
        return finish.in_order()
