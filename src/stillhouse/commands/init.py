"""stillhouse init: a commented YAML file for a method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("init")(command)


def command(
    method: Annotated[
        str,
        typer.Argument(
            help="Name of a method; `stillhouse methods` lists them.", metavar="METHOD", show_default=False
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of the terminal.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented YAML file for a method, to fill in paths and run."""
    from stillhouse.files import atomic
    from stillhouse.runs.starting import starting_yaml

    text = starting_yaml(method)
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.exists() and not force:
        raise ConfigError(f"{output}: exists already. Choose another name, or overwrite it with --force.")
    with atomic(output) as handle:
        handle.write(text)
    console.note(f"Wrote {output}. Edit the paths, then: stillhouse check {output}")
