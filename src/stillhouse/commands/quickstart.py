"""stillhouse quickstart: a real teacher and real data, embedded; KD against DistiLLM-2.

The usual situation: 200 rows have a response, 3,101 have only a prompt, and there is a good teacher. Every
student starts from the same short supervised warm start, as the students of the papers do.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse import console, locks, signals
from stillhouse.commands.app import START, app
from stillhouse.errors import ConfigError, Fault

STAGES = {"warm-start": "warm-start", "kd": "KD", "distillm2": "DistiLLM-2"}
"""Folder of each stage -> name of the run in the chain."""
CHAIN = "package:stillhouse/demo/quickstart.yaml"


@app.command("quickstart", rich_help_panel=START)
def command(
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/quickstart"),
) -> None:
    """Distil a student from the embedded teacher with KD and with DistiLLM-2. Takes about 3 minutes."""
    quickstart(folder)


def quickstart(folder: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Run the three stages, print the comparison and write one page about the two methods.

    Args:
        folder: where the runs go; an earlier quickstart there is replaced.
        overrides: values for every stage, such as {"train.max_steps": 4}.

    Returns:
        The page.

    Raises:
        ConfigError: the folder contains something other than a quickstart.
    """
    from stillhouse.files import check_writable

    check_writable("--folder", folder)
    with locks.only_one_in(folder, "--folder"):
        _clear(folder)
    return _run(folder, overrides or {})


def _run(folder: Path, overrides: Mapping[str, Any]) -> Path:
    import torch

    from stillhouse.files import locate
    from stillhouse.report import load_runs, print_comparison, write_report
    from stillhouse.runs.chains.execute import run_chain
    from stillhouse.runs.chains.resolve import resolve_chain

    torch.set_num_threads(1)  # models this small gain little from more, and lose much on a busy machine
    start = time.perf_counter()
    values = {"output.folder": str(folder), "output.report": False, **overrides}
    result = run_chain(resolve_chain(locate(CHAIN), values))
    if result.signal is not None:
        raise signals.Stopped(result.signal)
    methods = [folder / stage for stage in ("kd", "distillm2")]
    page = write_report(methods, folder / "report.html", "Quickstart: KD and DistiLLM-2 on E2E NLG")
    print_comparison(load_runs(methods))
    console.say(f"Took {console.duration(time.perf_counter() - start)}. Open {page}")
    return page


def _clear(folder: Path) -> None:
    """Delete an earlier quickstart, and nothing else."""
    from stillhouse.runs.folder import RunFolder

    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    foreign = [path.name for path in inside if not _is_quickstart(path)]
    if foreign:
        problem = f"{folder} contains files of no quickstart ({', '.join(foreign[:3])})"
        raise ConfigError(Fault("--folder", problem, hint="Choose an empty or new folder."))
    for stage in STAGES:
        if (process := RunFolder(folder / stage).running()) is not None:
            raise ConfigError(Fault("--folder", f"process {process} is still running in {folder / stage}"))
    for path in inside:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != locks.FILE:
            path.unlink()


def _is_quickstart(path: Path) -> bool:
    """Whether this is the page, or a stage: its folder and its name differ from those of a user's run."""
    if path.name not in STAGES:
        return path.name in ("report.html", "chain.json", "fingerprints.json", locks.FILE)
    try:
        name = json.loads((path / "state.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(name == STAGES[path.name])
