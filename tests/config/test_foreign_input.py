"""YAML that unfolds without end, and paths that no file can have: a sentence, soon, and no traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillhouse import recipes
from stillhouse.config import FilePath, Layer, Layered, StrictConfig, strict_yaml, validate
from stillhouse.data.datasets import dataset_at
from stillhouse.errors import ConfigError, ModelError, StillhouseError
from stillhouse.files import locate
from stillhouse.models.paths import resolve_path


def bomb(levels: int, width: int) -> str:
    """`width` to the power of `levels` values in a few lines."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * width) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(9, 10), "more than 50,000 values, with what aliases repeat"),
        (bomb(30, 2), "more than 50,000 values"),
        ("a: " + "[" * 45 + "]" * 45, "nested more than 40 deep"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "{a: " * 5000 + "}" * 5000, "nested too deeply"),
        ("a: &x [*x]", "contains itself"),
    ],
)
def test_yaml_that_unfolds_without_end(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strict_yaml.parse(text, "run.yaml")


def test_aliases_within_reason_are_read() -> None:
    values, origins = strict_yaml.parse("a: &x {lr: 1e-4}\nb: *x\nc: [*x, *x]", "run.yaml")
    assert values["c"] == [{"lr": 1e-4}, {"lr": 1e-4}]
    assert origins[("b", "lr")] == "run.yaml:1"


def test_a_file_that_is_no_configuration_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text("# " + "x" * (1 << 20))
    with pytest.raises(ConfigError, match=r"rows.yaml: has 1,048,578 bytes; .*Rows of data go into files"):
        strict_yaml.read(path)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    return path


def test_pipes_and_devices_are_not_read(pipe: Path) -> None:
    for read in (strict_yaml.read, lambda path: recipes.find(str(path.with_suffix(".yaml")))):
        pipe.with_suffix(".yaml").unlink(missing_ok=True)
        os.mkfifo(pipe.with_suffix(".yaml"))
        with pytest.raises(ConfigError, match="is a pipe, not a file"):
            read(pipe.with_suffix(".yaml"))
    with pytest.raises(ConfigError, match="is a device, not a file"):
        strict_yaml.read("/dev/zero")
    with pytest.raises(ConfigError, match="is a pipe, not a file"):
        dataset_at(pipe).check_found()


IMPOSSIBLE = {
    "a long name": ("x" * 300, "is too long for a path: 300 bytes"),
    "a long name in a folder": ("runs/" + "ü" * 200 + ".yaml", "longest name 405; allowed: 4,095 and 255"),
    "a long path": ("/".join(["x" * 200] * 30), "is too long for a path: 6,029 bytes"),
    "a null byte": ("a\0b", "holds a null byte"),
    "half a character": ("a\ud83d/b", "holds half a character"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_file_can_be_called(name: str) -> None:
    path, words = IMPOSSIBLE[name]

    class Tree(StrictConfig):
        folder: FilePath

    with pytest.raises(ConfigError, match=rf"^folder \(run.yaml\): .*{words}"):
        validate(Tree, Layered.merged(Layer.of({"folder": path}, "run.yaml")))
    for use in (strict_yaml.read, recipes.find, locate, resolve_path, dataset_at):
        with pytest.raises(StillhouseError, match=words):
            use(path)


@pytest.mark.parametrize("inner", ["..", "../secret", "demo/../../x", "/etc/passwd"])
def test_package_paths_stay_inside(inner: str) -> None:
    with pytest.raises(ConfigError, match="leads out of the package"):
        locate(f"package:stillhouse/{inner}")
    assert locate("package:stillhouse/demo/teacher").is_dir()


@pytest.mark.parametrize("name", ["../pyproject", "../demo/x", "/etc/passwd", ".", "kd/../kd", ""])
def test_a_recipe_is_one_of_the_package(name: str) -> None:
    with pytest.raises(ConfigError, match="no method is called"):
        recipes.find(name)


@pytest.mark.parametrize(
    "path",
    [
        "runs/warm",
        "./student",
        "models/llama.gguf",
        "C:\\models\\x",
        "a/b/c",
        "my model/x",
        "~/no-such-folder",
        "x.safetensors",
    ],
)
def test_a_path_that_looks_local_and_is_missing_asks_no_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        resolve_path(path)
    assert resolve_path("org/name-1.5") == "org/name-1.5"
