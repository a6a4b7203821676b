"""Digests of a model: its weights and everything else that its outputs depend on.

`fingerprint` hashes a model in memory; `fingerprint_of_files` its files, without loading it. The two digests
of one model differ.
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
from stillhouse.files import read_object, sha256_of, write_json
from stillhouse.models.config import TeacherModel
from stillhouse.models.hidden import unwrap
from stillhouse.models.paths import model_files, resolve_path
from stillhouse.models.processors import PROCESSOR_FILES
from stillhouse.models.quantise import stored_tensors

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.py")
CONFIG_FILES = ("config.json", "adapter_config.json", *PROCESSOR_FILES)
"""Also of what reads images for a model: another resolution gives other outputs."""
EXCLUDED_FILES = ("optimizer.bin", "training_args.bin", "scheduler.bin")
HASH_CACHE = "fingerprints.json"
_INCIDENTAL = ("architectures", "transformers_version", "use_cache", "dtype", "torch_dtype")
"""Config fields about how a model was saved or is run, not about what it computes."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that change with the architecture, the dtype or any weight.

    They do not change with the path of the model, its device or wrappers around it. Reads every weight once,
    about a second per gigabyte.
    """
    inner = unwrap(model)
    config = {
        key: value
        for key, value in inner.config.to_dict().items()
        if key not in _INCIDENTAL and not key.startswith("_")
    }
    description = json.dumps([type(inner).__name__, config], sort_keys=True, default=str)
    digest = hashlib.blake2b(description.encode(), digest_size=16)
    for name, tensor in sorted(inner.state_dict().items()):
        _add_tensor(digest, name, tensor)
    return digest.hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module, but: str | None = None) -> str:
    """32 hexadecimal digits that change with any weight.

    Unlike `fingerprint` it leaves out the configuration, whose fields differ between versions of
    transformers, so that it can be compared years later.

    Args:
        model: in memory.
        but: weights with this in their names do not count, such as those of a new adapter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(unwrap(model).state_dict().items()):
        if but is None or but not in name:
            _add_tensor(digest, name, tensor)
    return digest.hexdigest()


def _add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    for part, stored in stored_tensors(tensor).items():
        digest.update(f"{name}{part and f'.{part}'} {stored.dtype} {tuple(stored.shape)}".encode())
        digest.update(stored.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)


def fingerprint_of_files(
    model: TeacherModel, cache_dir: Path | None = None, batch_invariant: bool = False
) -> str:
    """16 hexadecimal digits that change with a model's weights, config, adapter, dtype or attention.

    Hashing gigabytes of weights takes seconds, so hashes are remembered by the path, size, times and inode of
    a file: a file that was changed in place has another change time, whatever its other times were set to.

    Args:
        model: where the files are and how they are loaded.
        cache_dir: the folder of the cached hashes; None: no cache.
        batch_invariant: whether the model runs on one sequence at a time, which rounds differently.

    Raises:
        ModelError: there are no weights on this machine.
    """
    known = {} if cache_dir is None else _read_cache(cache_dir / HASH_CACHE)
    before = dict(known)
    options: list[Any] = [model.dtype, model.gguf_file, batch_invariant]
    if model.attention != "auto":  # implementations of attention round differently
        options.append(model.attention)
    whole = hashlib.sha256(json.dumps(options).encode())
    named = model_files(model.path)
    adapters = [named.adapter] if named.adapter is not None else []
    for path in (named.model, *adapters, model.adapter):
        files = _files(_folder(path)) if path is not None else []
        if path is not None and all(file.name in CONFIG_FILES for file in files):
            raise ModelError(f"{path}: its weights are not on this machine.")
        for file in files:
            whole.update(f"{file.name} {_hash(file, known)}\n".encode())
        whole.update(b"--\n")
    if model.processor is not None:
        folder = _folder(model.processor)
        for file in sorted(folder / name for name in PROCESSOR_FILES if (folder / name).is_file()):
            whole.update(f"{file.name} {_hash(file, known)}\n".encode())
    if cache_dir is not None and known != before:
        with contextlib.suppress(OSError):
            write_json(cache_dir / HASH_CACHE, known)
    return whole.hexdigest()[:16]


def _folder(path: str) -> Path:
    """The local folder of a model; for a hub name the folder of its downloaded files."""
    folder = Path(resolve_path(path))
    if folder.is_dir():
        return folder
    from transformers.utils import cached_file

    for name in CONFIG_FILES:
        with contextlib.suppress(OSError):
            found = cached_file(path, name)
            if found is not None:
                return Path(found).parent
    return folder


def _files(folder: Path) -> list[Path]:
    found = {file for pattern in (*WEIGHT_FILES, *CONFIG_FILES) for file in folder.glob(pattern)}
    return sorted(file for file in found if file.name not in EXCLUDED_FILES)


def _hash(file: Path, known: dict[str, Any]) -> str:
    stat = file.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    name = str(file.resolve())
    entry = known.get(name)
    if isinstance(entry, list) and entry[:-1] == stamp:
        return str(entry[-1])
    digest = sha256_of(file)
    known[name] = [*stamp, digest]
    return digest


def verify_remembered(cache_dir: Path) -> tuple[int, list[str]]:
    """Hash every file again whose hash a cache folder remembers; a hash that was wrong is forgotten.

    Returns:
        How many hashes were right, and a sentence for each that was not.
    """
    remembered = _read_cache(cache_dir / HASH_CACHE)
    right: dict[str, Any] = {}
    faults = []
    for name, entry in remembered.items():
        try:
            found: dict[str, Any] = {}
            whole = entry[-1] == _hash(Path(name), found)
        except (OSError, TypeError, LookupError):
            continue  # gone: nobody takes its hash for that of another file
        if whole:
            right |= found
        else:
            faults.append(f"{name}: is not what it was when it was hashed; what is cached is of the former")
    if right != remembered and remembered:
        write_json(cache_dir / HASH_CACHE, right)
    return len(right), faults


def _read_cache(path: Path) -> dict[str, Any]:
    return read_object(path)
