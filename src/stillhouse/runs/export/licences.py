"""What is known about the licences of teacher, student's start and data: said in the configuration, or found
beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillhouse.data.datasets import DatasetConfig
from stillhouse.files import locate
from stillhouse.runs.config import RunConfig

UNKNOWN = "not known; ask whoever gave it to you"

HUB = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "artistic-2.0",
    "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "c-uda", "cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "epl-2.0", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "isc", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "mpl-2.0", "odc-by",
    "odbl", "openrail++", "unlicense", "other",
}  # fmt: skip
"""Identifiers that the Hugging Face hub takes; anything else becomes `other` with a name."""


def licences(config: RunConfig) -> dict[str, str | None]:
    """The licences of "student", "teacher", "start" and each "data: NAME"; None where unknown."""
    said = config.output.licence
    found: dict[str, str | None] = {"student": said.student}
    teacher = getattr(config.teacher, "path", None)
    if config.teacher is not None:
        found["teacher"] = said.teacher or (of_model(str(teacher)) if teacher else None)
    if config.student.path is not None:
        found["start"] = of_model(config.student.path)
    sources = {"train": config.data.train, "valid": config.data.valid, "text": config.data.text}
    for name, source in sources.items():
        if source is not None:
            found[f"data: {name}"] = said.data or of_data(source)
    return found


def of_model(path: str) -> str | None:
    """What the card of a model says: in its folder, or in the local cache of the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = locate(path)
    if folder.is_dir():
        return _of_card(folder / "README.md")
    try:
        card = try_to_load_from_cache(path, "README.md")
    except HFValidationError:
        return None
    return _of_card(Path(card)) if isinstance(card, str) else None


def of_data(source: DatasetConfig) -> str | None:
    """What the card beside a file says, or the description of a saved data set."""
    path = locate(source.path)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        return None
    for info in (folder / "dataset_info.json", folder / "train" / "dataset_info.json"):
        licence = _json(info).get("license")
        if isinstance(licence, str) and licence:
            return licence
    return _of_card(folder / "README.md")


def _of_card(path: Path) -> str | None:
    from huggingface_hub.repocard import metadata_load

    if not path.is_file():
        return None
    try:
        facts = metadata_load(path)
    except Exception:  # noqa: BLE001  (somebody else's file: whatever is wrong with it, it tells no licence)
        return None
    licence = (facts or {}).get("license_name") or (facts or {}).get("license")
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    return str(licence) if licence else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
