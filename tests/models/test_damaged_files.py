"""Model folders that are damaged, cut, swapped or poisoned: one message with the path, and no code runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import tiny

from stillhouse.errors import ModelError
from stillhouse.models import TeacherModel, load_teacher, load_tokenizer

DEMO = "package:stillhouse/demo/teacher"


class Poison:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny.model(1).save_pretrained(folder)  # type: ignore[operator]
    load_tokenizer(TeacherModel(path=DEMO)).save_pretrained(folder)
    return folder


def configured(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | values))

    return change


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, share: float) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def only(name: str, content: bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


MODEL = {
    "weights cut in half": cut("model.safetensors", 0.5),
    "no weights": cut("model.safetensors", 0.0),
    "a header that claims 2^60 bytes": written("model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
    "a header that is no JSON": written("model.safetensors", (8).to_bytes(8, "little") + b"no json!"),
    "a header nested without end": written(
        "model.safetensors", (90_000).to_bytes(8, "little") + b"[" * 90_000
    ),
    "text for weights": written("model.safetensors", b"hello"),
    "a pickle of nothing": only("pytorch_model.bin", b""),
    "a pickle that is none": only("pytorch_model.bin", b"\x80\x04garbage"),
    "config cut": cut("config.json", 0.5),
    "config that is a list": written("config.json", b"[]"),
    "config that is a number": written("config.json", b"5"),
    "config that is not UTF-8": written("config.json", b"\xff\xfe"),
    "config nested without end": written("config.json", b"[" * 100_000),
    "an unknown architecture": configured(model_type="nothing-like-it"),
    "a size that is text": configured(hidden_size="large"),
    "a size of 0": configured(num_attention_heads=0),
    "a size that is a list": configured(vocab_size=[1, 2]),
    "another size": configured(hidden_size=48),
    "an index of files that are not there": only(
        "model.safetensors.index.json",
        json.dumps({"metadata": {}, "weight_map": {"a": "b.safetensors"}}).encode(),
    ),
    "an index that leads out": only(
        "model.safetensors.index.json",
        json.dumps({"metadata": {}, "weight_map": {"a": "../../../etc/passwd"}}).encode(),
    ),
    "an index that is a list": only("model.safetensors.index.json", b"[]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL)
def test_a_damaged_model(name: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    MODEL[name](folder)
    with pytest.raises(ModelError, match="damaged: ") as caught:
        load_teacher(TeacherModel(path=str(folder)))
    assert len(str(caught.value)) < 1200


def test_a_poisoned_model_runs_nothing(whole: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "damaged", tmp_path / "mark"
    shutil.copytree(whole, folder)
    only("pytorch_model.bin", pickle.dumps(Poison(mark)))(folder)
    with pytest.raises(ModelError, match="damaged: no causal language model could be loaded"):
        load_teacher(TeacherModel(path=str(folder)))
    assert not mark.exists()


TOKENIZER = {
    "cut": cut("tokenizer.json", 0.5),
    "empty": cut("tokenizer.json", 0.0),
    "a list": written("tokenizer.json", b"[]"),
    "a mapping of nothing": written("tokenizer.json", b"{}"),
    "nested without end": written("tokenizer.json", b"[" * 100_000),
    "not UTF-8": written("tokenizer.json", b"\xff\xfe\x00"),
    "a config that is a list": written("tokenizer_config.json", b"[]"),
    "a config that is cut": cut("tokenizer_config.json", 0.5),
    "a class that is none": written("tokenizer_config.json", b'{"tokenizer_class": 5}'),
    "an end token that is a list": written("tokenizer_config.json", b'{"eos_token": ["a"]}'),
}


@pytest.mark.parametrize("name", TOKENIZER)
def test_a_damaged_tokenizer(name: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    TOKENIZER[name](folder)
    with pytest.raises(ModelError, match="damaged: "):
        load_tokenizer(TeacherModel(path=str(folder)))
