"""transformers configs from `student.from_config`, of language models and of vision-language models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from stillhouse.config import nearest
from stillhouse.errors import ModelError
from stillhouse.models.paths import error_summary

SPECIAL_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
"""Config fields that a randomly initialised student takes from its tokenizer."""
PLACE = "student.from_config"


def config_from_options(options: Mapping[str, Any], vocab_size: int, **defaults: Any) -> Any:
    """A transformers config from `student.from_config`.

    Args:
        options: its fields; a vision-language model has those of its language model in `text_config`.
        vocab_size: of the language model, unless `options` has one.
        **defaults: more fields of the language model, which those of `options` override.

    Raises:
        ModelError: the model type or a field is unknown, or the values do not fit together.
    """
    from huggingface_hub.errors import StrictDataclassError

    config_class = _config_class(options["model_type"], PLACE)
    rest = {name: value for name, value in options.items() if name != "model_type"}
    language = {"vocab_size": vocab_size, **defaults}
    if {"text_config", "vision_config"} <= config_class.sub_configs.keys():
        rest["text_config"] = language | (rest.get("text_config") or {})
        for part in ("text_config", "vision_config"):
            _check_part(config_class, part, rest.get(part) or {})
    else:
        rest = language | rest
    _check_fields(config_class, rest, PLACE)
    try:
        return config_class(**rest)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{PLACE}: no model can be made of it. {error_summary(error)}") from error


def _config_class(model_type: str, place: str) -> Any:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        hint = nearest(model_type, list(CONFIG_MAPPING.keys()))
        raise ModelError(f"{place}.model_type: {model_type!r} is not known to transformers{hint}.")
    return CONFIG_MAPPING[model_type]


def _check_part(config_class: Any, part: str, fields: Mapping[str, Any]) -> None:
    """Refuse unknown fields of the language model or of the vision tower within a config."""
    place = f"{PLACE}.{part}"
    if "model_type" in fields:
        found = _config_class(fields["model_type"], place)
    else:
        found = type(getattr(config_class(), part))
    _check_fields(found, fields, place)


def _check_fields(config_class: Any, fields: Mapping[str, Any], place: str) -> None:
    parameters = inspect.signature(config_class).parameters
    known = {*config_class().to_dict(), *config_class.attribute_map, *parameters, *SPECIAL_TOKENS}
    for name in fields:
        if name not in known:
            raise ModelError(
                f"{place}.{name}: {config_class.model_type} has no such field{nearest(name, sorted(known))}."
            )
