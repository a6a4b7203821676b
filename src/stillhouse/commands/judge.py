"""stillhouse judge: win rate of one system against another, judged by a model on a server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import RESULTS, app
from stillhouse.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stillhouse.remote import ServerConnection


RubricFile = Annotated[
    Path | None,
    typer.Option(help="File with {question}, {answer_a}, {answer_b} that asks for [[A]], [[B]] or [[C]]."),
]


OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="The result (JSON); default: in A's run folder, where the report finds it."
    ),
]


@app.command("judge", rich_help_panel=RESULTS)
def judge(
    first: Annotated[
        Path,
        typer.Argument(
            help="Run folder, its student's, or JSONL file of answers.", metavar="A", show_default=False
        ),
    ],
    second: Annotated[
        Path, typer.Argument(help="Run folder or file to compare A with.", metavar="B", show_default=False)
    ],
    url: Annotated[
        str, typer.Option(help="OpenAI-compatible server of the judge, such as http://127.0.0.1:8000/v1.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Name of the judge at the server; default: the only model it serves.")
    ] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the server's key.")] = None,
    task: Annotated[str | None, typer.Option(help="Task of the run folders.")] = None,
    rubric: RubricFile = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many questions.")] = None,
    max_side: Annotated[int | None, typer.Option(min=1, help="Longer side of images in pixels.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a reply.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature of the judge.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at most.")] = 8,
    price_in: Annotated[float | None, typer.Option(min=0.0, help="Price of a million prompt tokens.")] = None,
    price_out: Annotated[
        float | None, typer.Option(min=0.0, help="Price of a million completion tokens.")
    ] = None,
    output: OutputOption = None,
) -> None:
    """Have a model judge the answers of A against those of B, each pair in both orders: A's win rate.

    Replies are saved as they come: the same command resumes after an interruption and repeats no request.
    """
    from stillhouse.evaluate.judge import Rubric
    from stillhouse.evaluate.judge_answers import find_answers
    from stillhouse.evaluate.judge_files import TokenPrice, default_output, judge_files
    from stillhouse.files import check_output_file
    from stillhouse.locks import only_one_writes

    server = _server(url, model, key_env, concurrency)
    ours, theirs = find_answers(first, task, "A"), find_answers(second, task, "B")
    target = output or default_output(ours, theirs)
    check_output_file("--output", target, ".json")
    with only_one_writes(target):
        result = judge_files(
            ours,
            theirs,
            server,
            Rubric(file=rubric, max_tokens=max_tokens, temperature=temperature),
            target,
            limit=limit,
            max_side=max_side,
            price=TokenPrice(price_in, price_out),
        )
    _print_result(f"{ours.label} against {theirs.label}", result, target)


def _print_result(systems: str, result: Mapping[str, Any], target: Path) -> None:
    title = f"{systems}, by {result['settings']['judge']}"
    console.print_table(("measure", "value"), list(result["metrics"].items()), title=title)
    console.say(str(target))


def _server(url: str, model: str | None, key_env: str | None, concurrency: int) -> ServerConnection:
    from pydantic import ValidationError

    from stillhouse.remote import ServerConnection

    try:
        return ServerConnection(url=url, model=model, key_env=key_env, concurrency=concurrency)
    except ValidationError as error:
        options = {"url": "--url", "key_env": "--key-env", "concurrency": "--concurrency"}
        fields = ((str(one["loc"][0]), one["msg"]) for one in error.errors())
        raise ConfigError(
            *(Fault(options.get(field, field), message) for field, message in fields)
        ) from error
