"""stillhouse methods: the table of recipes."""

from __future__ import annotations

from stillhouse import console
from stillhouse.commands.app import START, app


@app.command("methods", rich_help_panel=START)
def methods() -> None:
    """List the methods: name, what each does, paper. `stillhouse init NAME` writes a YAML file for one."""
    from stillhouse.recipes import all_recipes

    rows = [(recipe.name, recipe.summary, recipe.paper) for recipe in all_recipes()]
    console.print_table(("method", "what it does", "paper"), rows)
