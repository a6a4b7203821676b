"""The student that others load is the one that was trained: adapters with their base, dtype, counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stillhouse
from stillhouse.errors import ConfigError, ModelError
from stillhouse.models import (
    StudentConfig,
    TeacherModel,
    fingerprint_of_files,
    load_student,
    load_teacher,
    load_tokenizer,
)
from tests.devices import same_tensors
from tests.small_runs import STUDENT, TEACHER, tree, write_data

STARTS: dict[str, dict[str, Any]] = {
    "pruned": {"from_teacher": {"layers": [0, 3]}},
    "random": {"tokenizer": TEACHER, "from_config": STUDENT},
    "path": {"path": TEACHER},
}
IDS = torch.arange(5, 25)[None]


def distil(folder: Path, name: str, student: dict[str, Any], **output: Any) -> Path:
    """A run of two steps; its folder."""
    write_data(folder, rows=4, valid=2)
    config = tree(folder, name, train={"max_steps": 2, "lr": 0.05, "validate_every": "never"})
    config |= {"recipe": "kd", "student": student}
    config["output"] |= output
    return stillhouse.run(config).folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    lora = {"rank": 4, "merge": False}
    return {name: distil(folder, name, {**start, "lora": lora}) for name, start in STARTS.items()}


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_loads_by_peft_alone_with_its_own_base(runs: dict[str, Path], start: str) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    student = runs[start] / "student"
    found = logits(AutoPeftModelForCausalLM.from_pretrained(str(student)).eval())
    base = AutoModelForCausalLM.from_pretrained(student / "base").eval()
    before = logits(base)
    by_hand = logits(PeftModel.from_pretrained(base, str(student)).eval())
    assert torch.equal(found, by_hand)
    assert not torch.allclose(found, before, atol=1e-3), "the adapter changes nothing"
    ours = logits(load_teacher(TeacherModel(path=str(runs[start]), dtype="float32")))
    torch.testing.assert_close(ours, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["", "student"])
def test_run_and_student_folders_are_models(runs: dict[str, Path], place: str) -> None:
    path = str(runs["pruned"] / place)
    config = StudentConfig(path=path)
    tokenizer = load_tokenizer(config)
    student = load_student(config, tokenizer, None, seed=1)
    teacher = load_teacher(TeacherModel(path=path, dtype="float32"))
    assert torch.equal(logits(student.eval()), logits(teacher))
    assert len(tokenizer) == len(load_tokenizer(StudentConfig(path=TEACHER)))


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_run_starts_from_an_adapter_and_trains(
    runs: dict[str, Path], tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    start = load_teacher(TeacherModel(path=str(runs["pruned"]), dtype="float32"))
    folder = distil(tmp_path, "next", {"path": str(runs["pruned"]), "lora": lora})
    found = load_teacher(TeacherModel(path=str(folder), dtype="float32"))
    assert not torch.allclose(logits(found), logits(start), atol=1e-3)


def test_a_moved_adapter_finds_its_base(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["random"] / "student", tmp_path / "moved")
    here, there = (
        load_teacher(TeacherModel(path=str(path)))
        for path in (tmp_path / "moved", runs["random"] / "student")
    )
    assert torch.equal(logits(here), logits(there))


def test_the_digest_of_an_adapter_follows_adapter_and_base(runs: dict[str, Path], tmp_path: Path) -> None:
    digests = {fingerprint_of_files(TeacherModel(path=str(runs["random"])))}
    for file in ("adapter_model.safetensors", "base/model.safetensors"):
        copy = tmp_path / file.split("/")[0]
        shutil.copytree(runs["random"] / "student", copy)
        content = bytearray((copy / file).read_bytes())
        content[-1] ^= 1
        (copy / file).write_bytes(content)
        digests.add(fingerprint_of_files(TeacherModel(path=str(copy))))
    assert len(digests) == 3


def test_an_adapter_whose_base_is_gone_is_refused_by_name(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["random"] / "student", tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone" / "base")
    (tmp_path / "alone" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not say which model it belongs to"):
        load_teacher(TeacherModel(path=str(tmp_path / "alone")))


def test_a_run_without_a_student_is_called_that(tmp_path: Path) -> None:
    write_data(tmp_path, rows=4, valid=2)
    unfinished = tmp_path / "half"
    unfinished.mkdir()
    for name in ("state.json", "resolved.yaml"):
        (unfinished / name).write_text("{}")
    config = tree(tmp_path, "next") | {"recipe": "kd", "student": {"path": str(unfinished)}}
    with pytest.raises(ConfigError, match=r"student\.path: .* has not exported its student"):
        stillhouse.run(config)


def test_exported_weights_have_the_dtype_asked_for(tmp_path: Path) -> None:
    half = distil(tmp_path, "half", STARTS["random"], dtype="bfloat16")
    weights = load_file(half / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    whole = distil(tmp_path, "whole", STARTS["random"])
    exact = load_file(whole / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert all(same_tensors(weights[name], exact[name].bfloat16()) for name in exact)


def test_padding_rows_of_a_random_head_are_cut_at_export(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tall = {"tokenizer": TEACHER, "from_config": {**STUDENT, "vocab_size": 1500}}
    folder = distil(tmp_path, "tall", tall)
    exported = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    assert logits(exported).shape[-1] == exported.config.vocab_size == 1024
    checkpoint = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "checkpoint-2").eval()
    assert torch.equal(logits(exported), logits(checkpoint)[..., :1024])


def test_padding_rows_take_no_part_in_the_validation_loss(tmp_path: Path) -> None:
    write_data(tmp_path, rows=4, valid=2)
    config = tree(tmp_path, "tall", train={"max_steps": 3, "log_every": 1}) | {"recipe": "kd"}
    config["student"] = {"tokenizer": TEACHER, "from_config": {**STUDENT, "vocab_size": 1500}}
    folder = stillhouse.run(config).folder
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    last = [row["loss"] for row in rows if row["phase"] == "valid" and row["step"] == 3]
    found = json.loads((folder / "evaluation" / "student-after.json").read_text(encoding="utf-8"))
    assert last == [pytest.approx(found["metrics"]["loss"], abs=1e-5)]


def test_adapters_are_counted_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    facts = json.loads((runs["random"] / "models.json").read_text())["student"]
    saved = load_file(runs["random"] / "student" / "adapter_model.safetensors")
    base = load_file(runs["random"] / "student" / "base" / "model.safetensors")
    assert facts["adapter"] == facts["trainable"] == sum(tensor.numel() for tensor in saved.values())
    assert facts["parameters"] == sum(tensor.numel() for tensor in base.values())
    card = (runs["random"] / "student" / "README.md").read_text()
    assert f"{facts['parameters']:,} parameters" in card


def usage(card: str) -> tuple[str, str]:
    """The code of a card, and the answer that it promises."""
    code = card.split("```python\n", 1)[1].split("```", 1)[0]
    answer = card.split("```text\n", 1)[1].split("\n```", 1)[0]
    return code, answer


@pytest.mark.parametrize("start", STARTS)
def test_the_usage_on_the_card_gives_its_answer_word_for_word(
    runs: dict[str, Path], start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs[start] / "student")
    code, answer = usage(Path("README.md").read_text(encoding="utf-8"))
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.rstrip("\n") == answer
    assert answer
