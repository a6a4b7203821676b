"""Files on disk: patterns of names, compression, encodings."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, cast

from stillhouse.config import nearest
from stillhouse.data.datasets import base
from stillhouse.data.datasets.base import DATASETS, DatasetConfig, LocatedRow
from stillhouse.data.reading import Reading
from stillhouse.errors import DataError
from stillhouse.files import locate, require_regular, sha256_of
from stillhouse.urls import is_remote, matching

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class FileDataset(DatasetConfig):
    """Rows in one file, or in all files that a pattern matches, in the order of their names."""

    path: str
    """A file, or a pattern such as `train-*.jsonl`, relative to the working directory;
    `package:NAME/inner/path` looks inside an installed Python package, `s3://...` and the like in a store
    that fsspec knows."""

    @property
    def title(self) -> str:
        return self.path

    def files(self) -> list[Path]:
        """The files on disk.

        Raises:
            DataError: there is no such file; the message suggests one with a similar name.
        """
        path = locate(self.path)
        require_regular(path)
        if path.is_dir():
            raise DataError(
                f"{path}: is a folder, but {self.kind} needs a file, or a pattern such as "
                f"{path}/*; for a folder of data files, or a saved dataset: kind: hf"
            )
        if path.is_file():
            return [path]
        if is_remote(path) and glob.has_magic(str(path)):
            if found := matching(path):
                return found
            raise DataError(f"{path}: no file has a name of this pattern")
        if glob.has_magic(str(path)):
            found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            if files := [one for one in found if one.is_file()]:
                return files
            raise DataError(f"{path}: no file has a name of this pattern")
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, beside)}")

    def check_found(self) -> None:
        """See the base class."""
        self.files()

    def is_large(self) -> bool:
        """See the base class."""
        return sum(path.stat().st_size for path in self.files()) >= base.LARGE_BYTES

    def content_digest(self) -> str:
        """See the base class. The endings of names say how files are read."""
        endings = ["".join(path.suffixes) for path in self.files()]
        return self.digest_with_settings(json.dumps([self.fingerprint(), endings]))

    def places(self) -> list[str]:
        """See the base class."""
        return list(map(str, self.files()))

    def fingerprint(self) -> str:
        """The SHA-256 of the file; of several files, that of all their digests."""
        digests = [_digest(path, _state(path)) for path in self.files()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def raw(self, reading: Reading) -> Iterator[LocatedRow]:
        """The rows of all files."""
        for path in self.files():
            reading.folder = str(path.parent)
            yield from self.rows_of(path, reading)

    @abstractmethod
    def rows_of(self, path: Path, reading: Reading) -> Iterator[LocatedRow]:
        """The rows of one file."""


def _state(path: Path) -> str:
    """What is another text once the content of a file is another."""
    if is_remote(path):
        stored: Any = path
        return repr(sorted(stored.fs.info(stored.path).items(), key=str))
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


@lru_cache
def _digest(path: Path, state: str) -> str:
    """The SHA-256 of a file, which is asked for several times while it is in this state."""
    return sha256_of(path)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file as bytes, decompressed as its ending says; UTF-16 is refused.

    Raises:
        DataError: it cannot be unpacked, or is no UTF-8 text from its first bytes on.
    """
    try:
        with _open(path) as handle:
            _refuse_utf16(path, handle.peek(4)[:4])
            yield handle
    except _UNPACKING_ERRORS as error:
        if isinstance(error, DataError):
            raise
        what = "unpacked" if path.suffix in COMPRESSIONS else "read"
        raise DataError(f"{path}: cannot be {what} ({error})") from error


def _open(path: Path) -> io.BufferedReader:
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path.open("rb"), compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    unpack = openers.get(path.suffix)
    opened = path.open("rb") if unpack is None else unpack(path.open("rb"), "rb")
    return io.BufferedReader(cast(io.RawIOBase, opened))


def _refuse_utf16(path: Path, start: bytes) -> None:
    wide = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    if wide or (len(start) == 4 and 0 in (start[0], start[1])):
        raise DataError(
            f"{path}: is UTF-16 text. Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > NEW{path.suffix}"
        )


def decoded(line: bytes) -> str:
    """A line as text.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return line.removeprefix(b"\xef\xbb\xbf").decode()


def wrong_encoding(error: UnicodeDecodeError) -> str:
    """What is wrong with text that is not UTF-8, and which encoding it probably has."""
    bad = error.object[error.start]
    likely = "Windows-1252 (cp1252)" if 0x80 <= bad <= 0x9F or bad >= 0xA0 else "another encoding"
    return (
        f"is not UTF-8 text (byte 0x{bad:02x}, {error.reason}), probably {likely}. "
        "Convert the file: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
    )


@DATASETS.register
class PlainText(FileDataset):
    """A text file as one document, for the language-model loss on `data.text`."""

    kind: Literal["txt"] = "txt"

    def rows_of(self, path: Path, reading: Reading) -> Iterator[LocatedRow]:
        """The whole file."""
        with opened(path) as handle:
            content = handle.read()
        try:
            yield str(path), {"text": decoded(content)}
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{path}:{line}: {wrong_encoding(error)}") from error
