"""stillhouse methods: the table of recipes."""

from __future__ import annotations

import typer

from stillhouse import console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("methods")(command)


def command() -> None:
    """List the methods: name, what it does, paper. `stillhouse init NAME` writes a YAML file for one."""
    from stillhouse.recipes import all_recipes

    rows = [(recipe.name, recipe.summary, recipe.paper) for recipe in all_recipes()]
    console.print_table(("method", "what it does", "paper"), rows)
