"""Who a teacher is: a hash of everything in its files that its numbers depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.files import write_json
from stillhouse.models.config import TeacherModel
from stillhouse.models.load import place

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.py")
CONFIGS = ("config.json", "adapter_config.json")
NOT_WEIGHTS = ("optimizer.bin", "training_args.bin", "scheduler.bin")
REMEMBERED = "fingerprints.json"


def fingerprint(model: TeacherModel, memory: Path) -> str:
    """16 hexadecimal digits that change with the teacher's weights, configuration, adapter or number format.

    Reading gigabytes of weights takes seconds, so a file's hash is remembered in `memory` together with its
    size and the time of its last change, and used again while these are the same.

    Args:
        model: which teacher.
        memory: the folder in which hashes of files are remembered.

    Raises:
        ModelError: there is no model at the path.
    """
    known = _remembered(memory / REMEMBERED)
    before = dict(known)
    options = [model.dtype, model.gguf_file, getattr(model, "alone", False)]
    whole = hashlib.sha256(json.dumps(options).encode())
    for path in (model.path, model.adapter):
        files = _files(_folder(path)) if path is not None else []
        if path is not None and not files:
            raise ModelError(f"{path}: its files are not on this machine.")
        for file in files:
            whole.update(f"{file.name} {_hash(file, known)}\n".encode())
        whole.update(b"--\n")
    if known != before:
        with contextlib.suppress(OSError):
            write_json(memory / REMEMBERED, known)
    return whole.hexdigest()[:16]


def tokenizer_digest(vocabulary: Mapping[str, int]) -> str:
    """16 hexadecimal digits that change with which id is which token."""
    rows = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _folder(path: str) -> Path:
    """The local folder of a model; for a hub name that of the files that were fetched."""
    folder = Path(place(path))
    if folder.is_dir():
        return folder
    from transformers.utils import cached_file

    for name in CONFIGS:
        with contextlib.suppress(OSError):
            found = cached_file(path, name)
            if found is not None:
                return Path(found).parent
    return folder


def _files(folder: Path) -> list[Path]:
    found = {file for pattern in (*WEIGHTS, *CONFIGS) for file in folder.glob(pattern)}
    return sorted(file for file in found if file.name not in NOT_WEIGHTS)


def _hash(file: Path, known: dict[str, Any]) -> str:
    facts = file.stat()
    stamp = [facts.st_size, facts.st_mtime_ns]
    name = str(file.resolve())
    if (entry := known.get(name)) is not None and entry[:2] == stamp:
        return str(entry[2])
    with open(file, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    known[name] = [*stamp, digest]
    return digest


def _remembered(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {}
