"""stillhouse show: rows as the models read them; responses and why they were kept or dropped; a chain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import RESPONSES, app
from stillhouse.urls import path_at

if TYPE_CHECKING:
    from rich.text import Text

    from stillhouse.rollouts.offline.reading import PromptResponses
    from stillhouse.runs.row_views import RowView, TextPiece


WORDS = ("rows", "pairs", "responses", "stages")
What = Annotated[
    str,
    typer.Argument(
        metavar="|".join(WORDS),
        help="rows: a run's data as the models read it; pairs: prompts with both responses; "
        "responses: all; stages: what each stage of a chain has come to, as the chain's folder "
        "alone shows too.",
        show_default=False,
    ),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", help="For rows: write them to this page, with their images.", show_default=False),
]
Targets = Annotated[
    list[Path] | None,
    typer.Argument(
        parser=path_at,
        help="A run folder, or files of `generate` or `curate`; for rows also a run's YAML file, with values "
        "that override it; for stages a chain's folder.",
        metavar="RUN|FILE...",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", "--number", "-n", min=1, help="How many; default: 5, of rows with --json all."),
]


@app.command("show", rich_help_panel=RESPONSES)
def show(
    what: What,
    targets: Targets = None,
    number: Limit = None,
    seed: Annotated[
        int | None, typer.Option(help="Sample prompts at random with this seed; default: the first ones.")
    ] = None,
    id: Annotated[
        str | None, typer.Option("--row", "--id", help="Only the row or prompt with this id.")
    ] = None,
    round: Annotated[
        int | None, typer.Option("--round", help="Which round of a run, from 0; default: the newest.")
    ] = None,
    dropped: Annotated[bool, typer.Option("--dropped", help="Only what was dropped.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="For rows: the token ids too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    html: Html = None,
) -> None:
    """Show rows as the models read them, or prompts with responses, likelihoods and why some are dropped."""
    what, targets = _what_and_targets(what, targets or [])
    if what == "stages":
        _refuse_options(number=number, seed=seed, row=id, round=round, dropped=dropped or None)
        _refuse_options(ids=ids or None, json=as_json or None, html=html)
        _show_stages(targets)
        return
    _refuse_chains(what, targets)
    if what == "rows":
        _refuse_options(seed=seed, round=round)
        _show_rows(targets, number or (None if as_json else 5), id, dropped, ids, as_json, html)
        return
    _refuse_options(ids=ids or None, html=html)
    from stillhouse.errors import DataError
    from stillhouse.rollouts.offline.reading import PAIR_SOURCES, read_round, read_stage_files, select

    targets = [file for target in targets for file in _files_of(target)]
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
    shown = select(asked, number=number or 5, seed=seed, id=id, dropped=dropped)
    if as_json:
        for one in shown:
            typer.echo(console.json_text(one.as_json()))
        return
    terminal = console.output().is_terminal
    for one in shown:
        _print_table(one) if terminal else _print_lines(one)
    total = sum(bool(one.dropped) for one in asked)
    console.note(f"{len(shown)} of {len(asked)} {what} shown; {total} dropped")


def _what_and_targets(what: str, targets: list[Path]) -> tuple[str, list[Path]]:
    """What is to be shown of which targets; the folder of a chain alone stands for its stages."""
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.files import ROWS_FILE
    from stillhouse.report.record import CHAIN_FILE

    if what not in WORDS and (Path(what) / CHAIN_FILE).is_file():
        return "stages", [Path(what), *targets]
    if what not in WORDS:
        word = "responses" if (Path(what) / ROWS_FILE).is_file() else "rows"
        hint = f"Such as: stillhouse show {word} {what}" if Path(what).exists() else None
        raise ConfigError(Fault("show", "does not know what to show", what, ", ".join(WORDS), hint=hint))
    if not targets:
        raise ConfigError(Fault(f"show {what}", "needs a run's folder, or files, to show them of"))
    return what, targets


def _show_stages(targets: Sequence[Path]) -> None:
    """Print the stages of chains, what those that make data have left out, and how each chain stands."""
    from stillhouse.errors import DataError
    from stillhouse.report import load_runs
    from stillhouse.report.chains import chain_line, rows_of, rows_text, stage_tables
    from stillhouse.report.record import CHAIN_FILE

    for folder in targets:
        if not (folder / CHAIN_FILE).is_file():
            raise DataError(f"{folder}: is not the folder of a chain, as a file with `stages:` leaves it.")
        runs = load_runs([folder])
        for table in stage_tables(runs):
            table.print()
        for run in runs:
            if ";" in (told := rows_text(rows_of(run))):
                console.say(f"{run.folder}: {told}")
        console.note(chain_line(folder))


def _refuse_chains(what: str, targets: Sequence[Path]) -> None:
    """Send who asks a chain for rows or responses to its stages."""
    from stillhouse.errors import DataError
    from stillhouse.report.record import CHAIN_FILE, find_runs

    for folder in targets:
        if (folder / CHAIN_FILE).is_file():
            named = ", ".join(str(run) for run in find_runs([folder]))
            raise DataError(
                f"{folder}: is a chain of runs. What its stages have come to: stillhouse show stages "
                f"{folder}; or name one of them with stillhouse show {what}: {named}"
            )


def _files_of(target: Path) -> list[Path]:
    """Of a stage that made data its file, with what it has dropped; any other target is as it is."""
    from stillhouse.files import ROWS_FILE
    from stillhouse.rollouts.offline.filtered_rows import dropped_path

    rows = target / ROWS_FILE
    if not rows.is_file():
        return [target]
    dropped = dropped_path(rows)
    return [rows, *([dropped] if dropped.is_file() else [])]


def _refuse_options(**given: Any) -> None:
    """Refuse options that have no effect on what is shown."""
    from stillhouse.errors import ConfigError, Fault

    faults = [
        Fault(f"--{name}", "has no effect on what is shown here")
        for name, value in given.items()
        if value is not None
    ]
    if faults:
        raise ConfigError(*faults)


def _show_rows(
    targets: Sequence[Path],
    limit: int | None,
    id: str | None,
    dropped: bool,
    ids: bool,
    as_json: bool,
    html: Path | None,
) -> None:
    """Print the rows of a run as its student and teacher read them."""
    from itertools import islice

    from stillhouse.errors import DataError
    from stillhouse.files import ROWS_FILE
    from stillhouse.runs.resolve import resolve
    from stillhouse.runs.row_page import write_row_page
    from stillhouse.runs.row_views import row_views

    file, *overrides = targets
    if (file / ROWS_FILE).is_file():
        raise DataError(
            f"{file}: is a stage that made data, and no run. What it wrote: stillhouse show responses "
            f"{file}; what a run makes of it: stillhouse show rows with the run that trains on it."
        )
    config = resolve(file / "resolved.yaml" if file.is_dir() else file, list(map(str, overrides))).config
    wanted = f"train:{id}" if id is not None and id.isdecimal() else id
    views = row_views(config, "valid" if (wanted or "").startswith("valid:") else "train")
    chosen = (one for one in views if wanted in (None, one.id) and (one.dropped or not dropped))
    shown = 0
    views_on_page = []
    for view in islice(chosen, limit):
        shown += 1
        if html is not None:
            views_on_page.append(view)
        elif as_json:
            typer.echo(console.json_text(view.as_json()))
        else:
            _print_row(view, ids)
    if html is not None:
        write_row_page(html, views_on_page)
        console.note(f"{len(views_on_page)} rows: {html}")
    if wanted is not None and not shown:
        raise DataError(f"--row {id}: no row has this id; ids are train:1, valid:1 and so on")


def _print_row(view: RowView, ids: bool) -> None:
    """A row: what is trained on in green, control tokens reversed, and without colours in brackets."""
    from rich.text import Text

    output = console.output()
    format = f"  {view.format}" if view.format else ""
    output.print(Text.assemble((console.visible(view.id), "bold"), (format, "dim")), soft_wrap=True)
    if view.dropped is not None:
        _print_text("dropped", Text(console.visible(view.dropped), "red"))
    if view.prompt:
        _print_text("prompt", _coloured(view.prompt_pieces, "", ""), view.prompt_ids if ids else ())
    if view.teacher_prompt is not None and view.teacher_prompt != view.prompt:
        _print_text("teacher", Text(console.visible(view.teacher_prompt), "magenta"))
    for image in view.images:
        told = f"{image.width} x {image.height}  {image.location}"
        _print_text("image", Text(console.visible(told), "dim"))
    if view.response is not None:
        known = view.response_ids or ()
        name = "response" if view.rejected is None else "chosen"
        _print_text(name, _coloured(view.response_pieces, "green", "dim"), known if ids else ())
    if view.rejected is not None:
        known = view.rejected_ids or ()
        _print_text("rejected", _coloured(view.rejected_pieces, "green", "dim"), known if ids else ())
    output.print("")


def _coloured(pieces: Sequence[TextPiece], trained: str, other: str) -> Text:
    """Pieces of a prompt or response; without colours, text that a response is not trained on in brackets."""
    from rich.text import Text

    plain = console.output().color_system is None
    text = Text()
    for piece in pieces:
        style = f"{trained if piece.trained else other} {'reverse' if piece.control else ''}".strip()
        shown = console.visible(piece.text)
        text.append(f"⟦{shown}⟧" if plain and other and not piece.trained else shown, style)
    return text


def _print_text(name: str, text: Text, ids: Sequence[int] = ()) -> None:
    """Text under a name in the margin, and token ids below it."""
    from rich.text import Text

    output = console.output()
    for index, line in enumerate(text.split("\n", allow_blank=True)):
        margin = f"  {name if index == 0 else '':<10}"
        output.print(Text.assemble((margin, "cyan"), line), soft_wrap=True)
    if ids:
        output.print(Text(f"  {'ids':<10}{' '.join(map(str, ids))}", style="dim"), soft_wrap=True)


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
