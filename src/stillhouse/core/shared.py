"""Results that several runs have in common: whoever needs one first makes it, the others take it.

A file lies under the digest of everything that it depends on, so that what would differ is never shared.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse import locks
from stillhouse.core.journal import content_digest
from stillhouse.files import append_jsonl, atomic, copy_images

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class SharedResults:
    """A folder of results, each made once.

    Example:
        >>> with SharedResults(folder, "kd-seed-1").once("teacher", {"weights": "5f0c"}, [path]) as there:
        ...     if not there:
        ...         write(path)
    """

    folder: Path
    run: str
    """Who asks, for the ledger."""
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    """What every result depends on besides its own key."""

    @contextlib.contextmanager
    def once(self, what: str, key: Mapping[str, Any], files: Sequence[Path]) -> Iterator[bool]:
        """Copy the files from another run, if one has made them; else the block makes them for all.

        Runs that need the same at the same time wait for the first. `ledger.jsonl` gets a line for each that
        was made or taken.

        Args:
            what: the beginning of the file's name, for people.
            key: what the result depends on.
            files: where this run has them; of the last one, written last, it is told whether all are there.
                With them go the images that lie beside them by digest.
        """
        digest = content_digest({**self.depends_on, **key})
        place = self.folder / f"{what}-{digest}"
        kept = [
            place.with_name(f"{place.name}{number or ''}{one.suffix}") for number, one in enumerate(files)
        ]
        with locks.in_turn(place.with_name(f".{place.name}.lock")):
            there = kept[-1].exists()
            if there:
                copy_images(self.folder, files[-1].parent)
                _copy(kept, files)
                self._tell(what, digest, taken=True)
            yield there
            if not there and files[-1].exists():
                copy_images(files[-1].parent, self.folder)
                _copy(files, kept)
                self._tell(what, digest, taken=False)

    def _tell(self, what: str, digest: str, taken: bool) -> None:
        append_jsonl(self.folder / LEDGER, {"what": what, "digest": digest, "run": self.run, "taken": taken})


def _copy(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target, "wb") as handle, open(source, "rb") as original:
            shutil.copyfileobj(original, handle)
