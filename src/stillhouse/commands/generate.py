"""stillhouse generate: responses as a file, from the models of a run or from any model."""

from __future__ import annotations

import contextlib
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import console
from stillhouse.commands.arguments import Overrides
from stillhouse.commands.wording import as_options
from stillhouse.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stillhouse.runs.config import RunConfig


class By(StrEnum):
    """Who writes."""

    teacher = "teacher"
    student = "student"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("generate")(command)


def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The stage file to write (JSONL).", show_default=False)
    ],
    file: Annotated[
        Path | None,
        typer.Argument(help="YAML file of a run; or name --model and --data.", metavar="RUN.YAML"),
    ] = None,
    overrides: Overrides = None,
    by: Annotated[
        By, typer.Option(help="Which model of the run writes; whose side it stands on.")
    ] = By.teacher,
    model: Annotated[str | None, typer.Option(help="Without a YAML file: folder or hub name.")] = None,
    data: Annotated[Path | None, typer.Option(help="Without a YAML file: rows with prompts.")] = None,
    template: Annotated[str, typer.Option(help="With --model: auto, alpaca, chat or plain.")] = "auto",
    temperature: Annotated[float, typer.Option(help="With --model: 0 is greedy.", min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --model: 1 is all tokens.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="With --model: length limit of a response.", min=1)] = 256,
    max_prompt: Annotated[int, typer.Option(help="With --model: longer prompts are dropped.", min=1)] = 512,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Responses for each prompt.", min=1)] = 1,
    seed: Annotated[int | None, typer.Option(help="Default: train.seed.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many prompts.", min=1)] = None,
    label: Annotated[str | None, typer.Option(help="How the responses are labelled.")] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Also measure how likely the writer finds each response.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Which of --world processes this one is; torchrun sets it.")] = -1,
    world: Annotated[int, typer.Option(help="How many processes share the work.")] = 0,
    chunk: Annotated[
        int, typer.Option(help="Responses that are written before they are saved.", min=1)
    ] = 512,
) -> None:
    """Let a model answer prompts, into a JSONL file whose header says how; the same command again goes on.

    The models and the data are those of RUN.YAML, or --model and --data.
    """
    from stillhouse.runs.folder import check_file
    from stillhouse.runs.writing import Wanted, generate

    world = world or int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0")) if rank < 0 else rank
    if not 0 <= rank < world:
        raise ConfigError(
            Fault("--rank", "is not one of the processes", got=str(rank), allowed=f"0 to {world - 1}")
        )
    if file is not None and model is not None:
        raise ConfigError(Fault("--model", "does not go with a YAML file", hint="Name one of the two."))
    check_file("--output", output, ".jsonl")
    label = label or (model if file is None else None)
    wanted = Wanted(output, by.value, label, samples, seed, limit, rank, world, chunk, score)
    with as_options(OPTIONS) if file is None else contextlib.nullcontext():
        config = _config(
            file, overrides, model, data, template, max_prompt,
            {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens},
        )  # fmt: skip
        written = generate(config, wanted)
    if written.before == written.total:
        console.say(f"{output}: all {written.total:,} responses are there already; nothing to do.")
        return
    if written.samples is None:
        console.say(
            f"{output}: process {rank} of {world} is done; {written.there:,} of {written.total:,} responses "
            "are there. The file is whole when the others are done (same command, their --rank)."
        )
        return
    lengths = [len(sample.response.token_ids) for sample in written.samples]
    finished = sum(sample.response.finished for sample in written.samples)
    console.say(
        f"{output}: {written.total:,} responses, {sum(lengths):,} tokens; "
        f"{written.total - finished:,} cut at the length limit"
        + (f"; {written.before:,} of them were there before" if written.before else "")
    )


def _config(
    file: Path | None,
    overrides: list[str] | None,
    model: str | None,
    data: Path | None,
    template: str,
    max_prompt: int,
    sampling: dict[str, float],
) -> RunConfig:
    from stillhouse.runs.preflight import preflight
    from stillhouse.runs.resolve import resolve
    from stillhouse.runs.writing import of_model

    if file is not None:
        config = resolve(file, list(overrides or ())).config
    elif model is None or data is None:
        missing = "--model" if model is None else "--data"
        raise ConfigError(Fault(missing, "is missing", hint="Or give the YAML file of a run."))
    else:
        config = of_model(model, data, template, sampling, max_prompt)
    preflight(config)
    return config


OPTIONS = {
    "student.path": "--model",
    "teacher.path": "--model",
    "data.train": "--data",
    "data.template": "--template",
    "data.template.kind": "--template",
    "data.max_prompt": "--max-prompt",
    "data.max_response": "--max-tokens",
    "engine.sampling.max_tokens": "--max-tokens",
    "engine.sampling.temperature": "--temperature",
    "engine.sampling.top_p": "--top-p",
}
"""Which option of the verb a place in the configuration of --model and --data stands for."""
