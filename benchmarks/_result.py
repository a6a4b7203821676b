"""What every file of results says beside its rows: how, when, with which versions and threads it was made."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from stillhouse.core.versions import installed_version
from stillhouse.files import write_json

RESULTS = Path(__file__).parent / "results"


def result(rows: Any, packages: Iterable[str] = ("transformers",), **facts: Any) -> dict[str, Any]:
    """The content of a file of results.

    Args:
        rows: what was measured.
        packages: whose versions the numbers depend on, besides Python, Stillhouse and torch.
        facts: what else is to be known; `command`, `versions` (further ones) and `threads` go before what is
            found here.
    """
    versions: dict[str, Any] = {"python": platform.python_version()}
    versions |= {name: installed_version(name) for name in ("stillhouse", "torch", *packages)}
    script, *arguments = sys.argv
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments]),
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        **facts,
        "versions": {**versions, **facts.get("versions", {})},
        "rows": rows,
    }


def save(path: Path | None, found: dict[str, Any]) -> None:
    """Write a result, whole or not at all; nothing without a path."""
    if path is not None:
        write_json(path, found)
