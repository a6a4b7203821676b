"""The student as others load it: weights, tokenizer and a card that says how it came to be."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from stillhouse.data.templates import with_template
from stillhouse.files import atomic, locate, os_errors_as_faults
from stillhouse.models import QuantiseConfig, copy_processor_of, unwrap
from stillhouse.models.adapters import restore_state
from stillhouse.models.load import cast_parameters
from stillhouse.models.paths import BASE_FOLDER
from stillhouse.models.quantise import is_quantised_weight, quantise_trained_layers, save_quantised
from stillhouse.models.vocabulary_rows import with_rows, without_padding_rows
from stillhouse.report import load_run
from stillhouse.runs.build import Parts
from stillhouse.runs.export.card import model_card
from stillhouse.runs.export.usage import UsageExample, example_usage
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.own_settings import write_own_settings
from stillhouse.train.checkpoints import replace_folder


def export(parts: Parts, folder: RunFolder) -> UsageExample | None:
    """Write the student into the run folder; adapters are merged unless the configuration keeps them apart.

    With `train.keep: best` the best weights are put into the student first, and with
    `output.dtype` the student's weights are rounded to what is exported, so that what is evaluated after is
    what others load; quantisation-aware training ends here, with weights that are quantised.

    Returns:
        How the student is called, for `write_card`.
    """
    if parts.config.train.keep == "best" and (folder.best / "weights.pt").exists():
        restore_state(parts.student, folder.best / "weights.pt")
    dtype = _export_dtype(parts)
    for parameter in parts.student.parameters():
        if not is_quantised_weight(parameter):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    quantise = parts.config.student.quantise
    if quantise is not None and quantise.qat:
        quantise_trained_layers(parts.student, quantise)
    name_ends(parts)
    unwrap(parts.student).config.use_cache = True  # which a training turns off
    tokenizer = with_template(parts.tokenizer, parts.config.data.template)
    usage = example_usage(parts, tokenizer)
    fresh = folder.path / ".student.new"
    shutil.rmtree(fresh, ignore_errors=True)
    with os_errors_as_faults(folder.student):
        _save_weights(parts, fresh, folder.student, dtype)
        tokenizer.save_pretrained(fresh)
        for place in {fresh, fresh / BASE_FOLDER} if (fresh / BASE_FOLDER).is_dir() else {fresh}:
            copy_processor_of(parts.student, place)
        _card(parts, folder, usage).save(fresh / "README.md")
        write_own_settings(parts.config, fresh)
    replace_folder(fresh, folder.student)
    return usage


def name_ends(parts: Parts) -> None:
    """Have the generation config name every token that ended the student's text here."""
    ends, config = list(parts.facts.eos_ids), getattr(unwrap(parts.student), "generation_config", None)
    if config is not None:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]


def _save_weights(parts: Parts, fresh: Path, target: Path, dtype: torch.dtype) -> None:
    """Save the student in `fresh`, which will become `target`.

    An adapter names the model that it belongs to by its place after the move, so that peft finds it there.
    """
    lora, student = parts.config.student.lora, parts.student
    if lora is None or lora.merge:
        whole = student if lora is None else copy.deepcopy(student).merge_and_unload()  # type: ignore[operator]
        if parts.config.output.draft:
            assert parts.teacher is not None  # `output.draft` requires it
            whole = with_rows(whole, unwrap(parts.teacher).get_output_embeddings().weight.shape[0])
        elif parts.config.student.from_config is not None:
            whole = without_padding_rows(whole, len(parts.tokenizer))
        _save_model(_in_dtype(whole, dtype), parts.config.student.quantise, fresh)
        return
    adapter = _in_dtype(student, dtype)
    quantise, start = parts.config.student.frozen_weights, parts.config.student.path
    on_hub = start is not None and parts.config.student.gguf_file is None and not locate(start).exists()
    if quantise is not None or not on_hub:
        _save_model(copy.deepcopy(adapter).unload(), quantise, fresh / BASE_FOLDER)
        start = str((target / BASE_FOLDER).absolute())
    for options in adapter.peft_config.values():
        options.base_model_name_or_path = start
    adapter.save_pretrained(fresh, save_embedding_layers=False)  # no embedding is ever resized


def _save_model(model: Any, quantise: QuantiseConfig | None, folder: Path) -> None:
    if quantise is None:
        model.save_pretrained(folder)
    else:
        save_quantised(model, quantise, folder)


def _export_dtype(parts: Parts) -> torch.dtype:
    name = parts.config.output.dtype
    trained = next(parts.student.parameters()).dtype
    return trained if name == "auto" else getattr(torch, name)


def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with parameters of a dtype; a copy if they have another."""
    plain = (parameter for parameter in model.parameters() if not is_quantised_weight(parameter))
    if all(parameter.dtype == dtype for parameter in plain):
        return model
    return cast_parameters(copy.deepcopy(model), dtype)


def write_card(parts: Parts, folder: RunFolder, usage: UsageExample | None) -> None:
    """Write the student's card anew, with what the run folder holds by now."""
    with atomic(folder.student / "README.md") as handle:
        handle.write(_card(parts, folder, usage).content)


def _card(parts: Parts, folder: RunFolder, usage: UsageExample | None) -> ModelCard:
    return model_card(parts.config, load_run(folder.path, rows="scores"), usage)
