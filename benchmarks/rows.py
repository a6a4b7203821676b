"""What the commands hold in memory of millions of rows: reading, curating and joining, by peak memory.

Each measurement is a process of its own. A row is a question of some 50 characters with an answer of 80.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stillhouse.core.versions import installed_version
from stillhouse.files import STAGE, write_json
from stillhouse.rollouts.offline.stage_files import stage_header
from stillhouse.runs.measured_steps import peak_of_process

ROWS, SMALL_ROWS = 2_000_000, 20_000
LARGE = 40 * 2**20
"""Bytes of the one large row."""
RESULTS = Path(__file__).parent / "results" / "rows.json"


def write_rows(path: Path, count: int, large: int = 0) -> None:
    """A stage file of so many short rows, and one whose response has so many bytes."""
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(json.dumps({STAGE: stage_header("responses", seed=1)}) + "\n")
        for number in range(count):
            handle.write(json.dumps(_row(number, f"The answer is {number}, as all of them say. " * 2)) + "\n")
        if large:
            handle.write(json.dumps(_row(count, "many words " * (large // 11))) + "\n")


def _row(number: int, response: str) -> dict[str, Any]:
    tokens = [number % 1000 + place for place in range(16)]
    asked = {"prompt": f"What comes after {number} in the long list of numbers?", "response": response}
    facts = {"source": "teacher", "by": "teacher", "finished": True}
    ids = {"prompt_ids": tokens, "token_ids": tokens}
    return {"number": number, "id": f"train:{number + 1}", **facts, **asked, **ids}


def load(path: Path) -> None:
    """What `stillhouse run` and `generate` hold: the tokenised prompts."""
    from stillhouse.data import DataConfig, load_data
    from stillhouse.files import locate
    from stillhouse.models import TeacherModel, load_tokenizer

    tokenizer = load_tokenizer(TeacherModel(path=str(locate("package:stillhouse/demo/teacher"))))
    options = {"template": "plain", "max_prompt": 128, "max_response": 64}
    load_data(DataConfig.model_validate({"train": str(path), **options}), tokenizer)


def curate(path: Path) -> None:
    """`stillhouse curate` with a filter of single responses and one that compares them."""
    from stillhouse.rollouts.offline.filter_files import filter_files
    from stillhouse.rollouts.offline.filters import REGISTRY

    filters = [REGISTRY.parse("empty"), REGISTRY.parse("duplicates")]
    filter_files([path], filters, path.with_name("kept.jsonl"))


WORK = {"load": load, "curate": curate}


def measured(work: str, path: Path, count: int, large: int) -> dict[str, Any]:
    """Peak memory of a process that does the work on a file."""
    command = [sys.executable, __file__, "--work", work, "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"exit": done.returncode}
    megabytes = round(path.stat().st_size / 1e6, 1)
    return {"work": work, "rows": count, "large_row_bytes": large, "file_mb": megabytes, **found}


def work(name: str, path: Path) -> None:
    """Do it, and print the peak before and at the end in MB, and the seconds of processor time."""
    import stillhouse.data
    import stillhouse.models
    import stillhouse.rollouts.offline.filter_files  # noqa: F401 - what is imported is no row

    before = peak_of_process() / 2**20
    WORK[name](path)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime
    found = {"imports_mb": before, "peak_mb": peak_of_process() / 2**20, "cpu_seconds": seconds}
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


def main() -> None:
    """Measure all, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", choices=WORK)
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.file)
        return
    count = options.rows or (SMALL_ROWS if options.small else ROWS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in WORK:
            for many, large in ((count // 10, 0), (count, 0), (1000, LARGE)):
                path = Path(folder) / f"{name}-{many}-{large}" / "rows.jsonl"
                path.parent.mkdir()
                write_rows(path, many, large)
                rows.append(measured(name, path, many + bool(large), large))
                print(rows[-1], flush=True)
                for one in path.parent.iterdir():
                    one.unlink()
    write_json(
        options.output,
        {
            "command": "python benchmarks/rows.py" + (" --small" if options.small else ""),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: installed_version(name) for name in ("stillhouse", "torch", "datasets")},
            "threads": 1,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
