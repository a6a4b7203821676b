"""stillhouse eval: how good a model is on held-out prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.errors import ConfigError, DataError, Fault


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("eval")(command)


def command(
    model: Annotated[
        str,
        typer.Argument(help="Model to evaluate: folder or hub name.", metavar="MODEL", show_default=False),
    ],
    data: Annotated[
        Path, typer.Option(help="JSONL or parquet file of prompts with references.", show_default=False)
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Also measure KL and agreement with this model.")
    ] = None,
    template: Annotated[str, typer.Option(help="Prompt template: auto, alpaca, chat or plain.")] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy; the papers use 1.")] = 0.0,
    seeds: Annotated[str, typer.Option(help="One pass for each, separated by commas.")] = "10",
    max_tokens: Annotated[int, typer.Option(help="Length limit of an answer.")] = 256,
    no_repeat_ngram: Annotated[
        int, typer.Option(help="Never repeat an n-gram of this size; the papers use 6, 0 is off.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(help="At most this many prompts.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the result (JSON) and the answers (JSONL beside it)."),
    ] = None,
) -> None:
    """Measure a model on held-out prompts: ROUGE-L and length; with --teacher also KL and agreement."""
    from stillhouse.files import write_json, write_jsonl
    from stillhouse.runner.evaluation import evaluate_model
    from stillhouse.runner.folder import check_writable

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ConfigError(Fault("--seeds", "must be whole numbers separated by commas", got=seeds)) from None
    if min(numbers) < 0:
        raise ConfigError(Fault("--seeds", "must not be negative", got=seeds))
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "no_repeat_ngram_size": no_repeat_ngram}
    if output is not None:
        check_writable("--output", output.parent)
    with _as_options():
        result, rows = evaluate_model(
            model, data, teacher=teacher, template=template, sampling=sampling, seeds=numbers, limit=limit
        )
    if output is not None:
        write_jsonl(output.with_suffix(".jsonl"), rows)
        write_json(output, result)
    console.table(("metric", "value"), list(result["metrics"].items()), title=model)


OPTIONS = {
    "student.path": "MODEL",
    "teacher.path": "--teacher",
    "data.train": "--data",
    "data.template": "--template",
    "data.template.kind": "--template",
    "data.max_response": "--max-tokens",
    "evaluate.sampling.temperature": "--temperature",
    "evaluate.sampling.max_tokens": "--max-tokens",
    "evaluate.sampling.no_repeat_ngram_size": "--no-repeat-ngram",
    "evaluate.limit": "--limit",
}
"""Which option of the verb a place in the configuration stands for."""


@contextlib.contextmanager
def _as_options() -> Iterator[None]:
    """Faults in the words of the command line; one option that is wrong in two places is told once."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(*dict.fromkeys(map(_as_option, error.faults))) from error
    except DataError as error:
        raise DataError(str(error).replace("data.train", "--data")) from error


def _as_option(fault: Fault | str) -> Fault | str:
    if isinstance(fault, Fault):
        path = OPTIONS.get(fault.path, fault.path)
        hint = "Set a lower --max-tokens." if path == "--max-tokens" and fault.hint else fault.hint
        return replace(fault, path=path, hint=hint, origin=None)
    place, _, rest = fault.partition(": ")
    return f"{OPTIONS[place]}: {rest}" if place in OPTIONS else fault
