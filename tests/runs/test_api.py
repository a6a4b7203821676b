"""The public Python interface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import stillhouse
from stillhouse.errors import ConfigError
from tests.devices import same
from tests.workshop import Workshop


def test_run_takes_a_file_or_a_dictionary_and_overrides(workshop: Workshop) -> None:
    options = {"train.max_steps": 2, "train": {"lr": 1e-3}}
    from_file = stillhouse.run("run.yaml", name="file", **options)
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    from_tree = stillhouse.run(tree, name="tree", **options)
    assert isinstance(from_file, stillhouse.Result)
    assert from_file.state == from_tree.state == "done"
    assert str(from_file.folder) == "runs/file"
    assert (from_file.folder / "student" / "config.json").exists()
    assert {"rouge_l", "kl_to_teacher", "loss"} <= from_file.metrics.keys()
    assert from_file.metrics["loss"] == same(from_tree.metrics["loss"])


def test_a_run_without_evaluation_gives_the_last_row_of_its_log(workshop: Workshop) -> None:
    result = stillhouse.run("run.yaml", **{"data.valid": None, "train.max_steps": 2})
    assert result.metrics["step"] == 2
    assert result.metrics["loss"] > 0


def test_what_is_wrong_is_raised_and_nothing_is_written(workshop: Workshop) -> None:
    before = workshop.listing()
    with pytest.raises(ConfigError, match=r"train\.lr"):
        stillhouse.run("run.yaml", train={"lr": "fast"})
    with pytest.raises(ValueError, match="no such file"):
        stillhouse.run("nowhere.yaml")
    assert workshop.listing() == before


def test_objectives_are_built_by_name() -> None:
    assert {"forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "csd"} <= set(
        stillhouse.objectives.kinds()
    )
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    value = stillhouse.objectives.build("skew_kl", alpha=0.1)(student, teacher)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1)
    torch.testing.assert_close(value, expected)
    with pytest.raises(ConfigError, match="did you mean 'skew_kl'"):
        stillhouse.objectives.build("skew_lk")


def test_importing_the_package_and_asking_for_help_load_no_torch() -> None:
    code = """
import sys
import stillhouse
from stillhouse.commands import main
heavy = {"torch", "transformers", "datasets", "matplotlib", "pandas", "numpy", "pydantic"} & set(sys.modules)
assert not heavy, heavy
sys.argv = ["stillhouse", "methods"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distillm2" in done.stdout


def test_what_is_wrong_with_a_file_is_told_before_what_trains_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: kd\nstudnet: {path: x}\n")
    (tmp_path / "chain.yaml").write_text("stages: {warm: {recipe: kdd}, small: {quantise: {wieghts: int4}}}")
    code = """
import sys
from stillhouse.commands import main
slow = {"transformers.modeling_utils", "peft", "bitsandbytes", "torchao", "torch._dynamo", "datasets"}
for arguments in (["check", "run.yaml"], ["run", "chain.yaml"]):
    sys.argv = ["stillhouse", *arguments]
    try:
        main()
    except SystemExit as stopped:
        assert stopped.code == 2, stopped.code
    assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "studnet" in done.stderr
    assert "wieghts" in done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="rnu"):
        stillhouse.rnu  # noqa: B018
