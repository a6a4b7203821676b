"""Tokens of large datasets on disk for the runs that come after, found by what they were made from."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.data.stored_prompts import StoredPrompts
from stillhouse.files import existing_ancestor, read_object, sha256_of, write_json
from stillhouse.locks import if_unused, in_turn, is_held, use

log = logging.getLogger(__name__)

_MANIFEST = "tokens.json"
"""The file of an entry that is written last: digests of the others, how many prompts, and of what. Its time
is when the entry was last used; whoever uses the entry has a lock on it."""
_KEY = re.compile("[0-9a-f]{32}")


def default_folder() -> Path:
    """In the cache of `datasets`: HF_DATASETS_CACHE, else HF_HOME, else ~/.cache/huggingface."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "stillhouse-tokens"


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """The tokens of one set."""

    folder: Path
    told: Sequence[str]
    """Name of the set, places of its rows, tokenizer; none if its manifest cannot be read."""
    prompts: int | None
    bytes: int
    last_used: float
    """Seconds since 1970."""
    in_use: bool
    """By a process that is running."""


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
        if not use(place / _MANIFEST) and not place.is_dir():
            return None
        manifest = _manifest(place)
        files = {place / file: digest for file, digest in manifest.get("files", {}).items()}
        if not files or any(_digest(path) != digest for path, digest in files.items()):
            log.warning("%s: damaged tokens, which are made again", place)
            return None
        found = StoredPrompts(name, _dataset(files))
        if found.account.first_unread and manifest.get("told") != list(told):
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(place / _MANIFEST)
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
                facts = {"told": list(told), "prompts": len(prompts), "files": files}
                write_json(working / _MANIFEST, facts)
                use(working / _MANIFEST)
                shutil.rmtree(self.folder / key, ignore_errors=True)
                os.replace(working, self.folder / key)
            finally:
                shutil.rmtree(working, ignore_errors=True)
            return StoredPrompts(name, _dataset([self.folder / key / file for file in files]))

    def entries(self) -> list[TokenEntry]:
        """What is in the folder, the most recently used first."""
        found = [_entry(place) for place in self._places()]
        return sorted(found, key=lambda one: -one.last_used)

    def damaged(self) -> Iterator[tuple[Path, bool]]:
        """Each entry, and whether its files are not what was written."""
        for place in self._places():
            files = _manifest(place).get("files", {})
            yield place, not files or any(_digest(place / name) != digest for name, digest in files.items())

    def remove(self, place: Path) -> bool:
        """Delete an entry unless a process uses it; whether it is deleted."""
        with if_unused(place / _MANIFEST) as unused:
            if not unused:
                return False
            leaving = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}.tmp")
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it meanwhile
                os.replace(place, leaving)
        shutil.rmtree(leaving, ignore_errors=True)
        return True

    def prune(self, limit: int) -> tuple[int, list[TokenEntry]]:
        """Make room; what was not used for longest goes first, what is in use stays.

        Args:
            limit: bytes that all entries together may keep.

        Returns:
            Bytes freed, and the entries that would have gone and are in use.
        """
        freed, used = self._remove_unfinished(), []
        entries = self.entries()
        size = sum(one.bytes for one in entries)
        for one in reversed(entries):
            if size <= limit:
                break
            if self.remove(one.folder):
                size, freed = size - one.bytes, freed + one.bytes
            else:
                used.append(one)
        return freed, used

    def _places(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(one for one in found if _KEY.fullmatch(one.name) and one.is_dir())

    def _remove_unfinished(self) -> int:
        """Delete what processes that were killed have left; bytes freed."""
        freed = 0
        for left in self.folder.glob(".*.tmp"):
            if not is_held(self.folder / f".{left.name.split('.')[1]}.lock"):
                freed += _size(left)
                shutil.rmtree(left, ignore_errors=True)
        return freed


def _entry(place: Path) -> TokenEntry:
    manifest, file = _manifest(place), place / _MANIFEST
    with contextlib.suppress(OSError):
        return TokenEntry(
            place,
            tuple(map(str, manifest["told"])) if manifest else (),
            manifest.get("prompts"),
            _size(place),
            file.stat().st_mtime,
            is_held(file),
        )
    return TokenEntry(place, (), None, _size(place), 0.0, False)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            total += path.stat().st_size
    return total


def _manifest(place: Path) -> dict[str, Any]:
    """The manifest of an entry; empty if it cannot be read."""
    found = read_object(place / _MANIFEST)
    whole = [type(found.get(name)) for name in ("told", "files")] == [list, dict]
    return found if whole else {}


def _dataset(files: Iterable[Path]) -> Any:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in files])


def _digest(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError:
        return None
