"""Linear layers in fewer bits: int8 and int4 by torchao, NF4 by bitsandbytes.

Weights alone are quantised; products run in the dtype of the activations. The head, embeddings and norms stay
as they are, and of a model with a vision tower the tower does too.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import EnvironmentFault, ModelError
from stillhouse.models.config import QuantiseConfig
from stillhouse.models.hidden import decoder_of, unwrap

PACKAGES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
FAKE = "weight_fake_quantizer"
"""The part of torchao's layer that rounds in the forward pass."""
NF4_BLOCK = 64
"""Weights with one scale; bitsandbytes' default, which its kernels are made for."""


def bits_per_weight(config: QuantiseConfig) -> float:
    """What a quantised weight takes in memory and in files, with its share of the scales.

    torchao packs int4 only for the kernels of GPUs; what runs anywhere keeps each integer in a byte, with a
    scale and a zero point for each group.
    """
    return {"int8": 8.0, "int4": 8 + (32 + 8) / config.group_size, "nf4": 4 + 8 / NF4_BLOCK}[config.weights]


def require_package(config: QuantiseConfig, path: str = "quantise") -> None:
    """Make sure that the package that quantises is installed.

    Raises:
        EnvironmentFault: it is not.
    """
    package = PACKAGES[config.weights]
    if importlib.util.find_spec(package) is None:
        raise EnvironmentFault(
            f"{path}.weights: {config.weights} needs the package {package}. Install it with: "
            "pip install 'stillhouse[quantise]'"
        )


@torch.no_grad()
def quantise_layers(model: nn.Module, config: QuantiseConfig, path: str = "quantise") -> nn.Module:
    """Quantise the linear layers of a model in place; nothing that is quantised can be trained.

    Args:
        model: a causal language model.
        config: to what.
        path: of the configuration, for messages.

    Raises:
        ModelError: it has no linear layers, or has rows that cannot be cut into the groups.
        EnvironmentFault: torchao or bitsandbytes is missing.
    """
    require_package(config, path)
    inner = unwrap(model)
    layers = quantisable_layers(inner, config, path)
    if config.weights == "nf4":
        for name, layer in layers.items():
            inner.set_submodule(name, _nf4_layer(layer))
        inner.is_loaded_in_4bit = True  # where peft looks
        keep_layout(inner)
        return model
    from torchao.quantization import quantize_

    wanted = {id(layer) for layer in layers.values()}
    quantize_(inner, torchao_config(config), filter_fn=lambda module, _name: id(module) in wanted)
    for layer in layers.values():
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return model


class _WeightOnlyProduct(torch.autograd.Function):
    """x W^T + b with W quantised and frozen: W is dequantised again for the gradient, where torchao's own
    product would keep all layers' dequantised weights until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ dense(ctx.weight).to(gradient.dtype), None, None


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        product: Tensor = _WeightOnlyProduct.apply(x, layer.weight, layer.bias)
        return product
    return nn.functional.linear(x, layer.weight, layer.bias)


def quantisable_layers(inner: Any, config: QuantiseConfig, path: str) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, by name in the whole model.

    Raises:
        ModelError: there is none, or a row of one cannot be cut into groups.
    """
    decoder = decoder_of(inner)
    within = {id(module) for module in decoder.modules()}
    layers = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and id(module) in within
    }
    if not layers:
        raise ModelError(
            f"{path}: {type(inner).__name__} has no linear layers (nn.Linear) to quantise. Choose another "
            "architecture."
        )
    size = {"int8": 1, "int4": config.group_size, "nf4": 1}[config.weights]
    for name, layer in layers.items():
        if layer.in_features % size:
            divisors = [one for one in (256, 128, 64, 32, 16, 8) if layer.in_features % one == 0]
            allowed = f"; its rows can be cut into groups of {', '.join(map(str, divisors))}"
            raise ModelError(
                f"{path}.group_size: the {layer.in_features} weights in a row of {name} cannot be cut into "
                f"groups of {size}{allowed if divisors else ''}."
            )
    return layers


@torch.no_grad()
def fake_quantise_layers(model: nn.Module, config: QuantiseConfig, path: str = "quantise") -> nn.Module:
    """Have the linear layers compute with weights rounded as `quantise_layers` would, in place.

    The weights stay as they are and can be trained: in the backward pass the gradient of the rounding is
    taken as 1 (straight-through estimator, Bengio et al. 2013).

    Raises:
        ModelError: as `quantise_layers`.
        EnvironmentFault: torchao is missing.
    """
    require_package(config, path)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inner = unwrap(model)
    wanted = {id(layer) for layer in quantisable_layers(inner, config, path).values()}
    if config.weights == "int8":
        rounding = IntxFakeQuantizeConfig(torch.int8, granularity="per_channel")
    else:
        rounding = IntxFakeQuantizeConfig(_int4(), group_size=config.group_size)
    step = QATConfig(weight_config=rounding, step="prepare")
    quantize_(inner, step, filter_fn=lambda module, _name: id(module) in wanted)
    return model


def quantise_trained_layers(model: nn.Module, config: QuantiseConfig) -> nn.Module:
    """Round the weights that `fake_quantise_layers` has let train, for good, in place."""
    inner = unwrap(model)
    fakes = [(name, module) for name, module in inner.named_modules() if hasattr(module, FAKE)]
    for name, module in fakes:
        inner.set_submodule(name, module.to_linear())
    return quantise_layers(model, config)


