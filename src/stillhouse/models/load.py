"""Loading students and teachers: from a path, from random weights, or from parts of the teacher."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.errors import EnvironmentFault, ModelError
from stillhouse.models.adapters import add_lora, merge_adapter
from stillhouse.models.config import Dtype, ModelConfig, StudentConfig, TeacherModel
from stillhouse.models.hidden import check_head, image_reader, unwrap
from stillhouse.models.parts import freeze_tower
from stillhouse.models.paths import error_summary, foreign_files, model_files, path_hint
from stillhouse.models.pruning.choose import Kept
from stillhouse.models.pruning.plan import plan_pruning, pruned
from stillhouse.models.quantise import (
    fake_quantise_layers,
    is_quantised,
    is_quantised_weight,
    keep_layout,
    num_weights,
    quantise_layers,
    quantised_dtype,
    stored_bytes,
)
from stillhouse.models.readers import auto_class, config_of, model_reader, new_config, student_reader
from stillhouse.models.vision import ImageReader, attach_reader

logger = logging.getLogger("stillhouse")


def local_device() -> torch.device:
    """The GPU of this process, which is the trainer's; the CPU if there is none.

    Under torchrun each process has its own GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
    torch.cuda.set_device(device)
    return device


def load_teacher(config: TeacherModel) -> nn.Module:
    """The teacher: frozen, in evaluation mode.

    Raises:
        ModelError: no model could be loaded from the path, or its head is not supported.
    """
    model = _load(config, config.path, config.dtype)
    if config.adapter:
        model = merge_adapter(model, config.adapter)
    attach_reader(model, model_reader(config))
    check_head(model)
    return model.requires_grad_(False).eval()


def load_student(
    config: StudentConfig, tokenizer: Any, teacher: nn.Module | None, seed: int, kept: Kept | None = None
) -> nn.Module:
    """The student, ready to train: from a path, from parts of the teacher or from random weights.

    Random weights and adapters depend on `seed` only.

    Args:
        config: of the student.
        tokenizer: the student's.
        teacher: which a student may start from.
        seed: of random weights.
        kept: what of the teacher stays; None: as the configuration alone says.

    Raises:
        ModelError: the model could not be loaded or built, or its head is not supported.
    """
    torch.manual_seed(seed)
    reader = student_reader(config, tokenizer, None if teacher is None else image_reader(teacher))
    if config.path is not None:
        model = _load(config, config.path, config.dtype)
    elif config.from_teacher is not None:
        if teacher is None:
            raise ModelError("student.from_teacher: there is no teacher model to start from.")
        kept = kept or plan_pruning(config.from_teacher, teacher).kept
        model = pruned(teacher, kept)
        cast_parameters(model, _torch_dtype(config.dtype) or next(teacher.parameters()).dtype)
    else:
        model = _from_config(config, tokenizer, reader)
    attach_reader(model, reader)
    freeze_tower(model, config)
    if config.quantise is not None:
        change = fake_quantise_layers if config.quantise.qat else quantise_layers
        model = change(model, config.quantise, "student.quantise")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if config.lora:
            model.enable_input_require_grads()  # type: ignore[operator]
    if config.lora:
        model = add_lora(model, config.lora)
    check_head(model)
    return model


def _from_config(config: StudentConfig, tokenizer: Any, reader: ImageReader | None) -> nn.Module:
    built = new_config(config.from_config or {}, tokenizer) if reader is None else reader.config
    try:
        model: nn.Module = auto_class(built).from_config(built)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(
            f"student.from_config: no model can be made of it. {error_summary(error)}"
        ) from error
    return cast_parameters(model, _torch_dtype(config.dtype) or torch.float32)


def _load(config: ModelConfig, path: str, dtype: Dtype) -> nn.Module:
    """The model at a path; a LoRA adapter there is merged into the model that it belongs to.

    A quantised one has the dtype that it was written with; merging dequantises it.
    """
    files = model_files(path)
    model = _load_whole(config, path, files.model, dtype)
    written = quantised_dtype(model)
    if files.adapter is not None:
        model = merge_adapter(model, files.adapter)
    wanted = _torch_dtype(dtype)
    if written is None or wanted in (None, written):
        return model
    if not is_quantised(model):
        return cast_parameters(model, wanted)
    logger.warning(
        "%s: is quantised, so it computes in %s, as it was written, not in %s", path, written, wanted
    )
    return cast_parameters(model, written)


def _load_whole(config: ModelConfig, path: str, folder: str, dtype: Dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    if config.gguf_file:
        _require_gguf(path)
        options |= {"gguf_file": config.gguf_file, "quantization_config": _dequantise()}
    if Path(folder).is_dir() and not config.gguf_file and not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{path}: is not a model folder.{path_hint(path, None)}")
    model: nn.Module
    problem = f"{path}: no causal language model could be loaded from there"
    with foreign_files(problem, path_hint(path, config.gguf_file)):
        kind = AutoModelForCausalLM if config.gguf_file else auto_class(config_of(config, folder))
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise ModelError(
            f"{path}: {len(info['missing_keys'])} of the model's weights are not in its files, the first "
            f"{first}. They would be random. Does config.json belong to these weights?"
        )
    if config.gguf_file:
        model = _without_quantisation(model)
    keep_layout(model)
    return model


def _dequantise() -> Any:
    """Load dense weights: packed ones, for which there are kernels, can be neither pruned nor trained."""
    from transformers.utils import quantization_config

    gguf_config = getattr(quantization_config, "GgufConfig", None)  # older versions always dequantise
    return None if gguf_config is None else gguf_config(dequantize=True)


def _without_quantisation(model: nn.Module) -> nn.Module:
    """The same model without GGUF's quantisation config, which `save_pretrained` cannot write."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = cast_parameters(type(model)(config), next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters of a model in place, but for quantised ones.

    Buffers keep their dtype: rotary frequencies in bfloat16 would put distant tokens at wrong positions.
    """
    for parameter in model.parameters():
        if not is_quantised_weight(parameter):
            parameter.data = parameter.data.to(dtype)
    return model


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    """Architecture, dtype and the numbers of parameters, trainable ones and bytes; tied ones count once.

    `parameters` leaves LoRA adapters out, which merging adds to other weights; their number is `adapter`.
    `quantised` is how many of the parameters are quantised.
    """
    parameters = list(model.parameters())
    adapter = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    quantised = sum(num_weights(p) for p in parameters if is_quantised_weight(p))
    counts = {
        "architecture": type(unwrap(model)).__name__,
        "parameters": sum(num_weights(p) for p in parameters) - adapter,
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "bytes": sum(stored_bytes(p) for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
    }
    return counts | {name: n for name, n in (("adapter", adapter), ("quantised", quantised)) if n}


def _torch_dtype(name: Dtype) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)


def _require_gguf(path: str) -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentFault(
            f"{path}: GGUF files need the package gguf. Install it with: pip install 'stillhouse[gguf]'"
        )
