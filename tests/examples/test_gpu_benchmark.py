"""benchmarks/gpu.py runs on a CPU with small shapes, whatever it is to find on a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.children import run_script
from tests.conftest import ROOT, script
from tests.devices import WITHOUT_GPU

RESULT = ROOT / "benchmarks" / "results" / "gpu.json"


def test_every_stage_has_rows_and_nothing_fails(tmp_path: Path) -> None:
    before = RESULT.exists()
    output = tmp_path / "gpu.json"
    done = run_script(
        ROOT / "benchmarks" / "gpu.py", "--small", "--output", str(output), folder=ROOT, env=WITHOUT_GPU
    )
    assert done.code == 0, done.err[-2000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["device"] == "cpu"
    rows: dict[str, list[dict[str, Any]]] = found["rows"]
    assert list(rows) == ["objectives", "step", "writing", "paper", "tests"]
    assert not [row for stage in rows.values() for row in stage if row.get("failed") or "broke_off" in row]
    ours = [row for row in rows["objectives"] if row.get("who") == "ours"]
    assert max(row["gradient_error"] for row in ours) < 1e-4
    for stage, figure in (("step", "seconds_per_step"), ("writing", "tokens_per_second"), ("paper", "steps")):
        assert rows[stage][0][figure] > 0
    assert rows["tests"][0]["passed"] > 0
    assert RESULT.exists() == before, "a CPU's results are not those of a card"


def test_a_stage_that_dies_or_lasts_too_long_is_a_row(tmp_path: Path) -> None:
    import multiprocessing

    gpu = script(ROOT / "benchmarks" / "gpu.py")
    context = multiprocessing.get_context("fork")

    def dies(*_: Any) -> None:
        os.setsid()
        os._exit(3)

    def waits(*_: Any) -> None:
        os.setsid()
        while True:
            pass

    for fate, limit, said in ((dies, 60, "its process ended with 3"), (waits, 0.2, "stopped after")):
        gpu.child = fate
        *_, last = gpu.stage_rows(context, "step", True, tmp_path, limit)
        assert said in last["failed"]