def torchao_config(config: QuantiseConfig) -> Any:
    """What torchao calls it."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if config.weights == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    return IntxWeightOnlyConfig(weight_dtype=_int4(), granularity=PerGroup(config.group_size))


def _int4() -> torch.dtype:
    found: torch.dtype = torch.int4  # type: ignore[attr-defined]
    return found


def _nf4_layer(layer: nn.Linear) -> nn.Module:
    """The layer with weights in NF4, scales quantised too (double quantisation), as in QLoRA."""
    import bitsandbytes

    made: nn.Module = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = bitsandbytes.nn.Params4bit(
        layer.weight.data,
        requires_grad=False,
        blocksize=NF4_BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        module=made,
    )
    made.weight = weight.to(layer.weight.device)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return made


def keep_layout(model: nn.Module) -> None:
    """Have NF4 weights stay as they were written.

    On a CPU with AVX512-BF16 bitsandbytes packs them anew in the first pass without gradients, so that the
    same model would compute another thing, and have another fingerprint, after it has generated once.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight of a model is quantised."""
    return any(is_quantised_weight(parameter) for parameter in model.parameters())


def quantised_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that the quantised layers of a model compute in; None if it has none."""
    for weight in model.parameters():
        if _is_nf4(weight):
            written: torch.dtype = getattr(weight, "quant_state").dtype  # noqa: B009  (bitsandbytes' own)
            return written
        if _is_torchao(weight):  # a tensor that says it is of the dtype that it dequantises to
            return weight.dtype
    return None


def is_quantised_weight(weight: Tensor) -> bool:
    """Whether a weight holds integers and scales of torchao's, or NF4 of bitsandbytes'."""
    return _is_torchao(weight) or _is_nf4(weight)


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _is_nf4(weight: Tensor) -> bool:
    return type(weight).__name__ == "Params4bit"


def effective_weight(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module as the module computes with it: dequantised, or rounded by its QAT layer."""
    weight = module.get_parameter(name)
    rounding = getattr(module, FAKE, None) if name == "weight" else None
    found: Tensor = dense(weight) if rounding is None else rounding(weight)
    return found.detach()


def dense(weight: Any) -> Tensor:
    """A weight as ordinary numbers: dequantised if it is quantised, else itself."""
    if _is_nf4(weight):
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return found
    plain: Tensor = weight.dequantize() if _is_torchao(weight) else weight
    return plain


def stored_tensors(weight: Any) -> dict[str, Tensor]:
    """The plain tensors that a weight consists of: of a quantised one its integers and scales."""
    if _is_nf4(weight):
        state = weight.quant_state
        return {"": weight.data, **state.as_dict(packed=True)}
    if not _is_torchao(weight):
        return {"": weight}
    names, _ = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names}


def num_weights(weight: Any) -> int:
    """How many numbers a weight stands for."""
    return int(weight.quant_state.shape.numel()) if _is_nf4(weight) else int(weight.numel())


def stored_bytes(weight: Tensor) -> int:
    """The bytes that a weight takes."""
    return sum(one.numel() * one.element_size() for one in stored_tensors(weight).values())


@torch.no_grad()
def dequantise_layers(model: nn.Module) -> nn.Module:
    """Turn quantised layers of a model back into ordinary ones in place: they compute the same."""
    inner = unwrap(model)
    quantised = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and is_quantised_weight(module.weight)
    ]
    for name, module in quantised:
        layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        layer.weight = nn.Parameter(dense(module.weight).detach())
        layer.bias = module.bias
        inner.set_submodule(name, layer)
    for mark in ("hf_quantizer", "is_loaded_in_4bit"):
        if hasattr(inner, mark):
            delattr(inner, mark)
    if hasattr(inner.config, "quantization_config"):
        del inner.config.quantization_config
    if loaded := getattr(inner, "_weight_conversions", None):  # which saving would undo
        inner._weight_conversions = [one for one in loaded if not _deserialises(one)] or None
    return model


def _deserialises(conversion: Any) -> bool:
    """Whether a step of transformers' loading makes quantised weights of their parts."""
    operations = getattr(conversion, "operations", ())
    return any("Deserialize" in type(one).__name__ for one in operations)


def save_quantised(model: nn.Module, config: QuantiseConfig, folder: Path) -> None:
    """Write a model that `quantise_layers` has quantised as transformers loads it, with its package beside.

    Args:
        model: the model.
        config: as it was quantised.
        folder: where to.
    """
    inner = unwrap(model)
    with _known_to_transformers(inner, config):
        inner.save_pretrained(folder)


@contextlib.contextmanager
def _known_to_transformers(inner: Any, config: QuantiseConfig) -> Iterator[None]:
    from transformers.quantizers import AutoHfQuantizer

    described = _transformers_config(inner, config)
    inner.hf_quantizer = AutoHfQuantizer.from_config(described, pre_quantized=False)
    inner.config.quantization_config = described
    try:
        yield
    finally:
        del inner.config.quantization_config
        del inner.hf_quantizer


def _transformers_config(inner: Any, config: QuantiseConfig) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    left_out = [
        name
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and not is_quantised_weight(module.weight)
    ]
    if config.weights != "nf4":
        return TorchAoConfig(torchao_config(config), modules_to_not_convert=left_out)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=inner.dtype,
        llm_int8_skip_modules=left_out,
    )
