"""stillhouse curate: filters over files of responses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import console
from stillhouse.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stillhouse.models import TeacherModel
    from stillhouse.runs.config import RunConfig


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("curate")(command)


def command(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Stage files (one side, or both of pairs), JSONL with responses, or a run folder.",
            metavar="FILE|RUN...",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Kept rows; dropped ones go beside it.", show_default=False),
    ],
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            "-f",
            help="A name, or options such as '{kind: overlap, n: 8}'; in order, may be repeated.",
            show_default=False,
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="YAML file of a run: its filters, evaluation sets and teacher, unless named here."),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="A set that must not overlap; may be repeated.", show_default=False),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Who says how likely a response is.")] = None,
) -> None:
    """Pass responses through filters: a file of what is kept, one of what is dropped and why, and counts.

    Interrupted while a teacher measures likelihoods, the same command goes on from what is measured.
    """
    from stillhouse.rollouts.offline.filters import REGISTRY
    from stillhouse.runs.filtering import curate, parse_filters
    from stillhouse.runs.folder import check_file
    from stillhouse.runs.resolve import resolve

    check_file("--output", output, ".jsonl")
    config = resolve(like).config if like is not None else None
    chosen = parse_filters(filters or ())
    if not chosen and config is not None:
        chosen = list(getattr(config.responses, "filters", ()))
    if not chosen:
        raise ConfigError(Fault("--filter", "there is none", allowed=", ".join(REGISTRY.kinds())))
    result = curate(
        files, chosen, output, held_out=_held_out(held_out or (), config), teacher=_teacher(teacher, config)
    )
    if result.counts:
        console.print_table(("source", "filter", "reason", "dropped"), result.counts)
    unit = "prompts" if len({source for source, *_ in result.counts}) < 2 else "pairs"
    told = f"{output}: kept {result.kept:,} of {result.asked:,} {unit}"
    away = output.with_name(f"{output.stem}.dropped.jsonl")
    if result.done_before:
        console.say(f"{told}; it was there already with these filters, nothing to do.")
    else:
        console.say(f"{told}; what was dropped, and why: {away}")


def _held_out(paths: list[Path] | tuple[()], config: RunConfig | None) -> tuple[str, ...]:
    """The texts of the named sets, or of those that the run evaluates on."""
    from stillhouse.data.datasets import dataset_at
    from stillhouse.rollouts.offline.filters.overlap import held_out_texts

    if paths or config is None:
        return held_out_texts(dataset_at(path) for path in paths)
    return held_out_texts(config.evaluation_sets())


def _teacher(path: str | None, config: RunConfig | None) -> TeacherModel | None:
    from stillhouse.models import TeacherModel

    if path is not None:
        return TeacherModel(path=path)
    return config.teacher.model_to_load() if config is not None and config.teacher is not None else None
