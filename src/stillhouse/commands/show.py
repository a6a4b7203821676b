"""stillhouse show: responses and why they were kept or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stillhouse import console
from stillhouse.commands.app import RESPONSES, app

if TYPE_CHECKING:
    from stillhouse.rollouts.offline.reading import PromptResponses


@app.command("show", rich_help_panel=RESPONSES)
def show(
    what: Annotated[
        Literal["pairs", "responses"],
        typer.Argument(help="pairs: prompts with both responses; responses: all.", show_default=False),
    ],
    targets: Annotated[
        list[Path],
        typer.Argument(
            help="A run folder, or files of `generate` or `curate`.",
            metavar="RUN|FILE...",
            show_default=False,
        ),
    ],
    number: Annotated[int, typer.Option("--number", "-n", help="How many prompts.", min=1)] = 5,
    seed: Annotated[
        int | None, typer.Option(help="Sample prompts at random with this seed; default: the first ones.")
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="Only the prompt with this id.")] = None,
    round: Annotated[
        int | None, typer.Option("--round", help="Which round of a run, from 0; default: the newest.")
    ] = None,
    dropped: Annotated[bool, typer.Option("--dropped", help="Only what filters dropped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Show prompts with teacher's and student's responses, likelihoods, and why filters dropped some."""
    from stillhouse.errors import DataError
    from stillhouse.rollouts.offline.reading import PAIR_SOURCES, read_round, read_stage_files, select

    folders = [target for target in targets if target.is_dir()]
    asked = read_round(folders[0], round) if folders and len(targets) == 1 else read_stage_files(targets)
    if not asked:
        raise DataError(f"{', '.join(map(str, targets))}: no responses are there")
    if what == "pairs":
        asked = [one for one in asked if all(source in one.by_source for source in PAIR_SOURCES)]
        if not asked:
            raise DataError(
                f"{', '.join(map(str, targets))}: no prompt has both a teacher's and a student's response. "
                "Name the files of both, or: stillhouse show responses"
            )
    shown = select(asked, number=number, seed=seed, id=id, dropped=dropped)
    if as_json:
        for one in shown:
            typer.echo(console.json_text(one.as_json()))
        return
    terminal = console.output().is_terminal
    for one in shown:
        _print_table(one) if terminal else _print_lines(one)
    total = sum(bool(one.dropped) for one in asked)
    console.note(f"{len(shown)} of {len(asked)} {what} shown; {total} dropped")


def _print_lines(one: PromptResponses) -> None:
    """Plain lines, for a pipe."""
    console.say(one.id)
    parts = [("prompt", one.prompt)]
    for source, row in one.by_source.items():
        parts += [(source, row["response"]), ("", f"({_describe(row, one.gap.get(source))})")]
    parts += [("dropped", _reason(drop)) for drop in one.dropped]
    parts += [("resampled", _reason(drop)) for drop in one.resampled]
    for name, text in parts:
        for index, line in enumerate(text.split("\n") or [""]):
            console.say(f"  {name if index == 0 else '':<10} {line}".rstrip())
    console.say("")


def _print_table(one: PromptResponses) -> None:
    """A table with a column for each source, for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    visible = console.visible
    drawn = Table(
        title=Text(visible(f"{one.id}\n{one.prompt}"), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        expand=True,
        caption=Text(visible("\n".join(_filter_verdicts(one))), style="red" if one.dropped else "yellow"),
        caption_justify="left",
    )
    for source in one.by_source:
        drawn.add_column(Text(source), ratio=1, overflow="fold")
    drawn.add_row(*(Text(visible(row["response"])) for row in one.by_source.values()))
    drawn.add_row(
        *(
            Text(visible(_describe(row, one.gap.get(source))), style="dim")
            for source, row in one.by_source.items()
        )
    )
    console.output().print(drawn)


def _filter_verdicts(one: PromptResponses) -> Sequence[str]:
    return [
        *(f"dropped: {_reason(drop)}" for drop in one.dropped),
        *(f"resampled: {_reason(drop)}" for drop in one.resampled),
    ]


def _describe(row: dict[str, Any], gap: float | None) -> str:
    """Generator, length, mean log-probabilities."""
    facts = [f"by {row.get('by', 'unknown')}"]
    if row.get("student_version") is not None:
        facts.append(f"step {row['student_version']}")
    if row.get("token_ids"):
        facts.append(f"{len(row['token_ids'])} tokens" + ("" if row.get("finished", True) else ", cut"))
    facts += [f"log p {name} {value:.3f}" for name, value in row.get("scores", {}).items()]
    if gap is not None:
        facts.append(f"gap {gap:+.3f}")
    return ", ".join(facts)


def _reason(drop: dict[str, Any]) -> str:
    source = f"{drop['source']}: " if drop.get("source") else ""
    detail = f" ({drop['detail']})" if drop.get("detail") else ""
    return f"{source}{drop['filter']}: {drop['reason']}{detail}"
