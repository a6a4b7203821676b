"""stillhouse judge: which of two systems answers better, by a model on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("judge")(command)


def command(
    first: Annotated[
        Path, typer.Argument(help="Run folder or JSONL file of answers.", metavar="A", show_default=False)
    ],
    second: Annotated[
        Path, typer.Argument(help="What A is compared with: the same.", metavar="B", show_default=False)
    ],
    url: Annotated[
        str, typer.Option(help="OpenAI-compatible server of the judge, such as http://127.0.0.1:8000/v1.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The judge's name at the server; default: the only one it serves.")
    ] = None,
    key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the server's key.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Which task of the run folders.")] = None,
    rubric: Annotated[
        Path | None,
        typer.Option(
            help="File with {question}, {answer_a}, {answer_b} that asks for [[A]], [[B]] or [[C]]."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many questions.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a reply.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the judge.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests under way at a time.")] = 8,
    price_in: Annotated[
        float | None, typer.Option(min=0.0, help="Price of a million tokens that the judge reads.")
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(min=0.0, help="Price of a million tokens that it writes.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The result (JSON); default: beside A's answers, where the report looks."
        ),
    ] = None,
) -> None:
    """Let a judge compare the answers of A and B, each pair in both orders, and tell A's win rate.

    Replies are kept: the same command goes on where it was interrupted and asks nothing twice.
    """
    from pydantic import ValidationError

    from stillhouse.errors import ConfigError, Fault
    from stillhouse.evaluate.judge import Rubric
    from stillhouse.remote import ServerConnection
    from stillhouse.runs.folder import check_file
    from stillhouse.runs.judging import Price, default_output, find_answers, run_judge

    try:
        server = ServerConnection(url=url, model=model, key_env=key_env, concurrency=concurrency)
    except ValidationError as error:
        names = {"url": "--url", "key_env": "--key-env", "concurrency": "--concurrency"}
        raise ConfigError(
            *(Fault(names.get(str(one["loc"][0]), str(one["loc"][0])), one["msg"]) for one in error.errors())
        ) from error
    ours, theirs = find_answers(first, task, "A"), find_answers(second, task, "B")
    target = output or default_output(ours, theirs)
    check_file("--output", target, ".json")
    asked = Rubric(file=rubric, max_tokens=max_tokens, temperature=temperature)
    result = run_judge(ours, theirs, server, asked, target, limit=limit, price=Price(price_in, price_out))
    title = f"{ours.label} against {theirs.label}, by {result['settings']['judge']}"
    console.print_table(("measure", "value"), list(result["metrics"].items()), title=title)
    console.say(str(target))
