"""The wheel works without the repository: package data is in it, and the command runs from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import stillhouse
from tests.conftest import ROOT

PACKAGE = Path(stillhouse.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, without a network; the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = target.glob("*.whl")
    return found


def test_everything_that_is_no_python_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        sizes = sum(info.compress_size for info in archive.infolist())
    wanted = {"stillhouse/py.typed"}
    templates = ("report/templates/*", "data/templates/*", "runs/export/*.j2")
    for pattern in ("recipes/*.yaml", "demo/**/*", *templates):
        wanted |= {
            f"stillhouse/{path.relative_to(PACKAGE)}" for path in PACKAGE.glob(pattern) if path.is_file()
        }
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert sum(name.endswith(".yaml") for name in wanted) > 10
    for part in ("demo/teacher/model.safetensors", "demo/teacher/tokenizer.json", "demo/data/train.jsonl"):
        assert f"stillhouse/{part}" in wanted
    assert wanted <= held, sorted(wanted - held)
    modules = {f"stillhouse/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    assert modules <= held
    licences = {name.rpartition("/")[2] for name in held if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "docs"))]
    assert sizes < 10e6


def test_it_runs_where_no_repository_is(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--no-index"]
    done = subprocess.run([*command, "--target", str(place), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    work.mkdir()
    settings = {**os.environ, "PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}

    def stillhouse(*arguments: str) -> str:
        script = str(place / "bin" / "stillhouse")
        done = subprocess.run(
            [sys.executable, script, *arguments], cwd=work, env=settings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import stillhouse; print(stillhouse.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=work, env=settings, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()).is_relative_to(place)
    assert "distillm2" in stillhouse("methods")
    assert "--folder" in stillhouse("quickstart", "--help")
    (work / "run.yaml").write_text(stillhouse("init", "kd"), encoding="utf-8")
    demo = "package:stillhouse/demo"
    sizes = stillhouse(
        "check",
        "run.yaml",
        "--no-values",
        f"student.path={demo}/teacher",
        f"teacher.path={demo}/teacher",
        f"data.train={demo}/data/train.jsonl",
        f"data.valid={demo}/data/dev.jsonl",
        "data.max_response=96",
        "data.template.kind=plain",
    )
    assert "student parameters" in sizes
