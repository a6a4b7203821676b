"""The page: one HTML file that needs no network, opens anywhere and treats all model text as untrusted."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stillhouse import console, files
from stillhouse.report import answers, curation, curves, diversity, results, sections, work
from stillhouse.report.measures import MEASURES
from stillhouse.report.record import RunRecord, find_runs, load_run
from stillhouse.report.systems import gather, run_colour


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
        finalize=_visible,
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
        standard_errors=results.standard_errors(tables),
        overview=results.overview(systems),
        named_task=bool(tables and tables[0].task and tables[0].task not in MEASURES),
        glossary=results.glossary(tables),
        cards=[sections.run_card(index, run) for index, run in enumerate(runs)],
        run_legend=[(run.name, run_colour(index)) for index, run in enumerate(runs)],
        main_plots=curves.main_plots(runs),
        schedule_plots=curves.schedule_plots(runs),
        source_plots=curves.source_plots(runs),
        further_plots=curves.further_plots(runs),
        buffer_plots=curves.buffer_plots(runs),
        source_bars=work.source_bars(runs),
        time_bars=work.time_bars(runs),
        phase_tables=work.phase_tables(runs),
        diversity_plots=diversity.diversity_plots(systems),
        draft_plots=diversity.draft_plots(systems),
        data_tables=curation.data_tables(runs),
        curated=curation.curated_runs(runs),
        answers=answers.shown_answers(systems),
        config_diff=sections.config_diff(runs),
        not_set=sections.NOT_SET,
        configs=sections.config_tables(runs),
        environments=sections.environments(runs),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _visible(value: object) -> object:
    """Every text that goes into the page, with control characters shown; finished markup stays as it is."""
    return console.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return (resources.files("stillhouse.report") / "templates" / name).read_text(encoding="utf-8")
