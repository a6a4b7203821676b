"""What docs/servers.md shows runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from stillhouse.runs.estimate import run_size
from stillhouse.runs.execute import execute
from stillhouse.runs.memory import GpuSize
from stillhouse.runs.resolve import resolve
from stillhouse.teachers.hidden.protocol import KEY
from tests.conftest import ROOT
from tests.remote_teachers import teacher_process
from tests.vllm_like import demo_server

PAGE = (ROOT / "docs" / "servers.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```yaml\n# (\S+)\.yaml\n(.*?)```", PAGE, flags=re.DOTALL))


@pytest.mark.parametrize("name", ["seqkd", "kd", "on-policy"])
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with demo_server() as service:
        tree = yaml.safe_load(BLOCKS[name].replace("http://127.0.0.1:8000/v1", service.url))
        result = execute(resolve(tree))
    assert result.state == "done"
    assert json.loads((result.folder / "servers.json").read_text(encoding="utf-8"))
    assert (tmp_path / "teacher-cache").exists() == (name != "seqkd")


def test_the_remote_teacher_trains_the_student_of_the_live_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KEY, "key")
    served = yaml.safe_load(BLOCKS["teacher"])
    tree = yaml.safe_load(BLOCKS["remote"])
    found = {}
    with teacher_process(tmp_path, **served | {"port": 0}) as process:
        teacher = {"kind": "remote", "url": process.url, "request_tokens": 100}
        teachers = {"live": {"kind": "live", "path": served["path"], "dtype": "float32"}, "remote": teacher}
        cached = resolve({**tree, "teacher": {"kind": "cache", "of": teacher, "folder": "kept"}}).config
        size = run_size(cached, GpuSize("H100", 80 * 10**9))
        for name, teacher in teachers.items():
            result = execute(resolve({**tree, "name": name, "teacher": teacher}))
            rows = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            found[name] = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    assert len(found["live"]) > 0
    head = 1024 * 192 * 4
    assert size.memory["loading"]["heads of teachers elsewhere"] == pytest.approx(1.05 * head)
    states = size.rows["response tokens"] * 192 * 4
    assert size.facts["cache_bytes"]["teacher"] == pytest.approx(states + head, rel=0.02)
    assert found["remote"] == pytest.approx(found["live"], rel=1e-6)
    facts = json.loads((tmp_path / "runs" / "remote" / "inputs.json").read_text(encoding="utf-8"))
    assert facts["teacher"]["path"] == served["path"]


def test_every_engine_and_teacher_that_is_named_exists() -> None:
    from stillhouse.engines import REGISTRY as ENGINES
    from stillhouse.teachers import REGISTRY as TEACHERS

    assert set(re.findall(r"engine: \{kind: (\w+)", PAGE)) <= set(ENGINES.kinds())
    assert set(re.findall(r"teacher: \{kind: (\w+)", PAGE)) <= set(TEACHERS.kinds())
