"""Files that are written whole, and lines that are appended whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.errors import EnvironmentFault
from stillhouse.files import append_jsonl, atomic, read_jsonl


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="is a folder"), atomic(tmp_path):
        pass
    with pytest.raises(EnvironmentFault, match="is a folder"), atomic(Path()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_goes_before_the_next_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"row": 1})
    append_jsonl(path, {"row": 2, "text": "ß" * 9000})
    whole = path.read_bytes()
    for cut in (1, 2, 5000, 17_000):
        path.write_bytes(whole[:-cut])
        append_jsonl(path, {"row": 3})
        assert read_jsonl(path) == [{"row": 1}, {"row": 3}]
    path.write_bytes(b'{"ro')
    append_jsonl(path, {"row": 4})
    assert read_jsonl(path) == [{"row": 4}]
