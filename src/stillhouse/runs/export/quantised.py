"""A finished student in fewer bits, in a folder of its own that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from stillhouse.errors import ConfigError, Fault, ModelError
from stillhouse.files import os_errors_as_faults
from stillhouse.models import QuantiseConfig, TeacherModel, load_teacher, load_tokenizer, parameter_counts
from stillhouse.models.paths import model_files
from stillhouse.models.quantise import (
    NF4_BLOCK,
    PACKAGES,
    is_quantised,
    quantise_layers,
    require_package,
    save_quantised,
)
from stillhouse.runs.export.safetensors import copy_kept
from stillhouse.train.checkpoints import replace_folder

CARD = "README.md"


def quantise_student(source: Path, config: QuantiseConfig, destination: Path) -> Path:
    """Quantise a finished run's student, or any other model, into a folder that transformers loads.

    Tokenizer, chat template, image processor, generation config, licences and card go with it, as do the
    settings that evaluations take over. An adapter is merged into the model that it belongs to first.

    Args:
        source: a run folder, the folder of a student or of another model, or a name on the hub.
        config: to what.
        destination: the new folder.

    Returns:
        `destination`.

    Raises:
        ConfigError: `destination` has files already.
        ModelError: there is no model, it is quantised already, or its layers do not fit `config`.
        EnvironmentFault: the package that quantises is missing, or the folder cannot be written.
    """
    require_package(config)
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise ConfigError(
            Fault("--output", "is there already", got=str(destination), hint="Choose another folder.")
        )
    named = TeacherModel(path=str(source))
    model = load_teacher(named)
    if is_quantised(model):
        raise ModelError(f"{source}: is quantised already. Quantise the model that it was made from.")
    files = model_files(named.path)
    beside = Path(files.adapter or files.model)
    quantise_layers(model, config)
    fresh = destination.with_name(f".{destination.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with os_errors_as_faults(destination):
        save_quantised(model, config, fresh)
        load_tokenizer(named).save_pretrained(fresh)  # which may be another folder's, or in a GGUF file
        copy_kept(beside, fresh)
        _card(beside, config, parameter_counts(model)).save(fresh / CARD)
    replace_folder(fresh, destination)
    return destination


def described(config: QuantiseConfig) -> str:
    """What is done to the weights, in words."""
    return {
        "int8": "int8, symmetric, one scale for each row",
        "int4": f"int4, symmetric, one scale for each {config.group_size} weights of a row",
        "nf4": f"NF4, one scale for each {NF4_BLOCK} weights, scales quantised too",
    }[config.weights]


def _card(beside: Path, config: QuantiseConfig, counts: dict[str, Any]) -> ModelCard:
    """The card of the model that was quantised, with what was done to it."""
    path = beside / CARD
    if path.is_file():
        card = ModelCard.load(path)
    else:
        data = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
        card = ModelCard(f"---\n{data}\n---\n\n# {beside.name}\n")
    card.data.base_model_relation = "quantized"
    card.text = card.text.rstrip() + (
        f"\n\n## Quantised\n\n{counts['quantised']:,} of the {counts['parameters']:,} parameters are "
        f"quantised: {described(config)}. The head, embeddings and norms are not. transformers loads the "
        f"folder if `{PACKAGES[config.weights]}` is installed. What this card says above of answers, results "
        "and size was measured before.\n"
    )
    return card
