"""Atomic writing: a file is either the old one or the whole new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.urls import is_remote, is_url, path_at, uploaded

logger = logging.getLogger("stillhouse")


@contextlib.contextmanager
def atomic(path: Path, mode: str = "w", sync: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` and rename it onto `path` when the block ends well.

    Args:
        path: the file to write; its folder is made.
        mode: "w" (UTF-8 text) or "wb".
        sync: wait until the disk has it, so that it outlives a power cut too.

    Raises:
        EnvironmentFault: the disk is full, the folder cannot be written, or `path` is a folder itself. No
            half-written file is left.
    """
    if path.is_dir():
        raise EnvironmentFault(f"{path}: is a folder, and a file is to be written. Name a file in it.")
    if is_remote(path):
        with uploaded(path, mode) as handle:
            yield handle
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with os_errors_as_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
                yield handle
                handle.flush()
                if sync:
                    os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def drop_unfinished(path: Path) -> None:
    """Delete what a process that was killed while it wrote `path` has left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give the weights in a folder the mode of other new files in it.

    safetensors (since 0.8, github.com/safetensors/safetensors/issues/782) writes files that only their owner
    may read, whatever the umask is.
    """
    owner_only = [
        path
        for path in folder.rglob("*.safetensors")
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) == stat.S_IRUSR | stat.S_IWUSR
    ]
    if not owner_only:
        return
    probe = folder / f".mode.{os.getpid()}.tmp"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in owner_only:
        path.chmod(mode)


