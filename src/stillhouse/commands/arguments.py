"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[
    Path, typer.Argument(help="YAML file of the run.", metavar="RUN.YAML", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that replace the file's, such as train.lr=1e-4.", metavar="NAME=VALUE"),
]
