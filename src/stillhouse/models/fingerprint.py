"""Who a model is: a digest of its weights and of everything else that its numbers depend on.

`fingerprint` reads a model in memory, as it is at that moment; `fingerprint_of_files` what is on disk, for
who must not load it. The two give different digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.errors import ModelError
from stillhouse.files import write_json
from stillhouse.models.config import TeacherModel
from stillhouse.models.hidden import unwrap
from stillhouse.models.load import place

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.py")
CONFIGS = ("config.json", "adapter_config.json")
NOT_WEIGHTS = ("optimizer.bin", "training_args.bin", "scheduler.bin")
REMEMBERED = "fingerprints.json"
_INCIDENTAL = ("architectures", "transformers_version", "use_cache", "dtype", "torch_dtype")
"""What a configuration says about how a model was saved or is run, not about what it computes."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A digest of 32 hexadecimal digits that another architecture, data type or weight changes.

    The place that the model was loaded from, its device and the wrappers around it do not change it. It
    reads every weight once, about a second for each gigabyte.
    """
    inner = unwrap(model)
    config = {
        key: value
        for key, value in inner.config.to_dict().items()
        if key not in _INCIDENTAL and not key.startswith("_")
    }
    about = json.dumps([type(inner).__name__, config], sort_keys=True, default=str)
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name, tensor in sorted(inner.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def fingerprint_of_files(model: TeacherModel, memory: Path | None = None, alone: bool = False) -> str:
    """16 hexadecimal digits that change with a model's weights, configuration, adapter or number format.

    Reading gigabytes of weights takes seconds, so a file's hash is remembered in `memory` together with its
    size and the time of its last change, and used again while these are the same.

    Args:
        model: where the files are, and how they are read.
        memory: the folder in which hashes of files are remembered; None: nowhere.
        alone: whether it is run on one sequence at a time, which rounds otherwise.

    Raises:
        ModelError: there are no weights at the path.
    """
    known = {} if memory is None else _remembered(memory / REMEMBERED)
    before = dict(known)
    options = [model.dtype, model.gguf_file, alone]
    whole = hashlib.sha256(json.dumps(options).encode())
    for path in (model.path, model.adapter):
        files = _files(_folder(path)) if path is not None else []
        if path is not None and all(file.name in CONFIGS for file in files):
            raise ModelError(f"{path}: its weights are not on this machine.")
        for file in files:
            whole.update(f"{file.name} {_hash(file, known)}\n".encode())
        whole.update(b"--\n")
    if memory is not None and known != before:
        with contextlib.suppress(OSError):
            write_json(memory / REMEMBERED, known)
    return whole.hexdigest()[:16]


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
