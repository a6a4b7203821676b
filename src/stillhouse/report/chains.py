"""Chains as they lie on disk: folders with a run folder for each stage, in the order of chain.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "chain.json"
"""What makes a folder that of a chain."""


def read_chain(folder: Path) -> dict[str, Any]:
    """The content of chain.json; empty if the folder is not that of a chain, or the file cannot be read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stage_folders(folder: Path, chain: Mapping[str, Any]) -> list[Path]:
    """The folders of the stages that have begun, in order."""
    stages = chain.get("stages")
    names = (
        [one.get("name") for one in stages if isinstance(one, Mapping)] if isinstance(stages, list) else []
    )
    return [folder / name for name in names if isinstance(name, str) and (folder / name).is_dir()]
