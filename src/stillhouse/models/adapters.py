"""LoRA adapters through peft: added to a student, merged into a teacher."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.models.config import LoraConfig
from stillhouse.models.hidden import unwrap
from stillhouse.models.parts import check_parts_adapted, modules_without_adapter
from stillhouse.models.paths import error_summary, foreign_files, resolve_adapter
from stillhouse.models.quantise import dequantise_layers, effective_weight, is_quantised, is_quantised_weight


def add_lora(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """The model with LoRA adapters, which alone are trained.

    Raises:
        ModelError: `lora.targets` fit no module of the model, or none of one of `lora.parts`.
    """
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    options = PeftLora(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        exclude_modules=modules_without_adapter(model, lora) or None,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # peft cannot merge into quantised weights, and is never asked to
            warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass", UserWarning)
            adapted = get_peft_model(model, options)
    except ValueError as error:
        raise ModelError(f"student.lora: {error_summary(error)}") from error
    check_parts_adapted(adapted, lora.parts or ())
    return adapted


def merge_adapter(model: nn.Module, adapter: str) -> nn.Module:
    """The model with a saved adapter merged into its weights, all of which can be trained on.

    Quantised weights are dequantised first, so that nothing the adapter has learnt is rounded away.

    Raises:
        ModelError: there is no adapter at the path, or it does not fit the model.
    """
    from peft import PeftModel

    folder = resolve_adapter(adapter)
    if is_quantised(model):
        dequantise_layers(model)
    with foreign_files(f"{adapter}: cannot be merged into the model as an adapter"):
        merged: nn.Module = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return merged.requires_grad_(True)  # peft has frozen what the adapter was trained on


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, by name, adapters merged into their layers and tied weights once.

    Weights are those that the layers compute with: dequantised, or rounded by quantisation-aware training.
    The model itself stays as it is: one layer at a time is copied and merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = unwrap(model)
    adapted = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    saved = base.state_dict().keys()
    yield from ((name, buffer) for name, buffer in base.named_buffers() if name in saved)
    for name, _ in base.named_parameters():
        owner = next((path for path in adapted if name.startswith(f"{path}.")), None)
        if owner is None:
            place, _, last = name.rpartition(".")
            yield name, effective_weight(base.get_submodule(place), last)
        elif name.startswith(f"{owner}.base_layer."):
            part = name.removeprefix(f"{owner}.base_layer.")
            yield f"{owner}.{part}", _merged(adapted[owner], part)


@torch.no_grad()
def _merged(layer: Any, part: str) -> Tensor:
    """A parameter of a layer with its adapters merged."""
    base = layer.get_base_layer()
    if not is_quantised_weight(base.weight):
        merged = copy.deepcopy(layer)
        merged.merge()
        found: Tensor = merged.get_base_layer().get_parameter(part).detach()
        return found
    plain = effective_weight(base, part)
    if part == "weight":
        for adapter in layer.active_adapters:
            plain = plain + layer.get_delta_weight(adapter).to(plain.dtype)
    return plain


def save_state(model: nn.Module, file: Path) -> None:
    """Write what training changes, for `restore_state`.

    All weights, but over quantised ones the trained weights alone: the others are the same at every start.
    """
    state = model.state_dict()
    if is_quantised(model):
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        state = {name: weight for name, weight in state.items() if name in trained}
    torch.save(state, file)


def restore_state(model: nn.Module, file: Path) -> None:
    """Put a model back to what `save_state` has written."""
    model.load_state_dict(torch.load(file, weights_only=True), strict=not is_quantised(model))


def merged_copy(model: Any) -> Any:
    """A copy of a model with its adapters merged; of a quantised one in ordinary weights."""
    if not is_quantised(model):
        return copy.deepcopy(model).merge_and_unload()
    merged = dict(merged_weights(model))
    plain = dequantise_layers(copy.deepcopy(model).unload())
    plain.load_state_dict(merged, strict=False)  # tied weights are there once
    return plain
