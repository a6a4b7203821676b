"""Load models and tokenizers, with errors that say what the path lacks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.config import nearest
from stillhouse.errors import EnvironmentFault, ModelError
from stillhouse.files import PACKAGE, locate
from stillhouse.models.config import Dtype, Prune, StudentConfig, TeacherModel, _Model
from stillhouse.models.hidden import check_head, unwrap

SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id")
"""Ids that a random student takes from its tokenizer."""


def place(path: str) -> str:
    """A local folder if there is one, else the text itself, taken as a hub name.

    Raises:
        ModelError: it looks like a folder but is none, or holds no model.
    """
    folder = locate(path)
    if folder.is_dir():
        return str(folder)
    looks_local = path.startswith((PACKAGE, "/", ".", "~")) or path.count("/") != 1 or folder.exists()
    if looks_local:
        what = "is a file, not a folder" if folder.is_file() else f"does not exist{_near(folder)}"
        raise ModelError(
            f"{path}: {what}. A model path is a folder with config.json and weights, or a hub name "
            "like org/name."
        )
    return path


def _nor(path: str) -> str:
    """What to say of a hub name that looks like a mistyped folder."""
    folder = locate(path)
    if folder.exists() or "/" not in path or not folder.parent.is_dir():
        return ""
    return f" Nor does the folder {folder.parent} hold {folder.name}{_near(folder)}."


def _near(folder: Path) -> str:
    beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return nearest(folder.name, beside)


def load_tokenizer(config: _Model, fallback: _Model | None = None) -> Any:
    """The tokenizer of a model; `fallback` is the teacher, for students that start from it.

    Raises:
        ModelError: there is none at the path, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    owner = config if (config.path or config.tokenizer or fallback is None) else fallback
    path = config.tokenizer or owner.path
    if path is None:
        raise ModelError(
            "student.tokenizer: needed with from_config where there is no teacher to take it from."
        )
    options: dict[str, Any] = {"trust_remote_code": owner.trust_remote_code}
    if owner.gguf_file and not config.tokenizer:
        options["gguf_file"] = owner.gguf_file
    folder = place(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: no tokenizer could be loaded from there. {_first_line(error)}{_nor(path)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no end-of-sequence token, so no response could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_teacher(config: TeacherModel) -> nn.Module:
    """The teacher: frozen, in evaluation mode.

    Raises:
        ModelError: the path holds no model that can be loaded.
    """
    model = _load(config, config.path, config.dtype)
    if config.adapter:
        model = _merged(model, config.adapter)
    check_head(model)
    return model.requires_grad_(False).eval()


def adapter_place(path: str) -> str:
    """Where an adapter is: as `place`, and a folder must hold one.

    Raises:
        ModelError: it is no adapter.
    """
    folder = place(path)
    if Path(folder).is_dir() and not (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(
            f"{path}: is not the folder of a LoRA adapter: it has no adapter_config.json. A whole model is "
            "named by path."
        )
    return folder


def _merged(model: nn.Module, adapter: str) -> nn.Module:
    from peft import PeftModel
    from safetensors import SafetensorError

    folder = adapter_place(adapter)
    try:
        merged: nn.Module = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{adapter}: cannot be put on the teacher as an adapter. {_first_line(error)}"
        ) from error
    return merged


def load_student(config: StudentConfig, tokenizer: Any, teacher: nn.Module | None, seed: int) -> nn.Module:
    """The student, ready to train: from a path, from the teacher's layers or from random weights.

    Random weights and adapters depend on `seed` alone.

    Raises:
        ModelError: the start named in the configuration is not to be had.
    """
    torch.manual_seed(seed)
    if config.path is not None:
        model = _load(config, config.path, config.dtype)
    elif config.from_teacher is not None:
        if teacher is None:
            raise ModelError("student.from_teacher: there is no teacher model to start from.")
        model = keep_layers(unwrap(teacher), config.from_teacher, _torch_dtype(config.dtype))
    else:
        model = _from_config(config, tokenizer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if config.lora:
            model.enable_input_require_grads()  # type: ignore[operator]
    if config.lora:
        model = _with_adapters(model, config)
    check_head(model)
    return model


def keep_layers(teacher: Any, prune: Prune, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the teacher with only the named layers; embeddings, final norm and head are kept.

    Raises:
        ModelError: a layer that the teacher does not have, or an architecture whose layers cannot be found.
    """
    config = config_of_layers(teacher.config, prune.layers)
    stack = _layer_prefix(teacher, teacher.config.num_hidden_layers)
    student = type(teacher)(config)
    new_index = {old: new for new, old in enumerate(prune.layers)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        if not name.startswith(stack):
            state[name] = tensor
            continue
        number, _, rest = name.removeprefix(stack).partition(".")
        if int(number) in new_index:
            state[f"{stack}{new_index[int(number)]}.{rest}"] = tensor
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return cast(student, dtype or next(teacher.parameters()).dtype)


def config_of_layers(whole: Any, layers: Sequence[int]) -> Any:
    """The configuration with the named layers only; lists with an entry for each layer are cut likewise.

    Raises:
        ModelError: a layer that is not there, or layers that break a fixed pattern of kinds.
    """
    depth = whole.num_hidden_layers
    if layers[-1] >= depth:
        raise ModelError(
            f"student.from_teacher.layers: layer {layers[-1]} does not exist; the teacher has {depth} "
            f"(0 to {depth - 1})."
        )
    config = copy.deepcopy(whole)
    config.num_hidden_layers = len(layers)
    for name, value in whole.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            setattr(config, name, [value[index] for index in layers])
    kinds = getattr(whole, "layer_types", None)
    if kinds and list(config.layer_types) != [kinds[index] for index in layers]:
        raise ModelError(
            f"student.from_teacher.layers: {whole.model_type} repeats {', '.join(dict.fromkeys(kinds))} in a "
            f"fixed pattern, and layers {list(layers)} do not follow it. Choose layers whose kinds do."
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # weights from GGUF are dequantised; the entry would make saving fail
    return config


def _layer_prefix(model: nn.Module, depth: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return f"{name}."
    raise ModelError(f"student.from_teacher: cannot find the {depth} layers of {type(model).__name__}.")


def config_of(options: Mapping[str, Any], vocab: int) -> Any:
    """A Hugging Face model configuration from `student.from_config`.

    Raises:
        ModelError: the model type or a field is unknown, or the values do not fit together.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    rest = {"vocab_size": vocab, **options}
    model_type = rest.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = nearest(model_type, list(CONFIG_MAPPING.keys()))
        raise ModelError(
            f"student.from_config.model_type: {model_type!r} is not known to transformers{hint}."
        )
    made = CONFIG_MAPPING[model_type]
    known = {*made().to_dict(), *made.attribute_map, *inspect.signature(made).parameters, *SPECIAL}
    for name in rest:
        if name not in known:
            raise ModelError(
                f"student.from_config.{name}: {model_type} has no such field{nearest(name, sorted(known))}."
            )
    try:
        return made(**rest)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"student.from_config: no model can be made of it. {_first_line(error)}") from error


def _from_config(config: StudentConfig, tokenizer: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    special = {name: getattr(tokenizer, name) for name in SPECIAL}
    built = config_of({**special, **(config.from_config or {})}, len(tokenizer))
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(built)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"student.from_config: no model can be made of it. {_first_line(error)}") from error
    return cast(model, _torch_dtype(config.dtype) or torch.float32)


def _load(config: _Model, path: str, dtype: Dtype) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    if config.gguf_file:
        _need(
            "gguf",
            f"{path}: GGUF files need the package gguf. Install it with: pip install 'stillhouse[gguf]'",
        )
        options |= {"gguf_file": config.gguf_file, "quantization_config": _dense()}
    folder = place(path)
    if Path(folder).is_dir() and not config.gguf_file and not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{path}: is not a model folder: it has no config.json.")
    model: nn.Module
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{path}: no causal language model could be loaded from there. {_first_line(error)}{_nor(path)}"
        ) from error
    if found["missing_keys"]:
        first = sorted(found["missing_keys"])[0]
        raise ModelError(
            f"{path}: {len(found['missing_keys'])} of the model's weights are not in its files, the first "
            f"{first}. They would be random. Is config.json that of these weights?"
        )
    if config.gguf_file:
        model = _clean(model)
    return model


def _dense() -> Any:
    """Ask for ordinary weights: packed ones, which some kernels can use, can be neither cut nor trained."""
    from transformers.utils import quantization_config

    made = getattr(quantization_config, "GgufConfig", None)  # older transformers always unpack
    return None if made is None else made(dequantize=True)


def _clean(model: nn.Module) -> nn.Module:
    """The same weights without the quantisation entry of GGUF, which `save_pretrained` cannot write."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = cast(type(model)(config), next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model with its parameters in another number format.

    Buffers stay as they are: rotary frequencies in bfloat16 would put distant tokens at wrong positions.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _with_adapters(model: nn.Module, config: StudentConfig) -> nn.Module:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    lora = config.lora
    assert lora is not None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    options = PeftLora(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, options)
    except ValueError as error:
        raise ModelError(f"student.lora: {_first_line(error)}") from error


def parameters_of(model: nn.Module) -> dict[str, Any]:
    """Counts for the run folder: parameters, trainable ones, bytes; tied weights are counted once."""
    parameters = list(model.parameters())
    return {
        "architecture": type(unwrap(model)).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
    }


def _torch_dtype(name: Dtype) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)


def _need(package: str, message: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise EnvironmentFault(message)


def _first_line(error: Exception) -> str:
    return (
        f"({type(error).__name__}: {str(error).strip().splitlines()[0][:300]})" if str(error).strip() else ""
    )