@contextlib.contextmanager
def os_errors_as_faults(path: Path, option: str = "output.folder") -> Iterator[None]:
    """Turn the operating system's refusal to write into a message that says what to do.

    Args:
        path: what is written.
        option: what names another place for it.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, EnvironmentFault):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentFault(
                f"{path}: the disk is full. Free some space or set {option} to another disk; "
                "what was written before is intact."
            ) from error
        raise EnvironmentFault(f"{path}: cannot be written ({error.strerror or error}).") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False, allow_nan=True, default=str)
        handle.write("\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, atomically."""
    with atomic(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def append_jsonl(
    path: Path, *rows: Mapping[str, Any], header: Mapping[str, Any] | None = None, sync: bool = False
) -> None:
    """Append rows as a single write, so that a reader sees whole lines only.

    A torn last line, which a kill or a full disk has cut short, goes, or it would be one line with a new row.

    Args:
        path: the file; its folder is made.
        rows: what to append.
        header: the first line of a file that has no whole line yet.
        sync: wait until the disk has it, so that it outlives a power cut too.
    """
    with os_errors_as_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as handle:
            empty = not _cut_torn_line(handle)
            lines = rows if header is None or not empty else (header, *rows)
            handle.write(
                b"".join((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode() for row in lines)
            )
            if sync:
                handle.flush()
                os.fsync(handle.fileno())


def _cut_torn_line(handle: IO[bytes]) -> bool:
    """Cut what is behind the last newline of a file opened with "a+b"; whether anything is left."""
    end = handle.seek(0, os.SEEK_END)
    start = 0
    for place, content in _backwards(handle, end):
        newline = content.rfind(b"\n")
        if newline >= 0:
            start = place + newline + 1
            break
    if start < end:
        handle.truncate(start)
    return start > 0


def _backwards(handle: IO[bytes], end: int, size: int = 4096) -> Iterator[tuple[int, bytes]]:
    while end:
        start = max(0, end - size)
        handle.seek(start)
        yield start, handle.read(end - start)
        end = start


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file but for a torn last one, which `append_jsonl` cuts off; none without a file."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines that this package wrote."""
    return [json.loads(line) for line in whole_lines(path) if line.strip()]


def read_jsonl_leniently(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in JSON Lines that may have been damaged, and how many lines hold none."""
    rows, damaged = [], 0
    for line in whole_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def read_object(path: Path, lost: str | None = None) -> dict[str, Any]:
    """The object of a JSON file that may be missing or damaged; empty if it holds none.

    Args:
        path: the file.
        lost: what follows where it is there and cannot be used; None: nothing that is worth a word.
    """
    problem = "holds no JSON object"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read ({str(error)[:200]})"
    if lost is not None:
        logger.warning("%s: %s; %s", path, problem, lost)
    return {}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, which is read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def existing_ancestor(folder: Path) -> Path:
    """The folder itself, or else its nearest ancestor that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_writable(name: str, folder: Path) -> None:
    """Refuse a folder that cannot be created or written.

    Raises:
        ConfigError: it, or a folder above it, is a file.
        EnvironmentFault: it is not writable.
    """
    place = existing_ancestor(folder)
    if not place.is_dir():
        raise ConfigError(Fault(name, f"{place} is not a folder", got=str(folder)))
    if not os.access(place, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{name}: {place} is not writable. Choose another folder.")


def check_output_file(name: str, path: Path, *endings: str) -> None:
    """Refuse a file that cannot be written, before the work whose result goes there.

    Args:
        name: the option that gave the path, such as "--output".
        path: the file.
        endings: one of which is required, because files next to it have others.

    Raises:
        ConfigError: it has another ending, is a folder, or its folder is a file.
        EnvironmentFault: its folder is not writable.
    """
    if path.is_dir():
        raise ConfigError(Fault(name, "is a folder, not a file", got=str(path), hint="Give a file in it."))
    if path.suffix not in endings:
        raise ConfigError(Fault(name, f"must end in {' or '.join(endings)}", got=str(path)))
    if not is_remote(path):
        check_writable(name, path.parent)


STAGE = "stillhouse"
"""The one key of the first line of a stage file, whose value says how the rows came to be."""


_SHARD = re.compile(r"\.shard-\d+-of-\d+(\.part-\d+)?\.jsonl$")


def is_shard(path: Path) -> bool:
    """Whether a file is a shard of a stage file, to which a process may be appending."""
    return _SHARD.search(path.name) is not None


def shards_beside(path: Path) -> list[Path]:
    """The shards of a stage file by name; `NAME.shard-0-of-4.jsonl` is one of `NAME.jsonl`.

    In a store, which cannot append to a file, a shard is parts: `NAME.shard-0-of-4.part-0.jsonl`.
    """
    if not path.parent.is_dir():
        return []
    found = [one for one in path.parent.iterdir() if _SHARD.sub("", one.name) == path.stem and is_shard(one)]
    return sorted(found, key=str)


PACKAGE = "package:"
MAX_NAME, MAX_PATH = 255, 4095
"""Bytes of one name and of a whole path, on every common file system."""


def name_problem(path: str) -> str | None:
    """Why no file can have this path: null bytes, half characters, or too long; None if one can."""
    if "\0" in path:
        return "holds a null byte, which no path can"
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return "holds half a character, which no path can"
    longest = max(map(len, encoded.split(b"/")))
    if longest > MAX_NAME or len(encoded) > MAX_PATH:
        return (
            f"is too long for a path: {len(encoded):,} bytes, the longest name {longest:,}; allowed: "
            f"{MAX_PATH:,} and {MAX_NAME}"
        )
    return None


def require_regular(path: Path) -> None:
    """Refuse devices, pipes and sockets, whose reading may never end; what is not there passes.

    Raises:
        ConfigError: it is one.
    """
    if is_remote(path):
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
            kind = kinds.get(stat.S_IFMT(mode), "a device")
            raise ConfigError(f"{path}: is {kind}, not a file. Write its content to a file and name that.")


def locate(path: str | Path) -> Path:
    """The place on disk of a path from a configuration.

    `package:NAME/inner/path` is inside an installed Python package, which is found without being imported;
    `s3://...` and the like are in a store (`stillhouse.urls`); anything else is relative to the working
    directory.

    Raises:
        ConfigError: no file can have this name, or it leads out of the package.
        EnvironmentFault: the package is not installed.
    """
    text = str(path)
    if (problem := name_problem(text)) is not None:
        raise ConfigError(f"{text[:60]!r}: {problem}")
    if is_url(text):
        return path_at(text)
    if not text.startswith(PACKAGE):
        try:
            return Path(text).expanduser()
        except RuntimeError:  # ~NAME where nobody is called so
            return Path(text)
    name, _, inner = text.removeprefix(PACKAGE).partition("/")
    if inner.startswith("/") or ".." in inner.split("/"):
        raise ConfigError(
            f"{text}: leads out of the package. A path after package:{name}/ stays inside; write other paths "
            "without package:."
        )
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # of a.b where there is no a; of no name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        way_out = f"Install it with: pip install {name}" if name else "Write package:NAME/path/in/it."
        raise EnvironmentFault(f"{text}: the Python package {name!r} is not installed. {way_out}")
    return Path(next(iter(spec.submodule_search_locations))) / inner


ROWS_FILE = "rows.jsonl"
"""What a stage of a chain that makes data leaves in its folder."""

IMAGES_FOLDER = "images"
"""Beside files of answers: the images of their questions that were no files of their own, by digest."""


def copy_images(source: Path, target: Path) -> None:
    """Copy images that lie beside files of answers in one folder to another, unless they are there."""
    for image in (source / IMAGES_FOLDER).glob("*"):
        place = target / IMAGES_FOLDER / image.name
        if not place.exists():
            with atomic(place, "wb") as handle, open(image, "rb") as original:
                shutil.copyfileobj(original, handle)
