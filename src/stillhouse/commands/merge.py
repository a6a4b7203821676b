"""stillhouse merge: the shards of a file as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RESPONSES, app
from stillhouse.urls import path_at


@app.command("merge", rich_help_panel=RESPONSES)
def merge(
    output: Annotated[
        Path,
        typer.Argument(
            help="The --output of the commands that had --shard.",
            metavar="OUTPUT",
            parser=path_at,
            show_default=False,
        ),
    ],
) -> None:
    """Join the shards that `generate --shard` or `curate --shard` wrote, in the order of their rows.

    The last shard that finishes does so by itself; this names those that are missing, unfinished or foreign.
    """
    from stillhouse.locks import only_one_writes
    from stillhouse.rollouts.offline.merging import merge_shards

    with only_one_writes(output):
        result = merge_shards(output)
    if not result.written:
        left = (
            f"{result.shards:,} shards whose rows are all in it are deleted"
            if result.shards
            else "nothing to do"
        )
        console.say(f"{output}: is finished already; {left}.")
        return
    if result.counts:
        console.print_table(("source", "filter", "reason", "dropped"), list(result.counts))
    kept = "" if result.kept is None else f", kept {result.kept:,} prompts"
    console.say(f"{output}: {result.rows:,} rows of {result.shards:,} shards{kept}")
