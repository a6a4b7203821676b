"""The licences of what a student comes from: given in the configuration, or found in model and data cards."""

from __future__ import annotations

import contextlib
from pathlib import Path

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from stillhouse.data.datasets import DatasetConfig
from stillhouse.files import locate
from stillhouse.runs.config import RunConfig
from stillhouse.urls import is_remote

HUB_LICENCES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "artistic-2.0",
    "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "c-uda", "cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "epl-2.0", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "isc", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "mpl-2.0", "odc-by",
    "odbl", "openrail++", "unlicense", "other",
}  # fmt: skip
"""Identifiers that the Hugging Face hub takes; anything else becomes `other` with a name."""


def find_licences(config: RunConfig) -> dict[str, str | None]:
    """The licences of this model, its teacher, what it started from and its data; None where unknown."""
    named = config.output.licence
    found: dict[str, str | None] = {"this model": named.student}
    if config.teacher is not None:
        path = getattr(config.teacher, "path", None)
        found["teacher"] = named.teacher or (of_model(str(path)) if path else None)
    if config.student.path is not None:
        found["what it started from"] = of_model(config.student.path)
    for name in ("train", "valid", "text"):
        dataset = getattr(config.data, name)
        if dataset is not None:
            found[f"data: {name}"] = named.data or of_data(dataset)
    return found


def of_model(path: str) -> str | None:
    """What the card of a model says: in its folder, or in the local cache of the hub."""
    folder = locate(path)
    if folder.is_dir():
        return _of_card(folder / "README.md")
    with contextlib.suppress(HFValidationError):  # neither a folder nor a name on the hub
        card = try_to_load_from_cache(path, "README.md")
        return _of_card(Path(card)) if isinstance(card, str) else None
    return None


def of_data(dataset: DatasetConfig) -> str | None:
    """What saved data sets say about themselves, or the cards beside files."""
    found = {_of_path(locate(part.title)) for part in dataset.parts()} - {None}
    return ", ".join(sorted(filter(None, found))) or None


def _of_path(path: Path) -> str | None:
    from datasets import DatasetInfo

    if is_remote(path) or not path.exists():
        return None
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder / "train"):
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # missing, or not legible
            if licence := DatasetInfo.from_directory(str(place)).license:
                return str(licence)
    return _of_card(folder / "README.md")


def _of_card(path: Path) -> str | None:
    try:
        facts = metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's file: missing, or not legible
        return None
    licence = facts.get("license_name") or facts.get("license")
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence) if licence else None
