"""Where models are: local folders, packaged models and names on the hub."""

from __future__ import annotations

from pathlib import Path

from stillhouse.config import nearest
from stillhouse.errors import ModelError
from stillhouse.files import PACKAGE, locate


def resolve_path(path: str) -> str:
    """The local folder at `path`, else `path` itself, taken as a hub name.

    Raises:
        ModelError: it looks like a local path and is not a folder.
    """
    folder = locate(path)
    if folder.is_dir():
        return str(folder)
    looks_local = path.startswith((PACKAGE, "/", ".", "~")) or path.count("/") != 1 or folder.exists()
    if looks_local:
        problem = "is a file, not a folder" if folder.is_file() else f"does not exist{_similar(folder)}"
        raise ModelError(
            f"{path}: {problem}. A model path is a folder with config.json and weights, or a hub name "
            "like org/name."
        )
    return path


def resolve_adapter(path: str) -> str:
    """As `resolve_path`, for a LoRA adapter.

    Raises:
        ModelError: it is a folder without an adapter, or no folder.
    """
    folder = resolve_path(path)
    if Path(folder).is_dir() and not (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(
            f"{path}: is not the folder of a LoRA adapter: it has no adapter_config.json. A whole model is "
            "named by path."
        )
    return folder


def missing_folder_hint(path: str) -> str:
    """For messages about a hub name that may be a mistyped folder: that there is no such folder either."""
    folder = locate(path)
    if folder.exists() or "/" not in path or not folder.parent.is_dir():
        return ""
    return f" Nor does the folder {folder.parent} hold {folder.name}{_similar(folder)}."


def error_summary(error: Exception) -> str:
    """The type and the first line of another library's error, in brackets; empty if it has no message."""
    message = str(error).strip()
    return f"({type(error).__name__}: {message.splitlines()[0][:300]})" if message else ""


def _similar(folder: Path) -> str:
    siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return nearest(folder.name, siblings)
