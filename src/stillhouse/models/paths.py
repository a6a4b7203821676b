"""Where models are: local folders, runs of ours, adapters, packaged models and names on the hub."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.config import nearest
from stillhouse.errors import ModelError, StillhouseError
from stillhouse.files import ROWS_FILE, locate

FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".yaml")
ADAPTER_FILE = "adapter_config.json"
BASE_FOLDER = "base"
"""Where an exported adapter has the model that it belongs to, in its own folder."""


def resolve_path(path: str) -> str:
    """The local folder at `path`, else `path` itself, taken as a hub name. A run stands for its student.

    Raises:
        ModelError: it looks like a local path and is not a folder, or is a run without a student.
    """
    folder = locate(path)
    if is_run(folder):
        if not has_student(folder):
            if (folder / ROWS_FILE).is_file():
                raise ModelError(f"{path}: is a stage that made data ({ROWS_FILE}), and has no student.")
            raise ModelError(
                f"{path}: is a run that has not exported its student. Finish it: stillhouse run ... --resume"
            )
        return str(folder / "student")
    if (folder / "chain.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{path}: is a chain of runs. Name one of its stages, such as {path}/STAGE.")
    if folder.is_dir():
        return str(folder)
    if _looks_local(path, folder):
        if folder.suffix == ".gguf" and folder.is_file():
            raise ModelError(
                f"{path}: is a file. Name its folder as path and the file as gguf_file: "
                f"{{path: {Path(path).parent}, gguf_file: {folder.name}}}"
            )
        problem = "is a file, not a folder" if folder.is_file() else f"does not exist{_similar(folder)}"
        raise ModelError(
            f"{path}: {problem}. A model path is a folder with config.json and weights, or a hub name "
            "like org/name."
        )
    return path


def _looks_local(path: str, folder: Path) -> bool:
    """Whether a path that is no folder is meant as one: then no hub is asked for it."""
    name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path)
    return name is None or folder.exists() or folder.suffix in FILE_ENDINGS or folder.parent.is_dir()


@contextlib.contextmanager
def foreign_files(problem: str, hint: str = "") -> Iterator[None]:
    """Turn whatever another library raises while it reads files of a model into a `ModelError`.

    Damaged or poisoned files fail wherever a library stumbles over them, by no common type.

    Args:
        problem: the path, and what could not be done with it.
        hint: follows the library's own message.
    """
    try:
        yield
    except StillhouseError:
        raise
    except Exception as error:
        raise ModelError(f"{problem}. {error_summary(error)}{hint}") from error


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "state.json").is_file() and (folder / "resolved.yaml").is_file()


def has_student(run: Path) -> bool:
    """Whether a run folder has an exported student: a whole model or an adapter."""
    return any((run / "student" / name).is_file() for name in ("config.json", ADAPTER_FILE))


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a model path stands for: the folder or hub name of a whole model, and of an adapter for it.

    Example: `ModelFiles("runs/kd/student/base", adapter="runs/kd/student")`
    """

    model: str
    adapter: str | None = None


def model_files(path: str) -> ModelFiles:
    """The model at a path and, where the path is a LoRA adapter's, the adapter and the model it belongs to.

    Raises:
        ModelError: see `resolve_path`; or the adapter does not say which model it belongs to.
    """
    folder = Path(resolve_path(path))
    if not (folder / ADAPTER_FILE).is_file() or (folder / "config.json").is_file():
        return ModelFiles(str(folder) if folder.is_dir() else path)
    if (folder / BASE_FOLDER / "config.json").is_file():
        return ModelFiles(str(folder / BASE_FOLDER), str(folder))
    try:
        named = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if not isinstance(named, str) or not named:
        raise ModelError(
            f"{path}: is a LoRA adapter, and its {ADAPTER_FILE} does not say which model it belongs to "
            "(base_model_name_or_path)."
        )
    try:
        return ModelFiles(resolve_path(named), str(folder))
    except ModelError as error:
        raise ModelError(f"{path}: is a LoRA adapter whose base model is missing. {error}") from error


def resolve_adapter(path: str) -> str:
    """As `resolve_path`, for a LoRA adapter.

    Raises:
        ModelError: it is a folder without an adapter, or no folder.
    """
    folder = resolve_path(path)
    if Path(folder).is_dir() and not (Path(folder) / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{path}: is not the folder of a LoRA adapter: it has no adapter_config.json. A whole model is "
            "named by path."
        )
    return folder


def path_hint(path: str, gguf_file: str | None) -> str:
    """For messages about a model that could not be read: what the folder has or lacks.

    Args:
        path: a folder, or a hub name that may be a mistyped folder.
        gguf_file: the file in it that was asked for.
    """
    folder = locate(path)
    if folder.is_dir() and gguf_file is None and not (folder / "config.json").is_file():
        packed = sorted(file.name for file in folder.glob("*.gguf"))
        return (
            f" It holds GGUF: set gguf_file: {' or '.join(packed)}." if packed else " It has no config.json."
        )
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
