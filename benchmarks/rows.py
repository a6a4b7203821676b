"""What millions of rows take: tokenising, reading tokens from the cache, curating; memory and time.

Each measurement is a process of its own. A row is a question of some 50 characters with an answer of 80.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _result import result, save

from stillhouse.files import STAGE
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


def load(path: Path, workers: int) -> None:
    """The prompts of `stillhouse run` and `generate`: tokenised, or read from the cache beside the file."""
    from stillhouse.data import DataConfig, load_data
    from stillhouse.files import locate
    from stillhouse.models import TeacherModel, load_tokenizer

    tokenizer = load_tokenizer(TeacherModel(path=str(locate("package:stillhouse/demo/teacher"))))
    options = {"template": "plain", "max_prompt": 128, "max_response": 64, "workers": workers}
    cache = str(path.with_name("cache"))
    load_data(DataConfig.model_validate({"train": str(path), "token_cache": cache, **options}), tokenizer)


def curate(path: Path, workers: int) -> None:
    """`stillhouse curate` with a filter of single responses and one that compares them; one process."""
    from stillhouse.rollouts.offline.filter_files import filter_files
    from stillhouse.rollouts.offline.filters import REGISTRY

    filters = [REGISTRY.parse("empty"), REGISTRY.parse("duplicates")]
    filter_files([path], filters, path.with_name(f"kept-{workers}.jsonl"))


WORK: dict[str, tuple[Callable[[Path, int], None], int]] = {
    "tokenise": (load, 1),
    "tokenise-2": (load, 2),
    "cached": (load, 1),
    "curate": (curate, 1),
}
"""What is done, with how many processes."""


def measured(name: str, path: Path, count: int, large: int) -> dict[str, Any]:
    """Peak memory and time of a process that does the work on a file."""
    if name == "tokenise-2" and path.with_name("cache").exists():
        shutil.rmtree(path.with_name("cache"))
    command = [sys.executable, __file__, "--do", name, "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"exit": done.returncode}
    megabytes = round(path.stat().st_size / 1e6, 1)
    return {"work": name, "rows": count, "large_row_bytes": large, "file_mb": megabytes, **found}


def do(name: str, path: Path) -> None:
    """Do it, and print MB before, at the peak and at the largest worker's peak, and processor seconds."""
    import stillhouse.data
    import stillhouse.models
    import stillhouse.rollouts.offline.filter_files  # noqa: F401 - what is imported is no row

    before = peak_of_process() / 2**20
    function, workers = WORK[name]
    function(path, workers)
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = {
        "imports_mb": before,
        "peak_mb": peak_of_process() / 2**20,
        "worker_peak_mb": others.ru_maxrss / 1024,
        "cpu_seconds": own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime,
    }
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file of results, with these in the place of those that measure the same."""
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {(row["work"], row["rows"]): row for row in (*before, *rows)}
    order = list(WORK)
    return sorted(
        found.values(), key=lambda row: (order.index(row["work"]), row["large_row_bytes"], row["rows"])
    )


def main() -> None:
    """Measure all, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", choices=WORK, default=list(WORK), help="add to earlier results")
    parser.add_argument("--do", choices=WORK)
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    if options.do:
        do(options.do, options.file)
        return
    count = options.rows or (SMALL_ROWS if options.small else ROWS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for many, large in ((count // 10, 0), (count, 0), (1000, LARGE)):
            path = Path(folder) / f"{many}-{large}" / "rows.jsonl"
            path.parent.mkdir()
            write_rows(path, many, large)
            for name in options.only:
                rows.append(measured(name, path, many + bool(large), large))
                print(rows[-1], flush=True)
            shutil.rmtree(path.parent)
    if options.only != list(WORK):
        rows = merged(options.output, rows)
    save(options.output, result(rows, ["datasets"], threads=1))


if __name__ == "__main__":
    main()
