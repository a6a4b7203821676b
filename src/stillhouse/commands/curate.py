"""stillhouse curate: filters over files of responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import RESPONSES, app
from stillhouse.commands.options import RayOption, ShardOption, shard_choice, stage_output
from stillhouse.errors import ConfigError, Fault
from stillhouse.urls import path_at

if TYPE_CHECKING:
    from stillhouse.models import TeacherModel
    from stillhouse.rollouts.offline.filter_files import FilterResult
    from stillhouse.rollouts.offline.filters import Filter
    from stillhouse.runs.config import RunConfig

Best = Annotated[
    str | None,
    typer.Option(
        help="Instead of filtering: keep the best response to each prompt, by a ranker of `pairs`.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Path, stage_output("Kept rows (.jsonl or .parquet); OUTPUT.dropped gets the others.")
]
Drafts = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Instead of filtering: write prompts that ask for the best answer, given so many responses.",
        show_default=False,
    ),
]


@app.command("curate", rich_help_panel=RESPONSES)
def curate(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of `generate` (one source, or both of pairs), JSONL with responses, or a run folder.",
            metavar="FILE|RUN...",
            parser=path_at,
            show_default=False,
        ),
    ],
    output: OutputOption,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            "-f",
            help="A name, or options such as '{kind: overlap, n: 8}'; may be repeated, applied in order.",
            show_default=False,
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="YAML file of a run: its filters, evaluation sets and teacher, unless given here."),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="A set that must not overlap; may be repeated.", show_default=False),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Scores the likelihood of responses.")] = None,
    best: Best = None,
    drafts: Drafts = None,
    shard: ShardOption = None,
    ray: RayOption = None,
) -> None:
    """Filter responses: a file of what is kept, one of what is dropped and why, and counts.

    Interrupted, the same command resumes from what it has checked and scored.
    """
    from stillhouse.files import check_output_file

    check_output_file("--output", output, ".jsonl", ".parquet")
    place = shard_choice(shard, ray)
    given: dict[str, Any] = {"--filter": filters, "--like": like, "--held-out": held_out}
    given |= {"--teacher": teacher, "--shard": shard, "--ray": ray}
    if drafts is not None:
        _refuse_beside("--drafts", {**given, "--best": best})
        _aggregate(files, drafts, output)
    elif best is not None:
        _refuse_beside("--best", given)
        _keep_best(files, best, output)
    else:
        _filter(files, output, filters or (), like, held_out or (), teacher, place if ray is None else ray)


def _filter(
    files: Sequence[Path],
    output: Path,
    filters: Sequence[str],
    like: Path | None,
    held_out: Sequence[Path],
    teacher: str | None,
    share: tuple[int, int] | int,
) -> None:
    """Filter one of so many shards, or so many shards on Ray."""
    from stillhouse.locks import only_one_writes
    from stillhouse.rollouts.offline.filter_files import filter_files
    from stillhouse.runs.resolve import resolve

    config = resolve(like).config if like is not None else None
    chosen = _filters(filters, config)
    given: dict[str, Any] = {"held_out": _held_out(held_out, config), "teacher": _teacher(teacher, config)}
    index, count = (0, 1) if isinstance(share, int) else share
    with only_one_writes(output, f".{index}-of-{count}" if count > 1 else ""):
        if isinstance(share, int):
            from stillhouse.runs.ray_data import filter_on_ray

            result = filter_on_ray(files, chosen, output, shards=share, **given)
        else:
            result = filter_files(files, chosen, output, shard=share, **given)
    _print_result(output, result, (index, count))


def _refuse_beside(option: str, others: Mapping[str, Any]) -> None:
    given = [name for name, value in others.items() if value]
    if given:
        hint = f"Give it to a command of its own first, and what that keeps to {option}."
        raise ConfigError(*(Fault(name, f"has no effect with {option}", hint=hint) for name in given))


def _keep_best(files: Sequence[Path], ranker: str, output: Path) -> None:
    from stillhouse.commands.pairs import parse_ranker
    from stillhouse.evaluate.best_of import best_of_files
    from stillhouse.locks import only_one_writes

    parsed = parse_ranker(ranker, "--best")
    with only_one_writes(output):
        result = best_of_files(files, parsed, output)
    if result.left_out:
        console.print_table(("left out", "prompts"), list(result.left_out.items()))
    told = f"{output}: the best response to {result.kept:,} of {result.prompts:,} prompts by {parsed.kind}"
    if result.cached:
        console.say(f"{told}; they were there already, nothing to do.")
    else:
        console.say(f"{told}, on average {result.gain:.4g} better than the mean of its prompt")


def _aggregate(files: Sequence[Path], count: int, output: Path) -> None:
    from stillhouse.locks import only_one_writes
    from stillhouse.rollouts.offline.drafts import aggregate_drafts

    with only_one_writes(output):
        result = aggregate_drafts(files, count, output)
    if result.left_out:
        console.print_table(("left out", "prompts"), list(result.left_out.items()))
    if result.cached:
        console.say(f"{output}: all {result.rows:,} rows are there already; nothing to do.")
        return
    answers = f"{result.answered:,} with the data set's response as the answer"
    if result.answered < result.rows:
        answers += f"; for the others have a teacher write it: stillhouse generate --data {output}"
    console.say(f"{output}: {result.rows:,} prompts with {count} drafts each, {answers}")


def _print_result(output: Path, result: FilterResult, shard: tuple[int, int]) -> None:
    from stillhouse.rollouts.offline.filtered_rows import dropped_path

    if result.counts:
        console.print_table(("source", "filter", "reason", "dropped"), result.counts)
    unit = "prompts" if len({source for source, *_ in result.counts}) < 2 else "pairs"
    if not result.finished:
        pending = f" before {', '.join(result.pending)}" if result.pending else ""
        console.say(
            f"{output}: shard {shard[0]}/{shard[1]} is finished, kept {result.kept:,} of {result.prompts:,} "
            f"{unit}{pending}. The last shard that finishes joins them all."
        )
        return
    summary = f"{output}: kept {result.kept:,} of {result.prompts:,} {unit}"
    if result.cached:
        console.say(f"{summary}; it was there already with these filters, nothing to do.")
    else:
        console.say(f"{summary}; what was dropped, and why: {dropped_path(output)}")


def _filters(texts: Sequence[str], config: RunConfig | None) -> list[Filter]:
    """The given filters, or else those of the run."""
    from stillhouse.rollouts.offline.filters import REGISTRY

    filters = _parse_filters(texts)
    if not filters and config is not None:
        filters = list(getattr(config.responses, "filters", ()))
    if not filters:
        raise ConfigError(Fault("--filter", "there is none", allowed=", ".join(REGISTRY.kinds())))
    return filters


def _parse_filters(texts: Sequence[str]) -> list[Filter]:
    """Filters as given on the command line: a name, or YAML such as `{kind: overlap, n: 8}`.

    Raises:
        ConfigError: a text is not YAML, names no filter, or has wrong options.
    """
    from pydantic import TypeAdapter, ValidationError

    from stillhouse.config.strict_yaml import parse_value
    from stillhouse.rollouts.offline.filters import FilterField

    found, faults = [], []
    adapter: TypeAdapter[Any] = TypeAdapter(FilterField)
    for text in texts:
        try:
            found.append(adapter.validate_python(parse_value(text)))
        except ValidationError as error:
            faults += [
                Fault("--filter", f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip(), got=text)
                for one in error.errors()
            ]
    if faults:
        raise ConfigError(*faults)
    return found


def _held_out(paths: Sequence[Path], config: RunConfig | None) -> tuple[str, ...]:
    """The texts of the given sets, or of those that the run evaluates on."""
    from stillhouse.data.datasets import dataset_at
    from stillhouse.rollouts.offline.filters.overlap import held_out_texts

    if paths or config is None:
        return held_out_texts(dataset_at(path) for path in paths)
    return held_out_texts(config.evaluation_sets())


def _teacher(path: str | None, config: RunConfig | None) -> TeacherModel | None:
    from stillhouse.models import TeacherModel

    if path is not None:
        return TeacherModel(path=path)
    return config.teacher.model_to_load() if config is not None and config.teacher is not None else None
