"""Tiny models of real architectures, with weights large enough that their distributions are not flat."""

from __future__ import annotations

import random

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.engines import TokenizerInfo

VOCAB = 67
TOKENIZER_INFO = TokenizerInfo(eos_ids=(2,), pad_id=0)

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": TINY,
    "qwen3": {**TINY, "head_dim": 8},
    "mistral": {**TINY, "sliding_window": 8},
    "gemma3_text": {
        **TINY, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "gpt_neox": {k: v for k, v in TINY.items() if k != "num_key_value_heads"},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": 96,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}  # fmt: skip


def tiny(kind: str = "llama", vocab: int = VOCAB, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0, **ARCHITECTURES[kind]
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0 if kind == "mamba" else 4.0)
    return model.eval()


def some_prompts(count: int, longest: int = 20, vocab: int = VOCAB, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, vocab) for _ in range(draw.randint(1, longest))] for _ in range(count)]
