"""stillhouse align: how two tokenizers cut the same responses."""

from __future__ import annotations

from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.arguments import Overrides, RunFile


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("align")(command)


def command(
    file: RunFile,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many responses to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which tokens of student and teacher spell the same bytes, for some responses. Loads no weights."""
    import json

    from stillhouse.runs.aligning import aligned_samples
    from stillhouse.runs.preflight import preflight
    from stillhouse.runs.resolve import resolve

    config = resolve(file, list(overrides or ())).config
    preflight(config)
    found = aligned_samples(config, number)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
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
    facts = [(name.replace("_", " "), value) for name, value in found["summary"].items()]
    console.print_table(("quantity", "value"), facts)
