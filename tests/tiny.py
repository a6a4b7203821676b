"""Models and responses small enough for any test: random weights, token ids without a tokenizer."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.core.types import Prompt, Response, Source

VOCAB = 61
END = 1
PAD = 0


def model(
    seed: int, *, width: int = 16, layers: int = 2, dtype: torch.dtype = torch.float32, **more: Any
) -> nn.Module:
    """A Llama with random weights, a bit larger than usual so that distributions are not flat."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=more.pop("vocab_size", VOCAB),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=more.pop("max_position_embeddings", 128),
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        **more,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of 2 to 9 tokens with responses of 1 to 12, end included."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        ids = tuple(rng.randrange(2, VOCAB) for _ in range(rng.randint(2, 9)))
        answer = (*(rng.randrange(2, VOCAB) for _ in range(rng.randint(0, 11))), END)
        made.append(Prompt(f"train:{index}", ids, text=str(ids), response_ids=answer, references=("x",)))
    return made


def responses(count: int, seed: int = 0, sources: tuple[Source, ...] = ("fixed",)) -> list[Response]:
    """Responses of the given sources, in turn."""
    made = []
    for index, prompt in enumerate(prompts(count, seed)):
        assert prompt.response_ids is not None
        made.append(Response(prompt, prompt.response_ids, sources[index % len(sources)]))
    return made
