"""stillhouse quantise: a student, or any model, in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stillhouse import console
from stillhouse.commands.app import RESULTS, app
from stillhouse.commands.options import faults_as_options


@app.command("quantise", rich_help_panel=RESULTS)
def quantise(
    model: Annotated[str, typer.Argument(help="Run, folder or hub name.", metavar="MODEL")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder.", show_default=False)],
    weights: Annotated[
        Literal["int8", "int4", "nf4"],
        typer.Option(help="int8 and int4 by torchao, nf4 by bitsandbytes."),
    ] = "int8",
    group_size: Annotated[
        int, typer.Option(help="For int4: weights in a row with one scale, a multiple of 8.")
    ] = 32,
) -> None:
    """Quantise the weights of a student, without training; transformers loads the folder.

    The head, embeddings and norms stay as they are. `stillhouse eval` says what it has cost.
    """
    from transformers.utils.logging import disable_progress_bar

    from stillhouse.config import Layer, Layered, validate
    from stillhouse.console.format import byte_size
    from stillhouse.models import QuantiseConfig
    from stillhouse.runs.export.quantised import described, quantise_student

    disable_progress_bar()  # bars for shards of weights would break up ours
    given = Layer.of({"weights": weights, "group_size": group_size}, "command line")
    with faults_as_options({"weights": "--weights", "group_size": "--group-size"}):
        config = validate(QuantiseConfig, Layered.merged(given))[0]
    with console.phase("Quantising"):
        folder = quantise_student(Path(model), config, output)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    console.say(f"{folder}: {described(config)}; {byte_size(written)} of weights")
