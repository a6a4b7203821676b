"""stillhouse cache: the signals of teachers on disk."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile

Folder = Annotated[
    Path, typer.Argument(help="The cache folder (teacher.folder).", metavar="FOLDER", show_default=True)
]
DEFAULT = Path("teacher-cache")


cache = typer.Typer(help="Fill, inspect, verify and prune teacher caches.", no_args_is_help=True)
app.add_typer(cache, name="cache", rich_help_panel=RUN)


def _existing(folder: Path) -> Path:
    from stillhouse.errors import ConfigError, Fault

    if not folder.is_dir():
        raise ConfigError(
            Fault(
                "FOLDER",
                "there is no such folder",
                got=str(folder),
                hint="Give the teacher.folder of a run, or fill a cache: stillhouse cache build.",
            )
        )
    return folder


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
def info(folder: Folder = DEFAULT) -> None:
    """Show what is in a cache folder."""
    from stillhouse.teachers.store.maintenance import list_stores

    rows = [
        (
            one.manifest.fingerprint, one.manifest.teacher.get("path") or one.manifest.teacher.get("url"),
            one.manifest.codec, one.records, one.tokens, one.bytes / 1e6, one.bytes / max(1, one.tokens),
            one.shards, datetime.datetime.fromtimestamp(one.last_used).isoformat(" ", "minutes"),
        )
        for one in list_stores(_existing(folder))
    ]  # fmt: skip
    columns = (
        "teacher", "path or URL", "codec", "sequences", "tokens", "MB", "bytes/token", "shards", "last used",
    )  # fmt: skip
    console.print_table(columns, rows, note=f"{sum(row[5] for row in rows):,.1f} MB in {folder}")


@cache.command("verify")
def verify(
    folder: Folder = DEFAULT,
    repair: Annotated[bool, typer.Option(help="Rewrite damaged shards with their sound records.")] = False,
) -> None:
    """Read every byte and check it against its checksum; exit code 3 if something is damaged.

    The weights of teachers are hashed anew too, where the folder remembers their hashes.
    """
    from stillhouse.errors import TeacherError
    from stillhouse.models.fingerprint import verify_remembered
    from stillhouse.teachers.store import maintenance

    sound, damaged = 0, []
    for path, records, faults in maintenance.verify(_existing(folder)):
        sound += records
        for fault in faults:
            console.say(fault)
        if faults and repair:
            maintenance.repair(path)
            console.say(f"{path}: removed; its {records:,} sound records were rewritten")
        elif faults:
            damaged.append(path)
    console.say(f"{sound:,} sound records in {folder}")
    hashes, changed = verify_remembered(folder)
    for fault in changed:
        console.warn(fault)
    if hashes or changed:
        console.say(f"{hashes:,} files of teachers are what they were when they were hashed")
    if damaged:
        raise TeacherError(
            f"{len(damaged)} damaged: {', '.join(map(str, damaged))}. What is damaged is never used; remove "
            "it with --repair."
        )


@cache.command("prune")
def prune(
    folder: Folder = DEFAULT,
    limit: Annotated[
        str | None,
        typer.Option(help="Keep at most this much, such as 20GB, of what was used most recently."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Delete everything of the teacher with this fingerprint (see info).")
    ] = None,
) -> None:
    """Delete from a cache folder: what was used least recently, or all of a teacher."""
    from stillhouse.config.sizes import parse_bytes
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.teachers.store.maintenance import prune as make_room

    if limit is None and teacher is None:
        raise ConfigError(Fault("cache prune", "needs --limit or --teacher"))
    try:
        size = None if limit is None else int(parse_bytes(limit))
    except ValueError as error:
        raise ConfigError(Fault("--limit", str(error), got=limit)) from error
    console.say(f"{make_room(_existing(folder), size, teacher) / 1e6:,.1f} MB freed in {folder}")
