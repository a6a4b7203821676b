"""How often Stillhouse loses, doubles or believes something: kills, starts together, junk, lies, bad code.

Each part has numbered trials, random by their number, so that a failure can be repeated alone. What is done
is kept in a journal, and the same command goes on where it was stopped.

    python benchmarks/reliability.py --folder /tmp/reliability --output benchmarks/results/reliability.json
    python benchmarks/reliability.py --small
    python benchmarks/reliability.py --only kills --first 17 --trials 1
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from _reliability_trials import PARTS, Trial  # noqa: E402
from _result import result, save  # noqa: E402

from stillhouse.files import append_jsonl, read_jsonl_leniently  # noqa: E402

TRIALS = {"kills": 320, "starts": 40, "fuzz": 2000, "lies": 1000, "programs": 120}
SMALL = {"kills": 3, "starts": 1, "fuzz": 60, "lies": 40, "programs": 2}
TOLD = {
    "kills": "runs of every recipe, other commands: killed (SIGKILL, SIGTERM) at random file events, resumed",
    "starts": "two or three processes that start one run at the same moment",
    "fuzz": "configurations and files of rows with junk in them",
    "lies": "answers of a server with junk in them",
    "programs": "hostile programs in the sandbox",
}
RIGHT = {
    "kills": "weights, optimiser, log and answers equal those of a run that nothing interrupted, bit for bit",
    "starts": "one goes on, the others exit with 2 and change nothing",
    "fuzz": "used, or refused in words",
    "lies": "used within what was asked, or refused in words",
    "programs": "none passes, each is ended",
}


def done(journal: Path) -> dict[tuple[str, int], Trial]:
    """The trials of a journal by part and number."""
    rows, _ = read_jsonl_leniently(journal)
    return {(row["part"], row["number"]): row for row in rows}


def attempt(folder: Path, counts: dict[str, int], first: int) -> dict[tuple[str, int], Trial]:
    """All trials that the journal of the folder does not have yet; the journal."""
    journal = folder / "journal.jsonl"
    known = done(journal)
    for part, count in counts.items():
        left = [number for number in range(first, first + count) if (part, number) not in known]
        if not left:
            continue
        with contextlib.closing(PARTS[part](folder)) as made:
            for number in left:
                began = time.perf_counter()
                row = {"part": part, "number": number, **made.trial(number)}
                row["seconds"] = round(time.perf_counter() - began, 2)
                append_jsonl(journal, row)
                known[part, number] = row
                if row["failure"]:
                    print(f"{part} {number} ({row['what']}): {row['failure']}", flush=True)
    return known


def summary(found: dict[tuple[str, int], Trial], counts: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each part."""
    rows = []
    for part in counts:
        trials = [row for (name, _), row in found.items() if name == part]
        row = {
            "part": part,
            "tried": TOLD[part],
            "right": RIGHT[part],
            "trials": len(trials),
            "failures": sum(row["failure"] is not None for row in trials),
            "of": dict(sorted(Counter(row["what"] for row in trials).items())),
        }
        if part == "kills":
            row["kills"] = sum(trial["kills"] for trial in trials)
        rows.append(row)
    return rows


def main() -> int:
    """Try, print, write; exit code 1 where something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a few of each, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where runs and journal are kept, to go on later")
    parser.add_argument("--only", choices=list(PARTS), help="one part")
    parser.add_argument("--trials", type=int, help="so many of each part")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--output", type=Path, help="the result, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    counts = SMALL if options.small else TRIALS
    counts = {part: options.trials or count for part, count in counts.items() if options.only in (None, part)}
    with tempfile.TemporaryDirectory() as passing:
        rows = summary(attempt(options.folder or Path(passing), counts, options.first), counts)
    for row in rows:
        kills = f" ({row['kills']} kills)" if "kills" in row else ""
        print(f"{row['part']}: {row['failures']} failures in {row['trials']} trials{kills}")
    save(
        options.output,
        result(rows, command="python benchmarks/reliability.py", platform=platform.system()),
    )
    return int(any(row["failures"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
