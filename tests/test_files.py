"""Files that are written whole, and lines that are appended whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from stillhouse.errors import EnvironmentFault
from stillhouse.files import append_jsonl, atomic, follow_umask, read_jsonl


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


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_get_the_mode_of_other_new_files_and_chosen_modes_stay(tmp_path: Path, umask: int) -> None:
    for name, mode in (("a.safetensors", 0o600), ("b.safetensors", 0o640), ("c.json", 0o600)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    before = os.umask(umask)
    try:
        follow_umask(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"a.safetensors": 0o666 & ~umask, "b.safetensors": 0o640, "c.json": 0o600}
