"""The page: one HTML file that needs no network, opens anywhere and treats all model text as untrusted."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stillhouse import files
from stillhouse.report import curves, results, sections
from stillhouse.report.measures import MEASURES, duration
from stillhouse.report.record import RunRecord, find_runs, load_run
from stillhouse.report.systems import System, gather, run_colour


def write_report(folders: Sequence[Path], output: Path, title: str | None = None) -> Path:
    """Write the report of one run, or of several side by side, as a single self-contained HTML file.

    Args:
        folders: run folders, or folders that hold some.
        output: the file to write, such as `runs/kd/report.html`.
        title: the heading; by default the run's name, or how many runs there are.

    Returns:
        `output`.

    Raises:
        DataError: a folder does not exist or holds no run.
        EnvironmentFault: the file cannot be written.
    """
    runs = [load_run(folder) for folder in find_runs(folders)]
    html = render(runs, title)
    with files.atomic(output, "wb") as handle:
        # Text from a model may hold half of a surrogate pair, which UTF-8 does not know.
        handle.write(html.encode("utf-8", errors="replace"))
    return output


def render(runs: Sequence[RunRecord], title: str | None = None) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("stillhouse.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    systems = gather(runs)
    tables = results.result_tables(systems)
    script = _asset("page.js")
    return environment.get_template("page.html.j2").render(
        title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"),
        runs=runs,
        single=len(runs) == 1,
        headline=results.headline(systems, tables),
        subtitle=sections.subtitle(runs),
        tables=tables,
        named_task=bool(tables and tables[0].task and tables[0].task not in MEASURES),
        glossary=results.glossary(tables),
        cards=[sections.run_card(index, run) for index, run in enumerate(runs)],
        run_legend=[(run.name, run_colour(index)) for index, run in enumerate(runs)],
        main_plots=curves.main_plots(runs),
        schedule_plots=curves.schedule_plots(runs),
        source_plots=curves.source_plots(runs),
        further_plots=curves.further_plots(runs),
        source_bars=curves.source_bars(runs),
        time_bars=curves.time_bars(runs, duration),
        data_tables=sections.data_tables(runs),
        answers=answers_json(systems),
        answer_count=sum(len(system.rows) for system in systems),
        config_diff=sections.config_diff(runs),
        configs=sections.config_tables(runs),
        environments=sections.environments(runs),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def answers_json(systems: Sequence[System]) -> Markup:
    """The responses of all systems, joined by task and prompt, as JSON that may stand in a script element.

    `<`, `>` and `&` are written as escapes, so no text can close the element or open a comment; everything
    that is not ASCII is escaped by `json.dumps`. The page puts the text in as text, never as markup.
    """
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    for index, system in enumerate(systems):
        for number, row in enumerate(system.rows):
            key = (system.task, str(row.get("id", number)))
            references = row.get("references")
            entry = prompts.setdefault(
                key,
                {
                    "id": key[1],
                    "task": key[0],
                    "prompt": str(row.get("prompt", "")),
                    "references": [str(text) for text in references] if isinstance(references, list) else [],
                    "responses": {},
                },
            )
            # One answer a prompt: with several seeds the first; all of them are in the run folder.
            if index in entry["responses"]:
                continue
            entry["responses"][index] = [
                str(row.get("response", "")),
                _finite(row.get("rouge_l")),
                row.get("finished"),
                _finite(row.get("tokens")),
            ]
    named = [
        {"label": system.label, "role": system.role, "colour": system.colour, "task": system.task}
        for system in systems
    ]
    text = json.dumps({"systems": named, "rows": list(prompts.values())}, separators=(",", ":"), default=str)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return round(float(value), 2) if number else None


def _asset(name: str) -> str:
    return (resources.files("stillhouse.report") / "templates" / name).read_text(encoding="utf-8")
