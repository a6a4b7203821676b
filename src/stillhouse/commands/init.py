"""stillhouse init: a commented YAML file for a method."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from stillhouse import console
from stillhouse.commands.app import START, app
from stillhouse.core.sharding import Parallelism
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import atomic

if TYPE_CHECKING:
    from stillhouse.recipes import Recipe

STUDENT = {"path": "path/or/hub-name/of/the/student"}
TRAIN = "train.jsonl"
ROWS = {"rejected": "pairs.jsonl", "reasoning": "chains.jsonl"}
"""What a method asks of its rows -> a name for their file, where they are no ordinary ones."""
LENGTHS = {"max_prompt": 256, "max_response": 256}
USAGE = """# Set the paths of models and data, then: stillhouse check FILE, and stillhouse run FILE.
# A line that starts with # and no space is an option at its default: remove the # to set it.
"""


@app.command("init", rich_help_panel=START)
def init(
    method: Annotated[
        str | None,
        typer.Argument(
            help="Name of a method; `stillhouse methods` lists them.", metavar="METHOD", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of the terminal.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    chain: Annotated[
        bool, typer.Option("--chain", help="A chain: a supervised warm start, the method, int4, an export.")
    ] = False,
    then: Annotated[
        str | None,
        typer.Option(
            help="Of a chain: a method that trains the student further, such as dpo on preference pairs.",
            metavar="METHOD",
            show_default=False,
        ),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            help=f"Write a configuration of `accelerate launch` too: {' | '.join(get_args(Parallelism))}. "
            "Without a method, that alone.",
            metavar="KIND",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a commented YAML file for a method; fill in the paths and run it."""
    if then is not None and not chain:
        raise ConfigError(Fault("--then", "is a stage of a chain", got=then, hint="Add --chain."))
    files = _files(method, output, chain, launch, then)
    if None in files:
        typer.echo(files[None], nl=False)
        return
    for path in files:
        if path is not None and path.exists() and not force:
            raise ConfigError(f"{path}: exists already. Choose another name, or overwrite it with --force.")
    for path, text in files.items():
        if path is not None:
            with atomic(path) as handle:
                handle.write(text)
    *run, last = files
    if launch is None:
        console.note(f"Wrote {last}. Edit the paths, then: stillhouse check {last}")
        return
    if run:
        console.note(f"Wrote {run[0]} and {last}. Edit the paths, then: stillhouse check {run[0]}")
    else:
        console.note(f"Wrote {last}.")
    name = run[0] if run else "RUN.yaml"
    console.note(f"Start it with: accelerate launch --config_file {last} -m stillhouse run {name}")


def _files(
    method: str | None, output: Path | None, chain: bool, launch: str | None, then: str | None
) -> dict[Path | None, str]:
    """What to write where, the run's file first; None: to the terminal."""
    if launch is not None and launch not in get_args(Parallelism):
        allowed = ", ".join(get_args(Parallelism))
        raise ConfigError(Fault("--launch", "is no way to launch a run", got=launch, allowed=allowed))
    if method is None:
        if launch is None or chain:
            raise ConfigError("Name a method; `stillhouse methods` lists them.")
        return {output or Path(launch_file(launch)): launch_yaml(launch)}
    text = starting_chain(method, then) if chain else starting_yaml(method)
    if launch is None:
        return {output: text}
    if output is None:
        raise ConfigError(
            Fault("--launch", "writes a file beside the run's", hint="Name that: --output run.yaml")
        )
    return {output: text, output.with_name(launch_file(launch)): launch_yaml(launch)}


def launch_file(kind: str) -> str:
    """The name of accelerate's configuration for a parallelism."""
    return f"accelerate-{kind}.yaml"


def launch_yaml(kind: str) -> str:
    """A configuration of `accelerate launch` for a parallelism."""
    return (resources.files("stillhouse.runs") / "launch" / f"{kind}.yaml").read_text(encoding="utf-8")


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
    tree = {
        "name": method,
        "recipe": method,
        "student": STUDENT,
        **_teachers(recipe.teachers),
        **values,
        "data": {
            "train": {"kind": "jsonl", "path": _rows_for(recipe)},
            "valid": "valid.jsonl",
            **LENGTHS,
            **values.get("data", {}),
        },
    }
    header = "\n".join(f"# {line}".rstrip() for line in recipe.header.splitlines())
    return f"{header}\n\n{USAGE}\n{commented_yaml(RunConfig, tree)}"


def starting_chain(method: str, then: str | None = None) -> str:
    """A chain around a method: a warm start before it, the student in int4 and exported behind it.

    Args:
        method: its name.
        then: the name of one that trains the student of the first further.

    Raises:
        ConfigError: no method has one of the names.
    """
    from stillhouse import recipes
    from stillhouse.config.writing import dump

    stages: dict[str, Any] = {"warm": {"recipe": "sft", "student": STUDENT}}
    stages["distil"] = _training(recipes.find(method), "stage:warm")
    last = "distil"
    if then is not None:
        stages[then] = _training(recipes.find(then), "stage:distil")
        last = then
    stages["int4"] = {"quantise": {"weights": "int4"}, "student": {"path": f"stage:{last}"}}
    stages["exported"] = {"export": {"to": "safetensors"}, "student": {"path": f"stage:{last}"}}
    tree = {
        "name": method,
        "data": {"train": TRAIN, "valid": "valid.jsonl", **LENGTHS},
        "stages": stages,
    }
    header = (
        "# What is outside of `stages` holds for all; `stage:NAME` is the student of an earlier stage.\n"
        "# Set the paths of models and data, then: stillhouse check FILE, and stillhouse run FILE.\n"
        f"# The options of a training stage: stillhouse init {method}\n"
    )
    if any(ROWS["rejected"] in str(stage.get("data")) for stage in stages.values()):
        header += (
            f"# {ROWS['rejected']} holds rows with prompt, chosen and rejected; stages with `generate` and "
            "`pairs` can make them.\n"
        )
    return header + dump(tree)


def _training(recipe: Recipe, start: str) -> dict[str, Any]:
    """A stage that trains by a recipe from the student of an earlier one."""
    teachers = _teachers(recipe.teachers)
    if list(teachers) == ["teachers"] and list(teachers["teachers"]) == ["reference"]:
        teachers["teachers"]["reference"]["path"] = start  # without a teacher: the student at its start
    rows = _rows_for(recipe)
    data = {} if rows == TRAIN else {"data": {"train": rows}}
    return {"recipe": recipe.name, "student": {"path": start}, **teachers, **data}


def _rows_for(recipe: Recipe) -> str:
    """A name for the file with the rows that a recipe needs."""
    return next((file for need, file in ROWS.items() if need in recipe.requirements.data), TRAIN)


def _teachers(names: tuple[str, ...]) -> dict[str, Any]:
    """A place for each of these teachers."""
    from stillhouse.core.requirements import MAIN

    found = {
        name: {"kind": "live", "path": f"path/or/hub-name/of/the/{'teacher' if name == MAIN else name}"}
        for name in names
    }
    main = {"teacher": found.pop(MAIN)} if MAIN in found else {}
    return main | ({"teachers": found} if found else {})
