"""Tokens of large datasets on disk for the runs that come after, found by what they were made from."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stillhouse.data.stored_prompts import StoredPrompts
from stillhouse.files import existing_ancestor, sha256_of, write_json
from stillhouse.locks import in_turn, is_held

log = logging.getLogger(__name__)

_MANIFEST = "tokens.json"
"""The file of an entry that is written last: names, sizes and digests of the others."""


def default_folder() -> Path:
    """In the cache of `datasets`: HF_DATASETS_CACHE, else HF_HOME, else ~/.cache/huggingface."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "stillhouse-tokens"


class TokenCache:
    """A folder of token files. An entry is a folder, whole or not there, and is checked when it is read.

    Any number of processes may read and write: one makes an entry while the others wait for it.

    Example: `TokenCache(default_folder()).read(key, "train", told=["rows.jsonl"])`
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def is_writable(self) -> bool:
        """Whether entries can be added."""
        place = existing_ancestor(self.folder)
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK)

    def read(self, key: str, name: str, told: Sequence[str]) -> StoredPrompts | None:
        """The prompts of an entry; None if it is not there, or is damaged.

        Args:
            key: see `token_key`.
            name: of the set of prompts.
            told: what messages about its rows show. An entry that holds such messages is read only where
                they would show the same.
        """
        place = self.folder / key
        if not place.is_dir():
            return None
        manifest = _manifest(place)
        files = {place / file: digest for file, digest in manifest.get("files", {}).items()}
        if not files or any(_digest(path) != digest for path, digest in files.items()):
            log.warning("%s: damaged tokens, which are made again", place)
            return None
        found = StoredPrompts(name, _dataset(files))
        if found.account.first_unread and manifest.get("told") != list(told):
            return None
        log.info("data.%s: %d prompts read from %s", name, len(found), place)
        return found

    def read_or_make(
        self, key: str, name: str, told: Sequence[str], make: Callable[[Path], tuple[StoredPrompts, bool]]
    ) -> StoredPrompts:
        """The prompts of an entry, which is made if it is not there.

        Args:
            key: see `read`.
            name: see `read`.
            told: see `read`.
            make: writes Arrow files into a folder; the prompts in them, and whether they may be kept.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        lock = self.folder / f".{key}.lock"
        if is_held(lock):
            log.warning("data.%s: waiting for another process, which tokenises the same rows", name)
        with in_turn(lock) as alone:
            if (found := self.read(key, name, told)) is not None:
                return found
            for left in self.folder.glob(f".{key}.*.tmp") if alone else ():  # of processes that were killed
                shutil.rmtree(left, ignore_errors=True)
            working = self.folder / f".{key}.{uuid.uuid4().hex[:12]}.tmp"
            working.mkdir()
            try:
                prompts, kept = make(working)
                if not kept:
                    return prompts
                files = {path.name: _digest(path) for path in sorted(working.glob("*.arrow"))}
                write_json(working / _MANIFEST, {"told": list(told), "files": files})
                shutil.rmtree(self.folder / key, ignore_errors=True)
                os.replace(working, self.folder / key)
            finally:
                shutil.rmtree(working, ignore_errors=True)
            return StoredPrompts(name, _dataset([self.folder / key / file for file in files]))


def _manifest(place: Path) -> dict[str, Any]:
    """The manifest of an entry; empty if it cannot be read."""
    try:
        found = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("files"), dict)
    return found if whole else {}


def _dataset(files: Iterable[Path]) -> Any:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in files])


def _digest(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError:
        return None
