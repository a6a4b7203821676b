"""What the tokens of a dataset depend on, as one key: contents, never places."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from stillhouse.core import images, types
from stillhouse.core.versions import installed_version
from stillhouse.data.chunks import ChunkEncoder
from stillhouse.data.formats import FORMATS
from stillhouse.data.tokenise import Encoder

FORMAT = 1
"""Counts up when the files of tokens change their form."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_OWN = Path(__file__).parent
_SETTINGS = frozenset({
    "too_long", "max_prompt", "max_response", "no_response", "bad_rows", "ignore", "images",
})  # fmt: skip
"""The fields of `data` that decide what becomes of a row, beside those that the encoder holds."""


def token_key(work: ChunkEncoder) -> str | None:
    """A digest of all that the tokens of a dataset depend on: rows, tokenizers, templates, settings, code.

    None where that is not all known: rows that a Python program holds, a tokenizer without tokenizer.json.
    """
    rows, encoder = work.dataset.content_digest(), _encoder(work.encoder)
    if rows is None or encoder is None:
        return None
    reads, config = work.teacher, work.config
    row_teacher = config.row_teacher if work.name == "train" else None
    facts = {
        "format": FORMAT,
        "code": code_digest(_foreign_files(work.encoder)),
        "libraries": {name: installed_version(name) for name in _LIBRARIES},
        "rows": rows,
        "encoder": encoder,
        "settings": config.model_dump(mode="json", include=set(_SETTINGS)),
        "needs": sorted(work.needs),
        "teacher": reads and [reads.other_vocabulary, reads.vocab, reads.context, reads.mixed],
        "contexts": work.contexts,
        "row_teacher": row_teacher and row_teacher.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _encoder(encoder: Encoder) -> dict[str, Any] | None:
    tokenizer = _tokenizer(encoder.tokenizer)
    teacher = encoder.teacher and _encoder(encoder.teacher)
    if tokenizer is None or (encoder.teacher and teacher is None):
        return None
    return {
        "tokenizer": tokenizer,
        "template": [encoder.template.kind, encoder.template.model_dump(mode="json")],
        "train_on": encoder.train_on,
        "end": encoder.end_id,
        "reads_images": encoder.expander is not None,  # else rows with images are left out
        "differs_in_images": encoder.differs_in_images,
        "teacher": teacher,
    }


def _tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    """All of a tokenizer that changes ids; None for one whose state cannot be written as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    state |= {"truncation": None, "padding": None}  # what the last call wanted, and every call sets
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "state": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest(),
        "chat_template": template,
        "date": datetime.date.today().isoformat() if "strftime_now" in template else None,
        "special": [list(map(str, tokenizer.all_special_tokens)), list(tokenizer.all_special_ids)],
        "splits_special": bool(getattr(tokenizer, "split_special_tokens", False)),
    }


def _foreign_files(encoder: Encoder) -> tuple[Path, ...]:
    """Where parts are written that are not of this package: row formats, templates, tokenizers."""
    parts: list[Any] = [*FORMATS, encoder.template, encoder.tokenizer]
    if encoder.teacher is not None:
        parts += [encoder.teacher.template, encoder.teacher.tokenizer]
    files = {inspect.getsourcefile(type(part)) for part in parts}
    return tuple(sorted(path for path in map(Path, filter(None, files)) if _OWN not in path.parents))


@lru_cache
def code_digest(foreign: Iterable[Path]) -> str:
    """A digest of the code that turns rows into tokens."""
    named = [inspect.getsourcefile(module) for module in (images, types)]
    digest = hashlib.sha256()
    for path in (*sorted(_OWN.rglob("*.py")), *map(Path, filter(None, named)), *foreign):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
