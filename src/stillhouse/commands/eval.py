"""stillhouse eval: metrics of models on held-out prompts and tasks."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import RESULTS, app
from stillhouse.commands.options import TemplateOption, faults_as_options, template_choice
from stillhouse.core.distributed import rank_and_size
from stillhouse.core.lost_peers import lost_peers_as_faults
from stillhouse.errors import ConfigError, Fault

OWN = "Default: that of the run which made the model, else"


TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A YAML file with `tasks: [...]`, or names of tasks; may be repeated.", show_default=False
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="One model: the result (JSON; answers as JSONL next to it). Several models, or tasks: a folder; "
        "default: runs/comparison.",
    ),
]


@app.command("eval", rich_help_panel=RESULTS)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Models to evaluate: folders, hub names or run folders. Several are compared.",
            metavar="MODEL...",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL or parquet file of prompts with references.", show_default=False),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Also measure KL and agreement with this model.")
    ] = None,
    tasks: TasksOption = None,
    template: TemplateOption = None,
    temperature: Annotated[
        float | None,
        typer.Option(help=f"0 is greedy; the papers use 1. {OWN}, 0.", show_default=False),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help=f"Sampling seeds, separated by commas; one pass for each. {OWN}, 10.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help=f"Length limit of an answer. {OWN}, 256.", show_default=False)
    ] = None,
    no_repeat_ngram: Annotated[
        int | None,
        typer.Option(
            help=f"Never repeat an n-gram of this size; the papers use 6. {OWN}, 0 (off).", show_default=False
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many prompts of --data.")] = None,
    output: OutputOption = None,
) -> None:
    """Evaluate models on held-out prompts and tasks; with --teacher also KL and agreement.

    A run folder, or its student's, is asked as its run did (template, lengths, sampling, seeds), unless an
    option says otherwise.

    Several models, or --tasks, give a folder of results with a page, report.html; the same command resumes
    after an interruption.
    """
    if data is None and not tasks:
        raise ConfigError(Fault("--data", "is missing", hint="Give held-out rows (--data), or --tasks."))
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "no_repeat_ngram_size": no_repeat_ngram}
    settings = _settings(tasks or [], sampling, seeds, limit)
    if len(models) > 1 or tasks:
        _evaluate_several(models, data, teacher, template_choice(template), settings, output)
    elif data is not None:
        _evaluate_one(models[0], data, teacher, template_choice(template), settings, output)


def _settings(
    tasks: list[str], sampling: dict[str, Any], seeds: str | None, limit: int | None
) -> dict[str, Any]:
    """The `evaluate` section that the options make; what none of them says is left out."""
    given = {name: value for name, value in sampling.items() if value is not None}
    settings = _tasks(tasks)
    settings["sampling"] = {**(settings.get("sampling") or {}), **given}
    settings |= {} if seeds is None else {"seeds": _seeds(seeds)}
    return settings | ({} if limit is None else {"limit": limit})


@lost_peers_as_faults()
def _evaluate_one(
    model: str,
    data: Path,
    teacher: str | None,
    template: str | dict[str, Any] | None,
    settings: dict[str, Any],
    output: Path | None,
) -> None:
    from stillhouse.files import check_output_file, write_json, write_jsonl
    from stillhouse.locks import only_one_writes
    from stillhouse.report.metrics import MEASURED_BY
    from stillhouse.report.results import rows_left_out
    from stillhouse.report.scores import intervals
    from stillhouse.runs.evaluate_models import evaluate_model

    if output is not None:
        check_output_file("--output", output, ".json")
    main = rank_and_size()[0] == 0
    with faults_as_options(OPTIONS), only_one_writes(output) if output and main else nullcontext():
        result, rows = evaluate_model(model, data, teacher=teacher, template=template, evaluate=settings)
        metrics = result["metrics"]
        sure = intervals(metrics, rows)
        if output is not None and main:
            write_jsonl(output.with_suffix(".jsonl"), rows)
            write_json(output, {**result, "intervals": sure})
    lines = [
        (
            name,
            value,
            f"{console.number(sure[name][0])} to {console.number(sure[name][1])}" if name in sure else None,
        )
        for name, value in metrics.items()
        if name not in MEASURED_BY  # how fast it was says little: nobody measured that for its own sake
    ]
    left_out = rows_left_out(result["settings"])
    title = f"{model} ({result['settings']['prompts']:,} prompts{'; ' + left_out if left_out else ''})"
    console.print_table(("metric", "value", "95% interval"), lines, title=title)


@lost_peers_as_faults()
def _evaluate_several(
    models: list[str],
    data: Path | None,
    teacher: str | None,
    template: str | dict[str, Any] | None,
    evaluate: dict[str, Any],
    output: Path | None,
) -> None:
    from stillhouse.files import check_writable
    from stillhouse.locks import only_one_in
    from stillhouse.report import load_runs, print_comparison, write_report
    from stillhouse.runs.evaluate_models import evaluate_models

    folder = output or Path("runs/comparison")
    check_writable("--output", folder)
    main = rank_and_size()[0] == 0
    with only_one_in(folder, "--output") if main else nullcontext():
        with faults_as_options(OPTIONS):
            folders = evaluate_models(
                models, folder, teacher=teacher, template=template, data=data, evaluate=evaluate
            )
        if not main:
            return
        print_comparison(load_runs(folders))
        console.say(str(write_report(folders, folder / "report.html")))


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(Fault("--seeds", "must be whole numbers separated by commas", got=text)) from None
    if min(numbers) < 0:
        raise ConfigError(Fault("--seeds", "must not be negative", got=text))
    return numbers


def _tasks(given: list[str]) -> dict[str, Any]:
    """`tasks` from YAML files and names, with whatever else of a run's `evaluate` section the files set."""
    from stillhouse.config.strict_yaml import read

    values: dict[str, Any] = {"tasks": []} if given else {}
    for text in given:
        if not text.endswith((".yaml", ".yml")):
            values["tasks"] += [name.strip() for name in text.split(",")]
            continue
        found, _ = read(text)
        more = found.pop("tasks", None)
        if not isinstance(more, list):
            raise ConfigError(Fault("--tasks", f"{text} has no list of tasks", hint="Write `tasks: [...]`."))
        values = {**values, **found, "tasks": [*values["tasks"], *more]}
    return values


OPTIONS = {
    "student.path": "MODEL",
    "teacher.path": "--teacher",
    "data.train": "--data",
    "data.template": "--template",
    "data.template.kind": "--template",
    "data.template.without_input": "--template",
    "data.template.with_input": "--template",
    "data.max_response": "--max-tokens",
    "evaluate.sampling.temperature": "--temperature",
    "evaluate.sampling.max_tokens": "--max-tokens",
    "evaluate.sampling.no_repeat_ngram_size": "--no-repeat-ngram",
    "evaluate.limit": "--limit",
}
"""Field of the configuration -> option."""
