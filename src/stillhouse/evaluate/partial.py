"""What an evaluation has done so far, on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stillhouse.files import append_jsonl, readable_jsonl


class Partial:
    """Finished pieces by key, in a JSONL file whose first line says what they belong to.

    A file with another header (other settings, prompts or weights) is begun anew: pieces of two different
    evaluations are never mixed. Lines that a kill has cut, or that cannot be read, are work to be done again.

    Example:
        >>> partial = Partial(Path("evaluation/.partial/teacher.dolly.jsonl"), {"weights": "5f0c"})
        >>> partial.get("10/0")
        >>> partial.put("10/0", {"seconds": 1.2, "answers": [...]})
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        """Read what is there; with `path=None` nothing outlives the process."""
        self.path = path
        self.header = json.loads(json.dumps(header, default=str))
        self._pieces: dict[str, Any] = {}
        rows = readable_jsonl(path)[0] if path is not None else []
        self._begun = bool(rows) and rows[0].get("header") == self.header
        if self._begun:
            self._pieces = {row["key"]: row["value"] for row in rows[1:] if row.keys() >= {"key", "value"}}

    def get(self, key: str) -> Any | None:
        """A finished piece; None if it is still to be done."""
        return self._pieces.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a finished piece; `value` is anything that JSON holds."""
        self._pieces[key] = value
        if self.path is None:
            return
        if not self._begun:
            self.path.unlink(missing_ok=True)
            append_jsonl(self.path, {"header": self.header})
            self._begun = True
        append_jsonl(self.path, {"key": key, "value": value})


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for anything that JSON holds."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_prompts(prompts: Iterable[Any]) -> str:
    """Stands for the token ids and references of prompts, in their order."""
    return digest([[prompt.token_ids, prompt.references] for prompt in prompts])


def digest_of_questions(prompts: Iterable[Any]) -> str:
    """Stands for what is asked and the right answers, whatever the template and the tokenizer: results are
    comparable where it is the same."""
    return digest([[prompt.question, prompt.references] for prompt in prompts])
