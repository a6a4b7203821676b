"""The embedded demonstration: a real teacher, real data, few labels and many prompts; KD against DistiLLM-2.

The situation that people are in: 200 rows have a response, 3,101 have a prompt, and there is a good teacher.
Every student starts from the same short supervised warm start, as the papers' students do.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.errors import ConfigError, Fault

STAGES = ("warm-start", "kd", "distillm2")


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
    from stillhouse.report import write_report
    from stillhouse.runner.execute import execute
    from stillhouse.runner.resolve import resolve
    from stillhouse.runner.tables import show_systems

    _clear(folder)
    start = time.perf_counter()
    demo = Path(__file__).parent / "demo"
    for number, stage in enumerate(STAGES, start=1):
        console.note(f"{number} of {len(STAGES)}: {stage}")
        overrides = {"output.folder": str(folder / stage), "output.report": False, **(more or {})}
        if stage != "warm-start":
            overrides["student.path"] = str(folder / "warm-start" / "student")
        execute(resolve(demo / f"{stage}.yaml", overrides))
    compared = [folder / stage for stage in STAGES[1:]]
    page = write_report(compared, folder / "report.html", "Quickstart: KD and DistiLLM-2 on E2E NLG")
    show_systems(compared, "Held-out prompts of E2E NLG, greedy")
    console.say(f"Took {console.duration(time.perf_counter() - start)}. Open {page}")
    return page


def _clear(folder: Path) -> None:
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if inside - {*STAGES, "report.html"}:
        strange = ", ".join(sorted(inside - {*STAGES, "report.html"})[:3])
        raise ConfigError(
            Fault(
                "--folder", f"{folder} holds other files ({strange})", hint="Choose an empty or new folder."
            )
        )
    shutil.rmtree(folder, ignore_errors=True)
