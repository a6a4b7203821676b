"""What the stages of a chain have come to, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.console import Table, TableCell, TableColumn, duration
from stillhouse.console.format import MISSING, byte_size, is_number
from stillhouse.report.metrics import MetricInfo, main_metric
from stillhouse.report.record import CHAIN_FILE, RunRecord, load_run, read_chain, status_of
from stillhouse.report.systems import role_of


def stage_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """A table for each chain among the runs: its stages in order, and what each has gained or lost."""
    by_chain: dict[Path, list[RunRecord]] = {}
    for run in runs:
        if (run.folder.parent / CHAIN_FILE).is_file():
            by_chain.setdefault(run.folder.parent, []).append(run)
    return [_stages(folder, read_chain(folder), own) for folder, own in by_chain.items()]


def _stages(folder: Path, chain: Mapping[str, Any], runs: Sequence[RunRecord]) -> Table:
    stages = chain["stages"]
    records = {run.folder.name: run for run in runs}
    for name in (str(one.get("name")) for one in stages):
        if name not in records and (folder / name).is_dir():
            records[name] = load_run(folder / name, rows="none")
    main = main_metric(metrics for run in runs if (metrics := _after(run)))
    rows: list[list[TableCell]] = []
    for stage in stages:
        name = str(stage.get("name"))
        after = [str(one) for one in stage.get("after") or ()]
        starts = [one for one in after if not rows_of(records.get(one))]  # the others are data
        run, source = records.get(name), records.get(starts[-1]) if starts else None
        size, before = _bytes(folder / name), _bytes(folder / starts[-1]) if starts else None
        texts = [str(stage.get("what") or ""), ", ".join(after), "not begun" if run is None else run.status]
        cells = [TableCell(text, text) for text in (name, *texts)]
        if main is not None:
            cells.append(_quality(main, run, source))
        ratio = f" ({size / before:.2f}×)" if size and before else ""
        left = f"{byte_size(size)}{ratio}" if size else rows_text(rows_of(run)).partition(";")[0] or MISSING
        cells.append(TableCell(size, left))
        took = None if run is None else run.state.get("seconds")
        cells.append(TableCell(took, duration(took, tenths=True)))
        rows.append(cells)
    headings = ["Stage", "Does", "From", "State", *([main.label] if main else []), "Leaves", "Took"]
    return Table([TableColumn(heading) for heading in headings], rows, str(chain.get("name") or folder.name))


def chain_line(folder: Path) -> str:
    """How a chain stands, in a line; why it ended before its last stage, and how it goes on."""
    state, message = status_of(read_chain(folder))
    name = str(read_chain(folder).get("name") or folder.name)
    told = f"{folder}: the chain {name} is {state}"
    return f"{told}: {message.splitlines()[0]}" if message and state != "done" else told


def rows_text(found: Mapping[str, Any]) -> str:
    """What a stage that makes data has left, in words.

    Example: `rows_text({"rows": 39, "prompts": 48, "dropped": {"teacher, truncated: cut": 9}})` is
    "39 rows of 48; dropped: 9 x teacher, truncated: cut"
    """
    if not found:
        return ""
    told = f"{found['rows']:,} rows" + (f" of {found['prompts']:,}" if "prompts" in found else "")
    for name in ("tokens", "cut"):
        told += f", {found[name]:,} {name}" if found.get(name) else ""
    if is_number(found.get("mean margin")):
        told += f", mean margin {found['mean margin']:.4g}"
    for name in ("dropped", "left out"):
        if found.get(name):
            told += f"; {name}: " + ", ".join(f"{count:,} x {why}" for why, count in found[name].items())
    return told


def rows_of(run: RunRecord | None) -> Mapping[str, Any]:
    """What a stage that makes data has counted; empty for any other."""
    found = run.state.get("rows") if run else None
    return found if isinstance(found, Mapping) else {}


def _after(run: RunRecord | None) -> dict[str, Any]:
    """The first evaluation of a finished student; empty if there is none."""
    found = (one.metrics for one in (run.evaluations if run else ()) if role_of(one.system) == "after")
    return next(found, {})


def _quality(main: MetricInfo, run: RunRecord | None, source: RunRecord | None) -> TableCell:
    value, before = _after(run).get(main.name), _after(source).get(main.name)
    if not is_number(value):
        return TableCell(None, MISSING)
    change = f" ({main.change(value, before)})" if is_number(before) else ""
    return TableCell(value, f"{main.show(value)}{change}")


def _bytes(stage: Path) -> int | None:
    """What a stage has left, in bytes; None if it has left nothing yet."""
    return sum(path.stat().st_size for path in (stage / "student").rglob("*") if path.is_file()) or None
