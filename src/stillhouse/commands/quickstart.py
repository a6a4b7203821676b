"""stillhouse quickstart: the embedded demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("quickstart")(command)


def command(
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/quickstart"),
) -> None:
    """Distil a student from the embedded teacher with KD and with DistiLLM-2. Takes about 3 minutes."""
    from stillhouse.quickstart import quickstart

    quickstart(folder)
