"""stillhouse init: a commented YAML file for a method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import START, app
from stillhouse.errors import ConfigError

STUDENT = {"path": "path/or/hub-name/of/the/student"}
LENGTHS = {"max_prompt": 256, "max_response": 256}
USAGE = """# Set the paths of models and data, then: stillhouse check FILE, and stillhouse run FILE.
# A line that starts with # and no space is an option at its default: remove the # to set it.
"""


@app.command("init", rich_help_panel=START)
def init(
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
    chain: Annotated[
        bool, typer.Option("--chain", help="A chain: a supervised warm start, the method, int4, an export.")
    ] = False,
) -> None:
    """Write a commented YAML file for a method; fill in the paths and run it."""
    from stillhouse.files import atomic

    text = starting_chain(method) if chain else starting_yaml(method)
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.exists() and not force:
        raise ConfigError(f"{output}: exists already. Choose another name, or overwrite it with --force.")
    with atomic(output) as handle:
        handle.write(text)
    console.note(f"Wrote {output}. Edit the paths, then: stillhouse check {output}")


def starting_yaml(method: str) -> str:
    """A YAML file with everything that a method needs, each field explained.

    Raises:
        ConfigError: no method has that name.
    """
    from stillhouse import recipes
    from stillhouse.config import Layer, Layered, commented_yaml
    from stillhouse.runs.config import RunConfig

    recipe = recipes.find(method)
    values = Layered.merged(Layer.read(recipe.path, "recipe")).values
    files = {"rejected": "pairs.jsonl", "reasoning": "chains.jsonl"}
    rows = next((file for need, file in files.items() if need in recipe.requirements.data), "train.jsonl")
    tree = {
        "name": method,
        "recipe": method,
        "student": STUDENT,
        **_teachers(recipe.teachers),
        **values,
        "data": {
            "train": {"kind": "jsonl", "path": rows},
            "valid": "valid.jsonl",
            **LENGTHS,
            **values.get("data", {}),
        },
    }
    header = "\n".join(f"# {line}".rstrip() for line in recipe.header.splitlines())
    return f"{header}\n\n{USAGE}\n{commented_yaml(RunConfig, tree)}"


def starting_chain(method: str) -> str:
    """A chain around a method: a warm start before it, the student in int4 and exported behind it.

    Raises:
        ConfigError: no method has that name.
    """
    from stillhouse import recipes
    from stillhouse.config.writing import dump

    recipe = recipes.find(method)
    tree = {
        "name": method,
        "data": {"train": "train.jsonl", "valid": "valid.jsonl", **LENGTHS},
        "stages": {
            "warm": {"recipe": "sft", "student": STUDENT},
            "distil": {"recipe": method, "student": {"path": "stage:warm"}, **_teachers(recipe.teachers)},
            "int4": {"quantise": {"weights": "int4"}, "student": {"path": "stage:distil"}},
            "exported": {"export": {"to": "safetensors"}, "student": {"path": "stage:distil"}},
        },
    }
    header = (
        "# What is outside of `stages` holds for all; `stage:NAME` is the student of an earlier stage.\n"
        "# Set the paths of models and data, then: stillhouse check FILE, and stillhouse run FILE.\n"
        f"# The options of a training stage: stillhouse init {method}\n"
    )
    return header + dump(tree)


def _teachers(names: tuple[str, ...]) -> dict[str, Any]:
    """A place for each of these teachers."""
    from stillhouse.core.requirements import MAIN

    found = {
        name: {"kind": "live", "path": f"path/or/hub-name/of/the/{'teacher' if name == MAIN else name}"}
        for name in names
    }
    main = {"teacher": found.pop(MAIN)} if MAIN in found else {}
    return main | ({"teachers": found} if found else {})
