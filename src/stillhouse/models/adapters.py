"""LoRA adapters through peft: added to a student, merged into a teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.models.config import LoraConfig
from stillhouse.models.hidden import unwrap
from stillhouse.models.parts import check_parts_adapted, modules_without_adapter
from stillhouse.models.paths import error_summary, foreign_files, resolve_adapter
from stillhouse.models.quantise import dequantise_layers, is_quantised


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

    The model itself stays as it is: one layer at a time is copied and merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = unwrap(model)
    adapted = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    saved = base.state_dict().keys()
    yield from ((name, buffer) for name, buffer in base.named_buffers() if name in saved)
    for name, parameter in base.named_parameters():
        owner = next((path for path in adapted if name.startswith(f"{path}.")), None)
        if owner is None:
            yield name, parameter.detach()
        elif name.startswith(f"{owner}.base_layer."):
            layer = copy.deepcopy(adapted[owner])
            layer.merge()
            part = name.removeprefix(f"{owner}.base_layer.")
            yield f"{owner}.{part}", layer.get_base_layer().get_parameter(part).detach()
