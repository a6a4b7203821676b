"""stillhouse show: what was written, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse import console

if TYPE_CHECKING:
    from stillhouse.rollouts.offline.reading import PromptResponses


class What(StrEnum):
    """What there is to show."""

    pairs = "pairs"
    responses = "responses"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("show")(command)


def command(
    what: Annotated[
        What,
        typer.Argument(
            help="pairs: both sides of each prompt; responses: all that was written.", show_default=False
        ),
    ],
    targets: Annotated[
        list[Path],
        typer.Argument(help="A run folder, or stage files.", metavar="RUN|FILE...", show_default=False),
    ],
    number: Annotated[int, typer.Option("--number", "-n", help="How many prompts.", min=1)] = 5,
    seed: Annotated[int | None, typer.Option(help="Choose them at random; default: the first.")] = None,
    id: Annotated[str | None, typer.Option("--id", help="Only the prompt of this id.")] = None,
    round: Annotated[
        int | None, typer.Option("--round", help="Which round of a run, from 0; default: the newest.")
    ] = None,
    dropped: Annotated[bool, typer.Option("--dropped", help="Only what filters dropped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show prompts with the teacher's and the student's response side by side, likelihoods, and drops."""
    from stillhouse.errors import DataError
    from stillhouse.rollouts.offline.reading import PAIR_SOURCES, read_round, read_stage_files, select

    folders = [target for target in targets if target.is_dir()]
    asked = read_round(folders[0], round) if folders and len(targets) == 1 else read_stage_files(targets)
    if not asked:
        raise DataError(f"{', '.join(map(str, targets))}: no responses are there")
    if what is What.pairs:
        asked = [one for one in asked if all(source in one.by_source for source in PAIR_SOURCES)]
        if not asked:
            raise DataError(
                f"{', '.join(map(str, targets))}: no prompt has both a teacher's and a student's response. "
                "Name the files of both, or: stillhouse show responses"
            )
    shown = select(asked, number=number, seed=seed, id=id, dropped=dropped)
    if as_json:
        for one in shown:
            typer.echo(json.dumps(one.as_json(), ensure_ascii=False))
        return
    terminal = console.output().is_terminal
    for one in shown:
        _table(one) if terminal else _lines(one)
    lost = sum(bool(one.dropped) for one in asked)
    console.note(f"{len(shown)} of {len(asked)} {what.value} shown; {lost} dropped")


def _lines(one: PromptResponses) -> None:
    """As plain lines, for a pipe."""
    console.say(one.id)
    parts = [("prompt", one.prompt)]
    for source, row in one.by_source.items():
        parts += [(source, row["response"]), ("", f"({_about(row, one.gap.get(source))})")]
    parts += [("dropped", _why(drop)) for drop in one.dropped]
    parts += [("resampled", _why(drop)) for drop in one.resampled]
    for name, text in parts:
        for index, line in enumerate(text.split("\n") or [""]):
            console.say(f"  {name if index == 0 else '':<10} {line}".rstrip())
    console.say("")


def _table(one: PromptResponses) -> None:
    """As a table of one column for each side, for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    visible = console.visible
    drawn = Table(
        title=Text(visible(f"{one.id}\n{one.prompt}"), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        expand=True,
        caption=Text(visible("\n".join(_verdicts(one))), style="red" if one.dropped else "yellow"),
        caption_justify="left",
    )
    for source in one.by_source:
        drawn.add_column(Text(source), ratio=1, overflow="fold")
    drawn.add_row(*(Text(visible(row["response"])) for row in one.by_source.values()))
    drawn.add_row(
        *(
            Text(visible(_about(row, one.gap.get(source))), style="dim")
            for source, row in one.by_source.items()
        )
    )
    console.output().print(drawn)


def _verdicts(one: PromptResponses) -> Sequence[str]:
    return [
        *(f"dropped: {_why(drop)}" for drop in one.dropped),
        *(f"resampled: {_why(drop)}" for drop in one.resampled),
    ]


def _about(row: dict[str, Any], gap: float | None) -> str:
    """Who wrote it, how long it is, how likely it is."""
    facts = [f"by {row.get('by', 'unknown')}"]
    if row.get("student_version") is not None:
        facts.append(f"step {row['student_version']}")
    if row.get("token_ids"):
        facts.append(f"{len(row['token_ids'])} tokens" + ("" if row.get("finished", True) else ", cut"))
    facts += [f"log p {name} {value:.3f}" for name, value in row.get("scores", {}).items()]
    if gap is not None:
        facts.append(f"gap {gap:+.3f}")
    return ", ".join(facts)


def _why(drop: dict[str, Any]) -> str:
    source = f"{drop['source']}: " if drop.get("source") else ""
    detail = f" ({drop['detail']})" if drop.get("detail") else ""
    return f"{source}{drop['filter']}: {drop['reason']}{detail}"
