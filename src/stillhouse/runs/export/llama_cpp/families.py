"""llama.cpp's families of models, with their hyperparameters and the layout of their weights.

Each is checked by a test against llama.cpp itself: greedy text, word for word. Names of tensors come from the
`gguf` package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ModelError

OTHERS = "Export safetensors: llama.cpp's own convert_hf_to_gguf.py reads that folder and knows more models."
"""Where a user goes with what is refused here."""


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of transformers as llama.cpp has it.

    Example: `FAMILIES["Qwen2ForCausalLM"]`
    """

    arch: str
    """The name in `gguf.MODEL_ARCH`."""
    write_numbers: Callable[[Any, Any], None]
    """Writes the hyperparameters of a config with a `GGUFWriter`."""
    layout: Callable[[str, Tensor, Any], Tensor]
    """A weight by its name in transformers, laid out as llama.cpp reads it, for a config."""
    activations: tuple[str, ...]
    """The activations of the MLP that llama.cpp computes here."""
    rope_factors: bool = False
    """Whether llama.cpp takes a factor for each rotary frequency, as Llama 3.1 needs."""
    unsupported: tuple[str, ...] = ()
    """Fields of the config that must be false."""


def family_of(model: Any) -> Family:
    """The family of a model.

    Raises:
        ModelError: there is none that is checked here, or the model has what llama.cpp computes otherwise.
    """
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None:
        raise ModelError(
            f"gguf: {name} is not among the architectures that are checked against llama.cpp here: "
            f"{', '.join(FAMILIES)}. {OTHERS}"
        )
    config = model.config
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    problems = [f"the activation {act}"] if act not in family.activations else []
    problems += [field for field in family.unsupported if getattr(config, field, False)]
    rope = rope_type(config)
    if rope not in (("default", "linear", "llama3") if family.rope_factors else ("default",)):
        problems.append(f"rotary positions of type {rope}")
    if problems:
        raise ModelError(f"gguf: {name} with {' and '.join(problems)} has no form in llama.cpp. {OTHERS}")
    return family


def rope_type(config: Any) -> str:
    """How rotary frequencies are made; "default" also where there are none."""
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def tensors_of(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Each weight under llama.cpp's name; a head that is tied to the embeddings is there once.

    Raises:
        ModelError: a weight has no name in llama.cpp.
    """
    import gguf

    arch = gguf.MODEL_ARCH[family.arch]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"gguf: the weight {name} has no name in llama.cpp's {family.arch}. {OTHERS}")
        yield found, family.layout(name, parameter.detach(), model.config)
    if rope_type(model.config) != "default":
        yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", _rope_factors(model)


def _rope_factors(model: Any) -> Tensor:
    """What llama.cpp divides each plain rotary frequency by to get the model's own."""
    rotary = model.model.rotary_emb
    own = rotary.inv_freq.float()
    exponents = torch.arange(0, 2 * len(own), 2, dtype=torch.float32) / (2 * len(own))
    plain = float(model.config.rope_parameters["rope_theta"]) ** -exponents
    return plain / own


def _decoder_numbers(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(head)


def _gpt2_numbers(writer: Any, config: Any) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _neox_numbers(writer: Any, config: Any) -> None:
    head = config.hidden_size // config.num_attention_heads
    share = float((config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(int(head * share))


def _as_is(name: str, weight: Tensor, config: Any) -> Tensor:
    return weight


def _rotary_pairs(name: str, weight: Tensor, config: Any) -> Tensor:
    """Queries and keys with the two halves of each head interleaved: llama.cpp rotates neighbours."""
    found = re.search(r"\.([qk])_proj\.(?:weight|bias)$", name)
    if found is None:
        return weight
    heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _transposed(name: str, weight: Tensor, config: Any) -> Tensor:
    """GPT-2 multiplies from the right."""
    return weight.T if re.search(r"\.(?:c_attn|c_proj|c_fc)\.weight$", name) else weight


def _split_heads(name: str, weight: Tensor, config: Any) -> Tensor:
    """GPT-NeoX has query, key and value of each head together, llama.cpp all queries first."""
    if ".query_key_value." not in name:
        return weight
    heads = config.num_attention_heads
    return weight.reshape(heads, 3, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu", "gelu_fast")
_LLAMA = Family("LLAMA", _decoder_numbers, _rotary_pairs, ("silu",), rope_factors=True)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family(
        "QWEN2", _decoder_numbers, _as_is, ("silu",), unsupported=("use_sliding_window",)
    ),
    "Qwen3ForCausalLM": Family(
        "QWEN3", _decoder_numbers, _as_is, ("silu",), unsupported=("use_sliding_window",)
    ),
    "GPT2LMHeadModel": Family(
        "GPT2", _gpt2_numbers, _transposed, _GELU, unsupported=("scale_attn_by_inverse_layer_idx",)
    ),
    "GPTNeoXForCausalLM": Family("GPTNEOX", _neox_numbers, _split_heads, _GELU),
}  # fmt: skip
"""By the class in transformers."""
