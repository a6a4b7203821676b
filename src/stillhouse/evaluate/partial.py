"""What an evaluation has done so far, on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stillhouse.files import append_jsonl, write_jsonl


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
        self._begun = False
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        rows = [row for line in text.split("\n") if (row := _parsed(line)) is not None]
        if not rows or rows[0].get("header") != self.header:
            return
        kept = [row for row in rows[1:] if "key" in row and "value" in row]
        self._pieces = {row["key"]: row["value"] for row in kept}
        self._begun = True
        if text.count("\n") != len(kept) + 1 or not text.endswith("\n"):
            # What is appended must not continue a line that was cut.
            write_jsonl(path, [rows[0], *kept])

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


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


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
