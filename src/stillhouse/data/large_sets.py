"""The tokens of large datasets: made by several processes through `datasets`, on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.core.distributed import processes_here
from stillhouse.data.account import Account
from stillhouse.data.chunks import ChunkEncoder, chunked
from stillhouse.data.prompt_builder import path_of
from stillhouse.data.stored_prompts import ACCOUNT, PROMPTS, StoredPrompts, packed
from stillhouse.data.token_cache import TokenCache, default_folder
from stillhouse.data.token_key import token_key
from stillhouse.errors import DataError, EnvironmentFault, StillhouseError
from stillhouse.files import os_errors_as_faults
from stillhouse.signals import ENDING

log = logging.getLogger(__name__)

_ROWS = "rows"
"""The column of the rows that wait to be tokenised: a chunk of them, pickled."""
_CHUNKS_WRITTEN_AT_ONCE = 4
_DONE, _FAULT = "done", "fault"
"""Files beside the tokens: with a byte for each row that is done; there once a process has met a fault."""
_MOST_WORKERS = 16
"""One process writes rows down for the others, which that many keep busy."""


class ImagesFoundError(Exception):
    """A prompt has images. Such sets are in memory: prompts hold images by reference, and they may change."""


def tokenised(work: ChunkEncoder) -> tuple[StoredPrompts, Account]:
    """The prompts of a dataset on disk, and what became of its rows; from the cache if they are there.

    Raises:
        ImagesFoundError: a prompt has images.
        DataError: a row cannot be used, and such rows are refused; the first of them is named.
        EnvironmentFault: the disk is full, or a process was killed.
    """
    setting = work.config.token_cache
    key = None if setting is False else token_key(work)
    cache = TokenCache(default_folder() if isinstance(setting, bool) else setting)
    told = [work.name, *work.dataset.places(), str(work.encoder.tokenizer.name_or_path)]
    prompts = None if key is None else cache.read(key, work.name, told)
    if prompts is None and key is not None and not cache.is_writable:
        log.warning("%s: cannot be written; the tokens of %s are not kept", cache.folder, path_of(work.name))
        key = None
    if prompts is None and key is not None:
        with os_errors_as_faults(cache.folder, "data.token_cache"):
            prompts = cache.read_or_make(key, work.name, told, partial(_made_for_cache, work, key))
    if prompts is None:
        with tempfile.TemporaryDirectory() as folder, os_errors_as_faults(Path(folder), "TMPDIR"):
            prompts = StoredPrompts(work.name, write_tokens(work, Path(folder)), own=True)
    return prompts, prompts.account


def _made_for_cache(work: ChunkEncoder, key: str, folder: Path) -> tuple[StoredPrompts, bool]:
    """The prompts in a folder of the cache, and whether they may stay there."""
    prompts = StoredPrompts(work.name, write_tokens(work, folder, key), own=True)
    account = prompts.account
    if account.no_data:
        kinds = ", ".join(account.no_data)
        log.warning("%s: its tokens are not kept, because rows hold values of %s", path_of(work.name), kinds)
        return prompts, False
    if token_key(work) != key:
        log.warning("%s: changed while it was read; its tokens are not kept", work.dataset.title)
        return prompts, False
    return prompts, bool(prompts) and not account.without_response


def workers_for(work: ChunkEncoder) -> int:
    """How many processes tokenise: `data.workers`, or as many as there are processors for this process."""
    import multiprocess

    if work.in_order or multiprocess.current_process().daemon:  # which may have no children
        return 1
    if work.config.workers is not None:
        return work.config.workers
    if multiprocess.get_start_method() != "fork":  # each would import the user's script anew
        return 1
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sharing = processes_here() if work.config.token_cache is False else 1
    return max(1, min(_MOST_WORKERS, here // sharing))


def write_tokens(work: ChunkEncoder, folder: Path, fingerprint: str = "0" * 16) -> Any:
    """Tokenise a dataset into Arrow files in a folder; the `datasets.Dataset` of its chunks.

    Raises:
        DataError: see `tokenised`.
        EnvironmentFault: see `tokenised`.
    """
    import datasets

    waiting, done = folder / "rows.arrow", folder / _DONE
    count, fault = _write_rows(work, waiting)
    rows = datasets.Dataset.from_file(str(waiting))
    try:
        with _shown(f"Tokenising {path_of(work.name)}", count, done):
            found = _mapped(rows, _Tokens(work.without_rows(), folder), folder, fingerprint)
    except DataError:
        for one in rows:  # in order: with any number of processes the first fault is told
            work(pickle.loads(one[_ROWS]))
        raise
    if fault is not None:
        raise fault
    for path in (waiting, done):
        path.unlink(missing_ok=True)
    return found


def _mapped(rows: Any, tokens: _Tokens, folder: Path, fingerprint: str) -> Any:
    import multiprocess

    workers = min(workers_for(tokens.work), len(rows))
    try:
        with _as_before():
            return rows.map(
                tokens,
                batched=True,
                batch_size=1,
                remove_columns=[_ROWS],
                features=_features(),
                num_proc=workers if workers > 1 else None,
                new_fingerprint=fingerprint,  # the library's own would be of pickled objects
                cache_file_name=str(folder / "tokens.arrow"),
                load_from_cache_file=False,
            )
    except multiprocess.TimeoutError as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise error.__context__ from None  # the library would hide what ended its wait
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise EnvironmentFault(
            f"{path_of(tokens.work.name)}: one of {workers} processes that tokenise was killed, most often "
            "because memory ran out. Set data.workers to fewer."
        ) from error


def _write_rows(work: ChunkEncoder, path: Path) -> tuple[int, DataError | None]:
    """Write the rows as they are found, in chunks; how many, and what kept others from being read."""
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({_ROWS: Value("large_binary")})
    count, fault = 0, None
    with (
        console.phase(f"Reading {path_of(work.name)}", quiet=True),
        ArrowWriter(features=features, path=str(path), writer_batch_size=_CHUNKS_WRITTEN_AT_ONCE) as writer,
    ):
        try:
            for chunk in chunked(work.dataset.found_rows()):
                writer.write({_ROWS: pickle.dumps(chunk, protocol=pickle.HIGHEST_PROTOCOL)})
                count += len(chunk)
        except DataError as error:
            fault = error
        writer.finalize()
    return count, fault


def _features() -> Any:
    from datasets import Features, List, Value

    return Features({PROMPTS: List(Value("large_binary")), ACCOUNT: Value("string")})


class _Tokens:
    """What `datasets` maps: a chunk of rows to a chunk of prompts."""

    def __init__(self, work: ChunkEncoder, folder: Path) -> None:
        self.work, self.done, self.fault = work, folder / _DONE, folder / _FAULT

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process, which ends with the one that reads: that alone answers to Ctrl-C."""
        self.__dict__.update(state)
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)

    def __call__(self, batch: dict[str, list[bytes]]) -> Any:
        if self.fault.exists():  # the library waits for all processes before it tells of the fault of one
            return self._table([], Account())
        chunk = pickle.loads(batch[_ROWS][0])
        try:
            prompts, account = self.work(chunk)
            if any(prompt.images or prompt.response_images for prompt in prompts):
                raise ImagesFoundError
        except (StillhouseError, ImagesFoundError):
            self.fault.touch()
            raise
        with self.done.open("ab") as handle:
            handle.write(b"." * len(chunk))
        return self._table([packed(prompt, account.no_data) for prompt in prompts], account)

    def _table(self, prompts: list[bytes], account: Account) -> Any:
        import pyarrow

        columns = {PROMPTS: [prompts], ACCOUNT: [json.dumps(account.as_json())]}
        return pyarrow.table(columns, schema=_features().arrow_schema)


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Undo what `datasets` does for its processes: it replaces `os.environ`, and tokenizers stay single."""
    environment, name = os.environ, "TOKENIZERS_PARALLELISM"
    before = environment.get(name)
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003 - it is the same object as before
        environment.pop(name, None)
        if before is not None:
            environment[name] = before


@contextlib.contextmanager
def _shown(title: str, total: int, done: Path) -> Iterator[None]:
    """Show how many rows all processes have done: as many as the file has bytes."""
    import datasets

    over = threading.Event()
    with console.progress(title, total) as meter:

        def follow() -> None:
            seen = 0
            while not over.wait(0.5) or seen < size():
                meter.advance(size() - seen)
                seen = size()

        def size() -> int:
            return done.stat().st_size if done.exists() else 0

        follower = threading.Thread(target=follow, daemon=True)
        bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()  # which would break up ours
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()
            if bars:
                datasets.enable_progress_bars()
