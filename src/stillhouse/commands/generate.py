"""stillhouse generate: responses as a file, from the models of a run or from any model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stillhouse import console
from stillhouse.commands.app import RESPONSES, app
from stillhouse.commands.options import (
    Overrides,
    RayOption,
    ShardOption,
    TemplateOption,
    faults_as_options,
    shard_choice,
    stage_output,
    template_choice,
)
from stillhouse.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stillhouse.runs.config import RunConfig
    from stillhouse.runs.generate import GenerateResult
OutputOption = Annotated[
    Path, stage_output("The file to write (.jsonl or .parquet), also s3://... and the like.")
]
DataOption = Annotated[
    str | None, typer.Option(metavar="PATH", help="Without a YAML file: rows with prompts.")
]


@app.command("generate", rich_help_panel=RESPONSES)
def generate(
    output: OutputOption,
    file: Annotated[
        Path | None,
        typer.Argument(help="YAML file of a run; or give --model and --data.", metavar="RUN.YAML"),
    ] = None,
    overrides: Overrides = None,
    by: Annotated[
        Literal["teacher", "student"], typer.Option(help="Which model of the run generates.")
    ] = "teacher",
    model: Annotated[str | None, typer.Option(help="Without a YAML file: folder or hub name.")] = None,
    data: DataOption = None,
    template: TemplateOption = None,
    temperature: Annotated[float, typer.Option(help="With --model: 0 is greedy.", min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --model: 1 is all tokens.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="With --model: length limit of a response.", min=1)] = 256,
    max_prompt: Annotated[int, typer.Option(help="With --model: longer prompts are dropped.", min=1)] = 512,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Responses for each prompt.", min=1)] = 1,
    seed: Annotated[int | None, typer.Option(help="Default: train.seed.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many prompts.", min=1)] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Name of the generator in the rows; default: teacher, student or --model."),
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Also score each response with the model that generated it.")
    ] = False,
    shard: ShardOption = None,
    ray: RayOption = None,
    chunk: Annotated[int, typer.Option(help="Responses to generate between two saves.", min=1)] = 512,
) -> None:
    """Generate responses to prompts into a JSONL file; the same command resumes after an interruption.

    Models and data are those of RUN.YAML, or --model and --data.
    """
    from stillhouse.files import check_output_file
    from stillhouse.locks import only_one_writes
    from stillhouse.runs.checks import preflight
    from stillhouse.runs.generate import GenerateArguments
    from stillhouse.runs.generate import generate as generate_responses

    index, count = shard_choice(shard, ray)
    if file is not None and model is not None:
        raise ConfigError(
            Fault("--model", "cannot be combined with a YAML file", hint="Give one of the two.")
        )
    check_output_file("--output", output, ".jsonl", ".parquet")
    label = label or (model if file is None else None)
    arguments = GenerateArguments(output, by, label, samples, seed, limit, index, count, chunk, score)
    with faults_as_options(OPTIONS) if file is None else contextlib.nullcontext():
        sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        config = _config(file, overrides, model, data, template, max_prompt, sampling)
        preflight(config, engine_here=ray is None)
        with only_one_writes(output, f".{index}-of-{count}" if count > 1 else ""):
            if ray is not None:
                from stillhouse.runs.ray_data import generate_on_ray as generate_responses

                arguments = replace(arguments, shards=ray)
            result = generate_responses(config, arguments)
    _print_summary(output, result, index, count)


def _print_summary(output: Path, result: GenerateResult, index: int, count: int) -> None:
    if result.resumed == result.total:
        console.say(f"{output}: all {result.total:,} responses are there already; nothing to do.")
        return
    if not result.complete:
        console.say(
            f"{output}: shard {index}/{count} is finished, {result.share:,} responses; "
            f"{result.finished:,} of {result.total:,} are there. The last shard that finishes joins them all."
        )
        return
    console.say(
        f"{output}: {result.total:,} responses, {result.tokens:,} tokens; "
        f"{result.truncated:,} truncated at the length limit"
        + (f"; {result.resumed:,} of them were there before" if result.resumed else "")
    )


def _config(
    file: Path | None,
    overrides: list[str] | None,
    model: str | None,
    data: str | None,
    template: str | None,
    max_prompt: int,
    sampling: dict[str, Any],
) -> RunConfig:
    """The configuration of the YAML file, or one in which --model is both student and teacher."""
    from stillhouse.runs.own_settings import own_settings
    from stillhouse.runs.resolve import resolve

    if file is not None:
        config = resolve(file, list(overrides or ())).config
    elif model is None or data is None:
        missing = "--model" if model is None else "--data"
        raise ConfigError(Fault(missing, "is missing", hint="Or give the YAML file of a run."))
    else:
        tree: dict[str, Any] = {
            "student": {"path": model, "dtype": "auto"},
            "teacher": {"kind": "live", "path": model, "dtype": "auto"},
            "data": {
                "train": data,
                "template": template_choice(template) or own_settings(model).data.get("template", "auto"),
                "max_prompt": max_prompt,
                "max_response": sampling["max_tokens"],
            },
            "engine": {"kind": "transformers", "sampling": sampling},
            "objective": "cross_entropy",
        }
        config = resolve(tree).config
    return config


OPTIONS = {
    "student.path": "--model",
    "teacher.path": "--model",
    "data.train": "--data",
    "data.template": "--template",
    "data.template.kind": "--template",
    "data.template.without_input": "--template",
    "data.template.with_input": "--template",
    "data.max_prompt": "--max-prompt",
    "data.max_response": "--max-tokens",
    "engine.sampling.max_tokens": "--max-tokens",
    "engine.sampling.temperature": "--temperature",
    "engine.sampling.top_p": "--top-p",
}
"""Field of the configuration of --model and --data -> option."""
