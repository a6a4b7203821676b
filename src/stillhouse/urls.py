"""Files in stores that fsspec knows, such as s3://bucket/rows.jsonl, beside those on disk."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stillhouse.errors import ConfigError, EnvironmentFault

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_url(path: object) -> bool:
    """Whether a path names a store: `PROTOCOL://...`."""
    return _URL.match(str(path)) is not None


def is_remote(path: object) -> bool:
    """Whether a path of `path_at` is in a store and not on disk."""
    return not isinstance(path, Path)


def path_at(text: str) -> Path:
    """A path on disk, or one in a store, which has the same methods.

    Raises:
        ConfigError: nothing knows the protocol.
        EnvironmentFault: a package that reads the store is missing.
    """
    found = _URL.match(text)
    if found is None:
        return Path(text)
    if found[1] == "file":
        return Path(text.removeprefix("file://"))
    try:
        from upath import UPath
    except ImportError:
        problem = f"{text}: needs universal-pathlib. Install it with: pip install 'stillhouse[storage]'"
        raise EnvironmentFault(problem) from None
    try:
        path: Any = UPath(text)
        path.fs  # noqa: B018 - imports what the protocol needs
    except ImportError as error:
        raise EnvironmentFault(
            f"{text}: the package for {found[1]}:// is not installed ({error}). Install it with pip, such as "
            "s3fs for s3://, gcsfs for gs://, adlfs for az://."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{text}: fsspec knows no {found[1]}:// ({error})") from None
    stored: Path = path
    return stored


@contextlib.contextmanager
def uploaded(path: Any, mode: str) -> Iterator[IO[Any]]:
    """Open a file on disk that is uploaded to a store, whole, when the block ends well.

    An object store shows the new object when all of it has arrived; whether another store does depends on it.

    Raises:
        EnvironmentFault: the store refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        with open(local, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.fs.put_file(str(local), path.path)
        except Exception as error:
            problem = f"{path}: cannot be written ({type(error).__name__}: {error})"
            raise EnvironmentFault(problem) from error


def matching(pattern: Any) -> list[Path]:
    """The files in a store whose names match a pattern, in order."""
    return [path_at(pattern.fs.unstrip_protocol(name)) for name in sorted(pattern.fs.glob(pattern.path))]


def local_copy(path: Any, folder: Path) -> Path:
    """A file on disk: the path itself, or a copy in a folder of what is in a store.

    Raises:
        EnvironmentFault: the store refuses it.
    """
    if not is_remote(path):
        on_disk: Path = path
        return on_disk
    copy = folder / f"{len(list(folder.iterdir()))}-{path.name}"
    try:
        path.fs.get_file(path.path, str(copy))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise EnvironmentFault(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    return copy
