"""Answers on disk, by the content of what was asked, so that no question is put twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.files import append_jsonl, readable_jsonl

logger = logging.getLogger("stillhouse")

Body = Mapping[str, Any]


class Journal:
    """An append-only file of answers. What a line that was cut short or damaged held is asked for again.

    Example:
        >>> journal = Journal(Path("answers.jsonl"))
        >>> journal.put(body, {"token_ids": [5, 2], "finished": True})
        >>> journal.get(body)
        {'token_ids': [5, 2], 'finished': True}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows, damaged = readable_jsonl(path)
        whole = [row for row in rows if row.keys() >= {"asked", "answer"}]
        self._known = {row["asked"]: row["answer"] for row in whole}
        if damaged := damaged + len(rows) - len(whole):
            logger.warning("%s: %s lines are damaged; what they held is asked for again.", path, damaged)

    def get(self, body: Body) -> Any:
        """The answer to a request; None if it was never answered."""
        return self._known.get(key_of(body))

    def put(self, body: Body, answer: Any) -> None:
        """Keep an answer; it is on disk when this returns."""
        key = key_of(body)
        self._known[key] = answer
        append_jsonl(self.path, {"asked": key, "answer": answer})

    def __len__(self) -> int:
        return len(self._known)


def key_of(body: Body) -> str:
    """What a request asks, in 40 characters. Equal requests have equal keys, whatever the order of fields."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:40]
