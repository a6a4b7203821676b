"""stillhouse pairs: preference pairs from several responses to each prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import RESPONSES, app
from stillhouse.errors import ConfigError, Fault
from stillhouse.urls import path_at

if TYPE_CHECKING:
    from stillhouse.evaluate.preference_files import PairsResult
    from stillhouse.evaluate.rankers import Ranker


@app.command("pairs", rich_help_panel=RESPONSES)
def pairs(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of `generate -n 2` and more, JSONL with responses, or a run folder.",
            metavar="FILE|RUN...",
            parser=path_at,
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The pairs (JSONL).", show_default=False)],
    rank: Annotated[
        str,
        typer.Option(
            "--rank",
            help="A ranker, or one with options such as '{kind: likelihood, teacher: FOLDER}'.",
            show_default=False,
        ),
    ],
    min_margin: Annotated[
        float, typer.Option(min=0.0, help="A pair needs a greater difference of scores.")
    ] = 0.0,
) -> None:
    """Rank the responses to each prompt; the best is `chosen`, the worst `rejected`, with their margin.

    Ties, and prompts whose responses the ranker cannot score, are left out and counted.
    """
    from stillhouse.evaluate.preference_files import pairs_of_files
    from stillhouse.files import check_output_file
    from stillhouse.locks import only_one_writes

    check_output_file("--output", output, ".jsonl")
    ranker = parse_ranker(rank, "--rank")
    with only_one_writes(output):
        result = pairs_of_files(files, ranker, output, min_margin=min_margin)
    _print_result(output, result, ranker.kind)


def _print_result(output: Path, result: PairsResult, ranker: str) -> None:
    if result.left_out:
        console.print_table(("left out", "prompts"), list(result.left_out.items()))
    told = f"{output}: {result.pairs:,} pairs, mean margin {result.mean_margin:.4g} by {ranker}"
    console.say(f"{told}; they were there already, nothing to do." if result.cached else told)


def parse_ranker(text: str, option: str) -> Ranker:
    """A ranker as given on the command line: a name, or YAML such as `{kind: reward, model: FOLDER}`.

    Raises:
        ConfigError: it is none, or has wrong options.
    """
    from pydantic import TypeAdapter, ValidationError

    from stillhouse.config.strict_yaml import parse_value
    from stillhouse.evaluate.rankers import RankerField

    adapter: TypeAdapter[Any] = TypeAdapter(RankerField)
    try:
        ranker: Ranker = adapter.validate_python(parse_value(text))
    except ValidationError as error:
        raise ConfigError(
            *(
                Fault(option, f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip(), got=text)
                for one in error.errors()
            )
        ) from error
    return ranker
