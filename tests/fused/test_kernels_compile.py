"""Every Triton kernel compiles for the GPUs that people have, without spilled registers; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.fused.test_triton import kernel_cases

RECORDED = ROOT / "benchmarks" / "results" / "compiled_kernels.json"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_every_kernel_compiles_for_both_architectures_without_spills_and_as_recorded(tmp_path: Path) -> None:
    """In a process of its own: in this one kernels are interpreted."""
    out = tmp_path / "compiled_kernels.json"
    command = [sys.executable, "benchmarks/compiled_kernels.py", "--small", "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    compiled, recorded = read(out), read(RECORDED)
    assert [row for row in compiled["rows"] + recorded["rows"] if row["spilled_bytes"]] == []
    wanted = {parameter.values[0].kind for parameter in kernel_cases()} - {"sum"}
    for target in ("sm_80", "sm_90a"):
        assert {row["objective"] for row in compiled["rows"] if row["target"] == target} == wanted
    if recorded["versions"]["triton"] == compiled["versions"]["triton"]:  # another compiler counts otherwise
        stale = [row for row in compiled["rows"] if row not in recorded["rows"]]
        assert stale == [], "run python benchmarks/compiled_kernels.py"
