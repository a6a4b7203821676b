"""The SmolLM2 example as it lies here: its run file is valid, its sets are apart, its table is true."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from tests.conftest import ROOT, script

from stillhouse.runs.resolve import resolve

EXAMPLE = ROOT / "examples" / "smollm2"
RESULT = ROOT / "benchmarks" / "results" / "smollm2.json"


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    return script(EXAMPLE / "publish.py")


def test_the_run_file_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = resolve("examples/smollm2/run.yaml").config
    assert config.student.from_teacher is not None
    assert len(config.student.from_teacher.layers) == 21
    assert config.train.max_steps is not None
    assert config.train.max_steps >= 200


def test_no_instruction_is_in_two_sets() -> None:
    sets = []
    for name, count in (("train", 1500), ("dev", 50), ("eval", 80)):
        lines = (EXAMPLE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == count
        assert all(row["instruction"].strip() and row["output"].strip() for row in rows)
        sets.append({row["instruction"] for row in rows})
    assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]


def test_the_readme_shows_the_committed_result(publish: ModuleType) -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert publish.table(result["rows"]) in (EXAMPLE / "README.md").read_text(encoding="utf-8")
    assert result["training"][-1]["step"] >= 200
    scores = {row["system"]: row["rouge_l"] for row in result["rows"]}
    assert result["rouge_l_gain"]["mean"] == pytest.approx(
        scores["student after"] - scores["student before"], abs=0.02
    )


def test_an_unfinished_run_is_not_published(
    publish: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"state": "interrupted"}))
    monkeypatch.setattr("sys.argv", ["publish.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="the run is interrupted; publish a finished one"):
        publish.main()
