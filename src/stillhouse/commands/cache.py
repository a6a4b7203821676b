"""stillhouse cache: the signals of teachers on disk, and the tokens of large sets."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile

if TYPE_CHECKING:
    from stillhouse.data.token_cache import TokenCache

Folder = Annotated[
    Path | None,
    typer.Argument(
        help="The cache folder: teacher.folder, by default teacher-cache; with --tokens data.token_cache.",
        metavar="FOLDER",
        show_default=False,
    ),
]
Tokens = Annotated[
    bool, typer.Option("--tokens", help="The tokens of large sets (data.token_cache) instead.")
]
DEFAULT = Path("teacher-cache")


cache = typer.Typer(
    help="Fill teacher caches; inspect, verify and prune them, or the tokens of large sets.",
    no_args_is_help=True,
)
app.add_typer(cache, name="cache", rich_help_panel=RUN)


def _existing(folder: Path | None) -> Path:
    """The folder of a teacher cache."""
    from stillhouse.data.token_cache import TokenCache
    from stillhouse.errors import ConfigError, Fault

    found = DEFAULT if folder is None else folder
    if not found.is_dir():
        raise ConfigError(
            Fault(
                "FOLDER",
                "there is no such folder",
                got=str(found),
                hint="Give the teacher.folder of a run, or fill a cache: stillhouse cache build.",
            )
        )
    if TokenCache(found).entries():
        raise ConfigError(
            Fault("FOLDER", "holds no teacher cache but tokens of sets", got=str(found), hint="Add --tokens.")
        )
    return found


def _token_cache(folder: Path | None) -> TokenCache:
    """The tokens in a folder."""
    from stillhouse.data.token_cache import TokenCache, default_folder
    from stillhouse.errors import ConfigError, Fault

    if folder is not None and not folder.is_dir():
        hint = "Give the data.token_cache of a run, or leave it out."
        raise ConfigError(Fault("FOLDER", "there is no such folder", got=str(folder), hint=hint))
    return TokenCache(default_folder() if folder is None else folder)


@cache.command("build")
def build(
    file: RunFile,
    overrides: Overrides = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences in one forward pass of the teacher.", show_default=False),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Only the teacher of this name; main: the one under teacher.", show_default=False),
    ] = None,
) -> None:
    """Fill the caches of a run's teachers before training; an interrupted build resumes.

    Under torchrun, or with RANK and WORLD_SIZE set, each process fills a share.
    """
    from stillhouse.runs.resolve import resolve

    config = resolve(file, list(overrides or ())).config
    from stillhouse.runs.teacher_cache import fill_cache

    console.say(fill_cache(config, batch_size, teacher))


@cache.command("import")
def import_(
    file: RunFile,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Log-probabilities: JSON lines, Parquet, ...", metavar="FILE...", show_default=False
        ),
    ],
    teacher: Annotated[str, typer.Option(help="The name of the teacher of kind imported.")] = "main",
    bad_rows: Annotated[
        str, typer.Option(help="Rows that cannot be what they say: refuse, or drop and count them.")
    ] = "refuse",
) -> None:
    """Read log-probabilities that exist already, such as vLLM's, into the store of a run's teacher.

    Every row is checked: ids and texts against the tokenizer, numbers, ranks, masses, lengths and places.
    """
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.runs.resolve import resolve

    if bad_rows not in ("refuse", "drop"):
        raise ConfigError(Fault("--bad-rows", "is no rule", got=bad_rows, allowed="refuse, drop"))
    config = resolve(file).config
    from stillhouse.runs.teacher_import import import_logprobs

    for line in import_logprobs(config, files, teacher, "drop" if bad_rows == "drop" else "refuse"):
        console.say(line)


@cache.command("bias")
def bias(
    file: RunFile,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts to measure on.")] = 32,
    teacher: Annotated[str, typer.Option(help="The name of the cached teacher.")] = "main",
) -> None:
    """Compare loss and gradient over each codec with those of the live teacher, on a sample."""
    from stillhouse.runs.resolve import resolve

    config = resolve(file, list(overrides or ())).config
    from stillhouse.runs.teacher_cache import measure_bias
    from stillhouse.teachers.bias import REPEATS

    loss, rows, refused = measure_bias(config, prompts, teacher)
    columns = (
        "codec", "bytes/token", "loss", "error of loss", "noise of loss",
        "gradient: cosine", "error", f"error, mean of {REPEATS}",
    )  # fmt: skip
    table = [
        (r.name, r.bytes_per_token, r.loss, r.loss_error, r.loss_noise, r.cosine, r.gradient_error,
         r.mean_gradient_error if r.loss_noise else None)
        for r in rows
    ]  # fmt: skip
    console.print_table(
        columns, table, title=f"{config.objective.name}, live teacher: {loss:.6f} nats per token"
    )
    if refused:
        console.say(f"{config.objective.name} cannot be computed from: {', '.join(refused)}")


@cache.command("info")
def info(folder: Folder = None, tokens: Tokens = False) -> None:
    """Show what is in a cache folder, and when it was last used."""
    if tokens:
        _token_info(_token_cache(folder))
        return
    from stillhouse.teachers.store.maintenance import list_stores

    found = _existing(folder)
    rows = [
        (
            one.manifest.fingerprint, one.manifest.teacher.get("path") or one.manifest.teacher.get("url"),
            one.manifest.codec, one.records, one.tokens, one.bytes / 1e6, one.bytes / max(1, one.tokens),
            one.shards, _minute(one.last_used),
        )
        for one in list_stores(found)
    ]  # fmt: skip
    columns = (
        "teacher", "path or URL", "codec", "sequences", "tokens", "MB", "bytes/token", "shards", "last used",
    )  # fmt: skip
    console.print_table(columns, rows, note=f"{sum(row[5] for row in rows):,.1f} MB in {found}")


def _token_info(cache: TokenCache) -> None:
    entries = cache.entries()
    rows = [
        (
            one.folder.name[:8], _named(one.told[1:-1]), one.told[-1] if one.told else None,
            one.prompts, one.bytes / 1e6, _minute(one.last_used), "yes" if one.in_use else "no",
        )
        for one in entries
    ]  # fmt: skip
    columns = ("tokens", "rows of", "tokenizer", "prompts", "MB", "last used", "in use")
    note = f"{sum(one.bytes for one in entries) / 1e6:,.1f} MB in {cache.folder}"
    if rows:
        console.print_table(columns, rows, note=note)
    else:
        console.say(note)


def _named(places: Sequence[str]) -> str:
    """The files of a set, of many the first; none are known of an entry that is damaged."""
    if not places:
        return "damaged"
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def _minute(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


@cache.command("verify")
def verify(
    folder: Folder = None,
    repair: Annotated[
        bool, typer.Option(help="Rewrite damaged shards with their sound records; delete damaged tokens.")
    ] = False,
    tokens: Tokens = False,
) -> None:
    """Read every byte and check it against its checksum; exit code 3 if something is damaged.

    The weights of teachers are hashed anew too, where the folder remembers their hashes.
    """
    if tokens:
        _verify_tokens(_token_cache(folder), repair)
        return
    from stillhouse.errors import TeacherError
    from stillhouse.models.fingerprint import verify_remembered
    from stillhouse.teachers.store import maintenance

    found = _existing(folder)
    sound, damaged = 0, []
    for path, records, faults in maintenance.verify(found):
        sound += records
        for fault in faults:
            console.say(fault)
        if faults and repair:
            maintenance.repair(path)
            console.say(f"{path}: removed; its {records:,} sound records were rewritten")
        elif faults:
            damaged.append(path)
    console.say(f"{sound:,} sound records in {found}")
    hashes, changed = verify_remembered(found)
    for fault in changed:
        console.warn(fault)
    if hashes or changed:
        console.say(f"{hashes:,} files of teachers are what they were when they were hashed")
    if damaged:
        raise TeacherError(
            f"{len(damaged)} damaged: {', '.join(map(str, damaged))}. What is damaged is never used; remove "
            "it with --repair."
        )


def _verify_tokens(cache: TokenCache, repair: bool) -> None:
    from stillhouse.errors import DataError

    sound, damaged = 0, []
    for place, broken in cache.damaged():
        if not broken:
            sound += 1
        elif repair and cache.remove(place):
            console.say(f"{place}: damaged, and deleted; the next run makes it again")
        else:
            damaged.append(place)
    console.say(f"tokens of {sound:,} sets are sound in {cache.folder}")
    if damaged:
        raise DataError(
            f"{len(damaged)} damaged: {', '.join(map(str, damaged))}. What is damaged is never used; delete "
            "it with --repair."
        )


@cache.command("prune")
def prune(
    folder: Folder = None,
    limit: Annotated[
        str | None,
        typer.Option(help="Keep at most this much, such as 20GB, of what was used most recently."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Delete everything of the teacher with this fingerprint (see info).")
    ] = None,
    tokens: Tokens = False,
) -> None:
    """Delete from a cache folder: what was used least recently, or all of a teacher.

    Tokens that a running job uses are kept; of teacher caches a job writes anew what it still needs.
    """
    from stillhouse.config.sizes import parse_bytes
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.teachers.store.maintenance import prune as make_room

    if limit is None and teacher is None:
        raise ConfigError(Fault("cache prune", "needs --limit or --teacher"))
    try:
        size = None if limit is None else int(parse_bytes(limit))
    except ValueError as error:
        raise ConfigError(Fault("--limit", str(error), got=limit)) from error
    if tokens:
        if size is None or teacher is not None:
            raise ConfigError(Fault("--tokens", "needs --limit alone: tokens are of no teacher"))
        _prune_tokens(_token_cache(folder), size)
        return
    found = _existing(folder)
    console.say(f"{make_room(found, size, teacher) / 1e6:,.1f} MB freed in {found}")


def _prune_tokens(cache: TokenCache, limit: int) -> None:
    from stillhouse.files import os_errors_as_faults

    with os_errors_as_faults(cache.folder, "FOLDER"):
        freed, used = cache.prune(limit)
    console.say(f"{freed / 1e6:,.1f} MB freed in {cache.folder}")
    if used:
        size = sum(one.bytes for one in used) / 1e6
        console.warn(f"{size:,.1f} MB more are kept: running jobs use them, or the file system has no locks")
