"""Checkpoints that are whole or not at all.

A checkpoint counts only once its manifest (name, size and checksum of each file) is there, and the manifest
is written last and atomically. A kill during a save therefore leaves the one before in force.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stillhouse.core.distributed import rank_and_size
from stillhouse.errors import StillhouseError, TrainingError
from stillhouse.files import atomic, follow_umask, os_errors_as_faults, read_object, write_json

MANIFEST = "complete.json"
STATE = "stillhouse.pt"
PREFIX = "checkpoint-"

logger = logging.getLogger("stillhouse")


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write what the trainer does not save itself: curriculum, replay, meter, best score.

    Each process writes its own, because each has a replay buffer of its own.
    """
    with atomic(folder / _name_of_state(), "wb") as handle:
        torch.save(state, handle)


def load_state(folder: Path, dealt_out: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
    """Read back what `save_state` wrote.

    Args:
        folder: the checkpoint.
        dealt_out: what the step of this process has to load, from the steps of all processes that wrote the
            checkpoint; asked where these were more or fewer than there are now.

    Raises:
        TrainingError: a file cannot be read.
    """
    rank, size = rank_and_size()
    files = _states(folder)
    if len(files) == size:
        return _read_state(files[rank])
    if rank == 0:
        logger.warning(
            "%s is of %s, and goes on in %d: the prompts of each step, their order and the batch stay the "
            "same, replayed responses are dealt out anew, and dropout draws other numbers.",
            folder,
            _processes(len(files)),
            size,
        )
    states = [_read_state(path) for path in files]
    return {**states[0], "step": dealt_out([state["step"] for state in states])}


def check_readable(folder: Path, state: Any) -> None:
    """Refuse a checkpoint that is whole and yet not to be read by these processes.

    Args:
        folder: the checkpoint.
        state: accelerate's, of the trainer.

    Raises:
        TrainingError: another parallelism wrote it; or DeepSpeed in more or fewer processes, which keeps a
            part of the optimiser for each of them.
    """
    before, now = _written_under(folder), _parallelism(state)
    if before != now:
        raise TrainingError(
            f"{folder}: it was written under {before}, and this run is under {now}, which does not read its "
            "weights and optimiser. Resume it with the launcher and the configuration that it had, or start "
            "a new run from its weights."
        )
    saved, (_, size) = len(_states(folder)), rank_and_size()
    if saved != size and before.startswith("DeepSpeed"):
        raise TrainingError(
            f"{folder}: {_processes(saved)} wrote it under {before}, which keeps a part of the optimiser for "
            f"each and cannot deal them out to {_processes(size)}. Resume it in {_processes(saved)}, or "
            "start a new run from its weights."
        )


def _written_under(folder: Path) -> str:
    """The parallelism of the run that wrote a checkpoint, by its files."""
    if any(folder.glob("global_step*/*_model_states.pt")):
        return _deepspeed(3 if any(folder.glob("global_step*/zero_pp_*_model_states.pt")) else 2)
    if (folder / "pytorch_model_fsdp.bin").is_file():
        return _fsdp("FULL_STATE_DICT")
    if any(folder.glob("pytorch_model_fsdp_*/*.distcp")):
        return _fsdp("SHARDED_STATE_DICT")
    return "DDP or in one process"


def _parallelism(state: Any) -> str:
    """That of these processes, in the words of `_written_under`."""
    if (plugin := getattr(state, "deepspeed_plugin", None)) is not None:
        return _deepspeed(plugin.deepspeed_config["zero_optimization"]["stage"])
    if (plugin := getattr(state, "fsdp_plugin", None)) is not None:
        return _fsdp(plugin.state_dict_type.name)
    return "DDP or in one process"


def _deepspeed(stage: int) -> str:
    """Stages below 3 have the same files."""
    return "DeepSpeed ZeRO-3" if stage == 3 else "DeepSpeed ZeRO-2"


def _fsdp(state_dict: str) -> str:
    return f"FSDP with {state_dict}"


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def _states(folder: Path) -> list[Path]:
    """The states that processes have written, by rank."""
    return [folder / STATE, *sorted(folder.glob("stillhouse-*.pt"), key=_rank_of)]


def _read_state(path: Path) -> dict[str, Any]:
    with reading(path.parent, path.name):
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if not isinstance(state["step"], dict) or not {"best", "batch_size"} <= state.keys():
            raise ValueError("it holds something else")
        return state


def _name_of_state() -> str:
    rank, _ = rank_and_size()
    return f"stillhouse-{rank}.pt" if rank else STATE


def _rank_of(path: Path) -> int:
    number = path.stem.removeprefix("stillhouse-")
    return int(number) if number.isdigit() else 0


@contextlib.contextmanager
def reading(folder: Path, name: str) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is read into a message that names it.

    Raises:
        TrainingError: the file is damaged, of another student, or holds what must not be loaded.
    """
    try:
        yield
    except (StillhouseError, MemoryError):
        raise
    except Exception as error:
        told = str(error).strip() or type(error).__name__
        raise TrainingError(
            f"{folder}: {name} cannot be used: it is damaged, or of another student or another version of "
            f"torch ({told.splitlines()[0][:200]}). Delete this checkpoint to go on from the one before it, "
            "or start a new run."
        ) from error


def load_renamed(model: Any, folder: Path) -> None:
    """Load the weights of a checkpoint that has them under other names than the model.

    transformers writes vision-language models and mixtures of experts under the names of their first release;
    its Trainer does not translate them back, and would go on with the weights that the run began with.

    Args:
        model: a transformers model without wrappers.
        folder: the checkpoint.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, "pt") as weights:
        known = set(weights.keys()) <= model.state_dict().keys()
    if not known:
        saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def seal(folder: Path) -> None:
    """Declare a checkpoint whole."""
    follow_umask(folder)
    files = {
        str(p.relative_to(folder)): _facts(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": 1, "files": files})


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return "was cut short while it was written"
    files = read_object(manifest).get("files")
    if not isinstance(files, dict) or not files:
        return f"has a damaged {MANIFEST}"
    for name, facts in files.items():
        if not (folder / name).is_file():
            return f"lacks {name}"
        if _facts(folder / name) != facts:
            return f"has a damaged {name}"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. Damaged ones are named in a warning and passed over."""
    found = sorted(numbered(folder), key=step_of, reverse=True)
    for checkpoint in found:
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s %s; going back to the checkpoint before it.", checkpoint, fault)
    if found:
        logger.warning("%s: no checkpoint in it is whole; training begins again at its first step.", folder)
    return None


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; a damaged one never pushes out a whole one."""
    by_age = sorted(numbered(folder), key=step_of, reverse=True)
    whole = [checkpoint for checkpoint in by_age if (checkpoint / MANIFEST).is_file()]
    for checkpoint in by_age:
        if checkpoint not in whole[:keep]:
            remove(checkpoint)


def drop_after(folder: Path, step: int) -> None:
    """Delete checkpoints after `step`: those that a resumed run has passed over as damaged and writes again.

    Left there, they would count as the newest when old ones are deleted.
    """
    for checkpoint in numbered(folder):
        if step_of(checkpoint) > step:
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; at no moment does half of it look whole."""
    with contextlib.suppress(IsADirectoryError, PermissionError):  # a folder in its place looks like none
        (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def numbered(folder: Path) -> list[Path]:
    """All checkpoint folders, whole or not."""
    found = folder.glob(f"{PREFIX}*") if folder.is_dir() else iter(())
    return [path for path in found if path.name.removeprefix(PREFIX).isdigit()]


def step_of(checkpoint: Path) -> int:
    """The optimiser step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix(PREFIX))


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in the place of another, so that `final` is never half-written."""
    old = final.with_name(f".{final.name}.old")
    with os_errors_as_faults(final):
        follow_umask(new)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)


def _facts(path: Path) -> list[int]:
    checksum = 0
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]
