"""The quickstart as a measurement: quality of every system, and how long the whole takes.

python benchmarks/quickstart.py            # the real thing; writes benchmarks/results/quickstart.json
python benchmarks/quickstart.py --small    # a few steps of each stage, writes nothing
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from _result import result, save

RESULT = Path(__file__).parent / "results" / "quickstart.json"
METRICS = ("rouge_l", "kl_to_teacher")
SHOWN = ("prompts", *(f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")), "parameters")


def main() -> None:
    """Run it and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few steps, no result file")
    small = parser.parse_args().small

    from stillhouse.commands.quickstart import quickstart
    from stillhouse.report import load_runs, summary_table

    folder = Path(tempfile.mkdtemp()) / "quickstart"
    start = time.perf_counter()
    quickstart(
        folder, {"train.max_steps": 6, "evaluate.limit": 8, "data.train.limit": 128} if small else None
    )
    seconds = time.perf_counter() - start
    table = summary_table(load_runs([folder / "kd", folder / "distillm2"]))
    rows = [{"system": row["system"], **{name: row.get(name) for name in SHOWN}} for row in table.records()]
    found = result(rows, seconds=round(seconds, 1))
    print(json.dumps(found, indent=2))
    save(None if small else RESULT, found)


if __name__ == "__main__":
    main()
