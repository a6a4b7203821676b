"""stillhouse align: how the tokenizers of student and teacher split the same responses."""

from __future__ import annotations

from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile


@app.command("align", rich_help_panel=RUN)
def align(
    file: RunFile,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many responses to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which tokens of student and teacher cover the same bytes, for some responses. Loads no weights."""
    from stillhouse.runs.alignment import align_responses
    from stillhouse.runs.checks import preflight
    from stillhouse.runs.resolve import resolve

    config = resolve(file, list(overrides or ())).config
    preflight(config)
    found = align_responses(config, number)
    if as_json:
        typer.echo(console.json_text(found, indent=2))
        return
    for sample in found["samples"]:
        if sample["dropped"] is not None:
            console.output().print(f"{sample['id']}: not compared, {sample['dropped']}", markup=False)
            continue
        rows = [
            (" ".join(group["student"]), " ".join(group["teacher"]), group["bytes"])
            for group in sample["groups"]
        ]
        console.print_table(("student", "teacher", "bytes"), rows, title=sample["id"])
    summary = [(name.replace("_", " "), value) for name, value in found["summary"].items()]
    console.print_table(("quantity", "value"), summary)
