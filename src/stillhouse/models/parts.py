"""The parts of a vision-language model: its language model, its vision tower, and the projector between."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from stillhouse.errors import ModelError
from stillhouse.models.config import LoraConfig, Part, StudentConfig
from stillhouse.models.hidden import decoder_of, unwrap
from stillhouse.models.vision import reader_of, reads_images

TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
"""What transformers calls a vision tower within a model."""


def parts_of(inner: Any) -> dict[str, Part]:
    """The part that each parameter of a vision-language model belongs to, by the parameter's name.

    A merger of patches within the tower, as Qwen-VL's, is the projector.
    """
    tower = next(
        (getattr(inner.base_model, name) for name in TOWERS if hasattr(inner.base_model, name)), None
    )
    if tower is None:
        raise ModelError(f"{type(inner).__name__}: cannot find its vision tower ({', '.join(TOWERS)}).")
    language = {id(one) for one in decoder_of(inner).parameters()}
    language |= {id(one) for one in inner.get_output_embeddings().parameters()}
    seeing = {id(one) for one in tower.parameters()}

    def part(name: str, parameter: nn.Parameter) -> Part:
        if id(parameter) in language:
            return "language"
        return "tower" if id(parameter) in seeing and "merger" not in name else "projector"

    return {name: part(name, parameter) for name, parameter in inner.named_parameters()}


def _tower(inner: Any) -> nn.Module:
    found = next((one for name in TOWERS if (one := getattr(inner.base_model, name, None)) is not None), None)
    if not isinstance(found, nn.Module):
        raise ModelError(f"{type(inner).__name__}: cannot find its vision tower ({', '.join(TOWERS)}).")
    return found


def vision_facts(model: nn.Module) -> dict[str, Any]:
    """What a run's record and a model card say of a vision-language model's tower, projector and processor;
    empty for a model that reads text alone."""
    inner = unwrap(model)
    reader = reader_of(inner)
    if reader is None:
        return {}
    facts: dict[str, Any] = {"tower": type(_tower(inner)).__name__}
    parts = parts_of(inner)
    for part in ("tower", "projector"):
        weights = [inner.get_parameter(name) for name, of in parts.items() if of == part]
        facts[f"{part}_parameters"] = sum(one.numel() for one in weights)
        facts[f"{part}_trained"] = any(one.requires_grad for one in weights)
    return facts | {"processor": reader.folder}


def freeze_tower(model: nn.Module, config: StudentConfig) -> None:
    """Leave the vision tower as it is in training, if `student.tower` says so.

    Raises:
        ModelError: an option about a vision tower was set, and the student has none.
    """
    inner = unwrap(model)
    if not reads_images(inner.config):
        options = {"student.tower": config.tower != "auto", "student.processor": config.processor is not None}
        for option, is_set in options.items():
            if is_set:
                raise ModelError(f"{option}: {type(inner).__name__} has no vision tower. Remove the option.")
        return
    if config.tower == "trained" or (config.tower == "auto" and config.from_config is not None):
        return
    found = parts_of(inner)
    for name, parameter in inner.named_parameters():
        if found[name] == "tower":
            parameter.requires_grad_(False)


def modules_without_adapter(model: nn.Module, lora: LoraConfig) -> list[str]:
    """Names of the layers of a vision-language model that `lora.parts` leaves out, whatever they are called.

    Raises:
        ModelError: parts were asked for of a model that reads text alone.
    """
    inner = unwrap(model)
    if not reads_images(inner.config):
        if lora.parts is not None:
            raise ModelError(
                f"student.lora.parts: {type(inner).__name__} reads text alone. Remove the option."
            )
        return []
    chosen = lora.parts or (("language",) if lora.targets == "all-linear" else None)
    if chosen is None:
        return []
    return sorted({name.rpartition(".")[0] for name, part in parts_of(inner).items() if part not in chosen})


def check_parts_adapted(model: nn.Module, parts: Collection[Part]) -> None:
    """Make sure that each part that was asked for has an adapter.

    Raises:
        ModelError: `lora.targets` name no layer of one.
    """
    found = parts_of(unwrap(model)) if parts else {}
    for part in parts:
        if not any(".lora_" in name for name, of in found.items() if of == part):
            raise ModelError(
                f"student.lora.parts: {part} has no layer that student.lora.targets names. Add names of its "
                "layers, such as linear_1 and linear_2 of LLaVA's projector, or take all-linear."
            )
