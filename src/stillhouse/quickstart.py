"""The embedded demonstration: a real teacher, real data, few labels and many prompts; KD against DistiLLM-2.

The situation that people are in: 200 rows have a response, 3,101 have a prompt, and there is a good teacher.
Every student starts from the same short supervised warm start, as the papers' students do.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.errors import ConfigError, Fault

STAGES = {"warm-start": "warm-start", "kd": "KD", "distillm2": "DistiLLM-2"}
"""The folder of each stage, and the name that its YAML file gives the run."""


def quickstart(folder: Path, more: Mapping[str, Any] | None = None) -> Path:
    """Run the three stages, print the comparison and write one page for all of them.

    Args:
        folder: where the runs go; what an earlier quickstart left there is replaced.
        more: values that lie over those of every stage, such as {"train.max_steps": 4}.

    Returns:
        The page.

    Raises:
        ConfigError: the folder holds something that is not a quickstart.
    """
    import torch

    from stillhouse.report import load_runs, print_comparison, write_report
    from stillhouse.runs.execute import execute
    from stillhouse.runs.resolve import resolve

    torch.set_num_threads(1)  # models this small gain little from more, and lose much on a busy machine
    _clear(folder)
    start = time.perf_counter()
    demo = Path(__file__).parent / "demo"
    for number, stage in enumerate(STAGES, start=1):
        console.note(f"{number} of {len(STAGES)}: {stage}")
        overrides = {"output.folder": str(folder / stage), "output.report": False, **(more or {})}
        if stage != "warm-start":
            overrides["student.path"] = str(folder / "warm-start" / "student")
        execute(resolve(demo / f"{stage}.yaml", overrides))
    compared = [folder / stage for stage in ("kd", "distillm2")]
    page = write_report(compared, folder / "report.html", "Quickstart: KD and DistiLLM-2 on E2E NLG")
    print_comparison(load_runs(compared))
    console.say(f"Took {console.duration(time.perf_counter() - start)}. Open {page}")
    return page


def _clear(folder: Path) -> None:
    """Delete what an earlier quickstart left, and nothing else."""
    from stillhouse.runs.folder import RunFolder, check_writable

    check_writable("--folder", folder)
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    strange = [path.name for path in inside if not _ours(path)]
    if strange:
        problem = f"{folder} holds something that is no quickstart's ({', '.join(strange[:3])})"
        raise ConfigError(Fault("--folder", problem, hint="Choose an empty or new folder."))
    for stage in STAGES:
        if (process := RunFolder(folder / stage).running()) is not None:
            raise ConfigError(Fault("--folder", f"process {process} is still at work in {folder / stage}"))
    shutil.rmtree(folder, ignore_errors=True)


def _ours(path: Path) -> bool:
    """Whether the page, or the run of a stage: its folder and its name differ from those of a user's run."""
    if path.name not in STAGES:
        return path.name == "report.html"
    try:
        name = json.loads((path / "state.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(name == STAGES[path.name])
