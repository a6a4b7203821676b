"""stillhouse eval: how good a model is on held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console


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
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.files import write_json, write_jsonl
    from stillhouse.runner.evaluation import evaluate_model

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ConfigError(Fault("--seeds", "must be whole numbers separated by commas", got=seeds)) from None
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "no_repeat_ngram_size": no_repeat_ngram}
    result, rows = evaluate_model(
        model, data, teacher=teacher, template=template, sampling=sampling, seeds=numbers, limit=limit
    )
    if output is not None:
        write_jsonl(output.with_suffix(".jsonl"), rows)
        write_json(output, result)
    console.table(("metric", "value"), list(result["metrics"].items()), title=model)
