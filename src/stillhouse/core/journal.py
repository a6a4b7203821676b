"""Results kept on disk piece by piece, so that an interruption loses nothing computed or paid for."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stillhouse.files import append_jsonl, read_jsonl_leniently

logger = logging.getLogger("stillhouse")


class Journal:
    """Results by key in an append-only JSONL file; a killed process loses at most the one it was computing.

    Keys are either the whole story (a digest of a request), or name a piece of something that the header in
    the first line describes (settings, prompts, weights). A file with another header is started anew: pieces
    of two different computations never mix. What a torn or damaged line held is computed again.

    Example:
        >>> journal = Journal(Path("evaluation/.partial/teacher.dolly.jsonl"), {"weights": "5f0c"})
        >>> journal.get("10/0")
        >>> journal.put("10/0", {"seconds": 1.2, "answers": [[[41, 2], True]]})
    """

    def __init__(
        self,
        path: Path | None = None,
        header: Mapping[str, Any] | None = None,
        others: Iterable[Path] = (),
    ) -> None:
        """Read what is there.

        Args:
            path: the file, made at the first `put`; None: nothing outlives the process.
            header: what the results belong to; None where their keys say it all.
            others: files without header of other processes, whose results are known too.
        """
        self.path = path
        self._header = None if header is None else {"header": json.loads(json.dumps(header, default=str))}
        rows, damaged = ([], 0) if path is None else read_jsonl_leniently(path)
        self._other_header = self._header is not None and rows[:1] != [self._header]
        if self._other_header:
            rows, damaged = [], 0
        elif self._header is not None:
            rows = rows[1:]
        whole = [row for row in rows if row.keys() >= {"key", "value"}]
        for other in others:
            whole += [row for row in read_jsonl_leniently(other)[0] if row.keys() >= {"key", "value"}]
        self._results = {row["key"]: row["value"] for row in whole}
        if damaged := damaged + len(rows) - len(whole):
            logger.warning("%s: %d damaged lines; what they held is computed again", path, damaged)

    def get(self, key: str) -> Any | None:
        """The result; None if it is still to be computed."""
        return self._results.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a result, which is anything but null that JSON holds."""
        self._results[key] = value
        if self.path is None:
            return
        if self._other_header:
            self.path.unlink(missing_ok=True)
            self._other_header = False
        append_jsonl(self.path, {"key": key, "value": value}, header=self._header)

    def __len__(self) -> int:
        return len(self._results)


def content_digest(value: Any) -> str:
    """16 hexadecimal digits that stand for anything that JSON holds, whatever the order of fields."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
