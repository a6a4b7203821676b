"""What a run is made of, by digest: data, tokenizer, template, models. A resumed run must find the same.

Places may change (a folder moved), what is there may not: half of the steps would have been trained on other
rows, and nothing in the folder would say so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.core.requirements import teacher_path
from stillhouse.core.types import Prompt, Response
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import read_object
from stillhouse.models import vocab_digest, weights_digest
from stillhouse.models.paths import is_run, resolve_path
from stillhouse.runs.build import Parts
from stillhouse.runs.history import Changes

FILE = "inputs.json"
SHOWN = 12
"""Digits of a digest in messages."""


def input_digests(parts: Parts) -> dict[str, dict[str, Any]]:
    """What a loaded run is made of: name -> its `path` and `digest`, for data also that of the `file`."""
    config, data = parts.config, parts.data
    found: dict[str, dict[str, Any]] = {
        "tokenizer": {
            "path": config.student.tokenizer or config.student.path,
            "digest": vocab_digest(parts.tokenizer.get_vocab()),
        },
        "template": {
            "path": None,
            "digest": _digest(parts.tokenizer.chat_template),
        },
    }
    rows: dict[str, Sequence[Prompt | Response]] = {
        "train": data.train,
        "valid": data.valid,
        "text": data.text,
    }
    for report in data.report["sets"]:
        found[f"data.{report['name']}"] = {
            "path": report["path"],
            "digest": _tokens(rows[report["name"]]),
            "file": report["sha256"],
        }
    if parts.pruning is not None and parts.pruning["choose"] == "importance":
        found["student"] = {"path": None, "digest": parts.pruning["digest"]}
    if config.student.path is not None:  # any other start follows from the configuration and the teacher
        new = "lora_" if config.student.lora is not None else None
        found["student"] = {"path": config.student.path, "digest": weights_digest(parts.student, but=new)}
    for name, model in parts.teachers.items():
        if model is not None:
            place = getattr(config.all_teachers[name].model_to_load(), "path", None)
            digest = parts.sharded_digests.get(name) or weights_digest(model)
            found[teacher_path(name)] = {"path": place, "digest": digest}
        elif (served := config.all_teachers[name].served_model()) is not None:
            found[teacher_path(name)] = {"path": served["path"], "digest": served["digest"]}
    return found


def check_inputs(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, moved: Changes) -> None:
    """Refuse to go on with other data or models than those of the steps so far.

    Args:
        before: the inputs that the run was started with; empty if a version that did not record them did.
        now: what is there now.
        folder: the run folder.
        moved: the settings that changed.

    Raises:
        ConfigError: naming each that changed, with both digests.
    """
    hint = f"Put back what was there, or start a new run: name=NEW, or name=NEW --from {folder}."
    if not before:
        unknown = [path for path in moved if path.endswith(("path", "tokenizer", "adapter"))]
        if unknown:
            problem = f"{folder} has no digests that could tell whether the same is there"
            raise ConfigError(*(Fault(path, problem, got=str(moved[path][1]), hint=hint) for path in unknown))
        return
    faults = [
        Fault(name, _told(name, before.get(name), now.get(name)), hint=hint)
        for name in dict.fromkeys((*before, *now))
        if _of(before.get(name)) != _of(now.get(name))
    ]
    if faults:
        raise ConfigError(*faults)


def parent_of(path: str | None, digest: str | None) -> dict[str, Any] | None:
    """The run whose student a model path stands for; None if it is not that of a run.

    Args:
        path: `student.path`.
        digest: of its weights, as `inputs.json` has it.
    """
    if path is None:
        return None
    folder = Path(resolve_path(path))
    above = folder.parent
    if folder.name != "student" or not is_run(above):
        return None
    state = read_object(above / "state.json")
    return {"run": state.get("name"), "folder": str(above), "digest": digest}


def _told(name: str, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    if before is None or now is None:
        return "was not part of the run" if before is None else "is no longer part of the run"
    old, new = str(before.get("digest"))[:SHOWN], str(now.get("digest"))[:SHOWN]
    what = f"is not what the run was started with: digest {old}, now {new} ({now.get('path') or 'no path'})"
    if before.get("file") is not None and before.get("file") == now.get("file"):
        return f"{what}; the file is the same, but its rows are read as other tokens"
    return what


def _of(entry: Mapping[str, Any] | None) -> Any:
    return None if entry is None else entry.get("digest")


def _tokens(sequences: Iterable[Prompt | Response]) -> str:
    """Digest of what is trained on, in order: token ids of prompts and responses, images, and references."""
    digest = hashlib.blake2b(digest_size=16)
    for one in sequences:
        prompt = one.prompt if isinstance(one, Response) else one
        response = one.token_ids if isinstance(one, Response) else one.response_ids
        for ids in (prompt.token_ids, response or (), prompt.teacher_ids or ()):
            _add_ids(digest, ids)
        for _, ids in sorted(prompt.context_ids.items()):
            _add_ids(digest, ids)
        for more in (prompt.rejected_ids, prompt.direct_ids):
            if more is not None:
                _add_ids(digest, more)
        digest.update("".join(prompt.image_digests).encode())
        digest.update("\0".join(prompt.references).encode(errors="surrogatepass"))
    return digest.hexdigest()


def _add_ids(digest: Any, ids: Sequence[int]) -> None:
    digest.update(len(ids).to_bytes(4, "little"))
    digest.update(np.asarray(ids, dtype="<i4").tobytes())


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
