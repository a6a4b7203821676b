"""Training over quantised weights, and with rounded ones: what is trained is what is exported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.small_runs import TEACHER, differences, in_child, nth, rows_of, tree, write_data

import stillhouse
from stillhouse.errors import ConfigError, ModelError
from stillhouse.models import (
    QuantiseConfig,
    StudentConfig,
    TeacherModel,
    load_student,
    load_teacher,
    parameter_counts,
)
from stillhouse.models.adapters import merged_copy, merged_weights, restore_state, save_state
from stillhouse.models.hidden import unwrap
from stillhouse.models.quantise import dense, is_quantised, keep_layout
from stillhouse.runs.resolve import resolve

IDS = torch.arange(5, 25)[None]
LORA = {"rank": 4, "merge": False}
STUDENTS: dict[str, dict[str, Any]] = {
    "int8": {"quantise": {"weights": "int8"}, "lora": LORA},
    "int4": {"quantise": {"weights": "int4"}, "lora": LORA},
    "nf4": {"quantise": {"weights": "nf4"}, "lora": LORA},
    "qat-int8": {"quantise": {"weights": "int8", "qat": True}},
    "qat-int4": {"quantise": {"weights": "int4", "group_size": 64, "qat": True}},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(next(model.parameters()).device)).logits.cpu()


def student(name: str, **more: Any) -> Any:
    config = StudentConfig.model_validate({"path": TEACHER, **STUDENTS[name], **more})
    return load_student(config, None, None, seed=3).eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each, keeping the best weights, on the student's own text."""
    folder = tmp_path_factory.mktemp("quantised")
    write_data(folder, rows=4, valid=2)
    found = {}
    for name, options in STUDENTS.items():
        train = {"max_steps": 2, "lr": 0.01, "validate_every": 1, "keep": "best", "best_by": "loss"}
        config = tree(folder, name, recipe="gkd", train=train)
        config["student"] = {"from_teacher": {"layers": [0, 3]}, **options}
        found[name] = stillhouse.run(config).folder
    return found


@pytest.mark.parametrize("name", STUDENTS)
def test_others_load_what_was_trained(runs: dict[str, Path], name: str) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    folder = runs[name] / "student"
    loads = AutoModelForCausalLM if "qat" in name else AutoPeftModelForCausalLM
    found = loads.from_pretrained(str(folder)).eval()
    assert is_quantised(found)
    keep_layout(found)
    torch.testing.assert_close(
        logits(found), logits(load_teacher(TeacherModel(path=str(runs[name])))), rtol=1e-3, atol=1e-3
    )
    if "qat" not in name:
        assert not torch.allclose(logits(found), logits(found.unload()), atol=1e-3), (
            "the adapters change nothing"
        )
    counts = json.loads((runs[name] / "models.json").read_text())["student"]
    assert counts.get("quantised", 0) == (0 if "qat" in name else 884_736)


@pytest.mark.parametrize("name", ["int8", "nf4", "qat-int4"])
def test_an_export_has_ordinary_weights_that_compute_the_same(
    runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    from stillhouse.runs.export.config import ExportConfig
    from stillhouse.runs.export.quantised import quantise_student
    from stillhouse.runs.export.targets import export_student

    folder = export_student(runs[name], ExportConfig(), tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not is_quantised(plain)
    trained = load_teacher(TeacherModel(path=str(runs[name])))
    torch.testing.assert_close(logits(plain), logits(trained), rtol=1e-3, atol=1e-3)
    if name == "nf4":  # an adapter over a quantised model is quantised as one model
        again = quantise_student(runs[name], QuantiseConfig(), tmp_path / "int8")
        assert is_quantised(load_teacher(TeacherModel(path=str(again))))


@pytest.mark.parametrize("name", ["nf4", "qat-int4"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    write_data(tmp_path, rows=8, valid=2)

    def config(folder: str) -> dict[str, Any]:
        made = tree(tmp_path, folder, recipe="gkd", train={"max_steps": 5, "save_every": 2})
        return {**made, "student": {"from_teacher": {"layers": [1, 3]}, **STUDENTS[name]}}

    stillhouse.run(config("straight"))
    assert in_child(config("killed"), die=nth(1, "open", "checkpoint-4/optimizer.pt")) < 0
    stillhouse.run(config("killed"), resume=True)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert differences(rows_of(straight), rows_of(killed)) == []
    for file in ("adapter_model.safetensors", "base/model.safetensors", "model.safetensors"):
        if (straight / "student" / file).exists():
            one, other = (load_file(folder / "student" / file) for folder in (straight, killed))
            assert differences(one, other) == []


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_gradients_are_those_of_the_dequantised_weights(name: str) -> None:
    quantised = student(name)
    plain = merged_copy(quantised)
    states, found = torch.randn(1, 7, 192, requires_grad=True), []
    for model in (
        unwrap(quantised).model.layers[2].mlp.up_proj.get_base_layer(),
        plain.model.layers[2].mlp.up_proj,
    ):
        states.grad = None
        model(states).square().sum().backward()
        found.append(states.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_step_keeps_no_dequantised_weights() -> None:
    """What autograd saves of a layer is its input, not its weights in 32 bits."""
    layer = unwrap(student("int4")).model.layers[0].mlp.up_proj.get_base_layer()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: saved.append(tuple(one.shape)) or one, lambda one: one
    ):
        layer(torch.randn(2, 192, requires_grad=True))
    assert (512, 192) not in saved


@pytest.mark.parametrize("name", STUDENTS)
def test_what_an_engine_elsewhere_is_given_computes_the_same(name: str) -> None:
    model = student(name)
    for key, weight in unwrap(model).named_parameters():
        if ".lora_B." in key:
            weight.data.normal_(std=0.1)
    plain = load_teacher(TeacherModel(path=TEACHER, dtype="float32"))
    plain.load_state_dict(dict(merged_weights(model)), strict=False)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-3)
    if "qat" not in name:
        torch.testing.assert_close(logits(merged_copy(model)), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["int4", "nf4", "qat-int8"])
def test_kept_weights_come_back(name: str, tmp_path: Path) -> None:
    model = student(name)
    before = logits(model)
    save_state(model, tmp_path / "weights.pt")
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(0.1)
    assert not torch.allclose(logits(model), before)
    restore_state(model, tmp_path / "weights.pt")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_bfloat16_passes_train(name: str, tmp_path: Path) -> None:
    write_data(tmp_path, rows=4, valid=2)
    config = tree(tmp_path, name, recipe="kd", train={"max_steps": 1, "precision": "bfloat16"})
    config["student"] = {"from_teacher": {"layers": [0, 3]}, **STUDENTS[name]}
    assert stillhouse.run(config).state == "done"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to train": ({"student.lora": None}, r"quantised weights cannot be trained; add lora"),
    "merged adapters": ({"student.lora.merge": True}, r"would round away what they have learnt"),
    "qat and adapters": (
        {"student.quantise.qat": True},
        r"quantise.qat trains all weights, and lora freezes them",
    ),
    "qat in nf4": (
        {"student.lora": None, "student.quantise": {"weights": "nf4", "qat": True}},
        r"knows no nf4",
    ),
    "compiled": (
        {"train.compile_models": True},
        r"train.compile_models .*cannot be combined with student.quantise",
    ),
    "shards": ({"train.hf": {"fsdp": "full_shard"}}, r"train.hf.fsdp.*cannot be combined"),
    "cast for generation": (
        {"engine.dtype": "bfloat16"},
        r"engine.dtype .*cannot be combined.*Set student.dtype",
    ),
    "cast at export": (
        {"output.dtype": "bfloat16"},
        r"output.dtype .*cannot be combined.*scales keep their dtype",
    ),
    "odd groups": ({"student.quantise.group_size": 12}, r"group_size.*multiple of 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    overrides, message = REFUSED[case]
    write_data(tmp_path, rows=4, valid=2)
    config = tree(tmp_path, "refused", recipe="kd")
    config["student"] = {"path": TEACHER, **copy.deepcopy(STUDENTS["int4"])}
    resolve(config)
    with pytest.raises(ConfigError, match=message):
        resolve(config, overrides)


def test_a_quantised_model_is_no_start(tmp_path: Path) -> None:
    from stillhouse.runs.export.quantised import quantise_student

    made = quantise_student(Path(TEACHER), QuantiseConfig(), tmp_path / "int8")
    write_data(tmp_path, rows=4, valid=2)
    with pytest.raises(ModelError, match="is quantised, and such weights cannot be trained"):
        stillhouse.run(tree(tmp_path, "next", recipe="kd", student={"path": str(made)}))
    assert not (tmp_path / "next").exists()
    teacher = load_teacher(TeacherModel(path=str(made)))
    with pytest.raises(ModelError, match="the teacher is quantised"):
        load_student(StudentConfig.model_validate({"from_teacher": {"layers": [1]}}), None, teacher, seed=1)


def test_rounding_in_training_is_that_of_export() -> None:
    from stillhouse.models.quantise import quantise_trained_layers

    for name in ("qat-int8", "qat-int4"):
        model = student(name)
        rounded = logits(model)
        quantise_trained_layers(model, StudentConfig.model_validate({"path": "x", **STUDENTS[name]}).quantise)
        assert parameter_counts(model)["quantised"] == 1_769_472
        torch.testing.assert_close(logits(model), rounded, rtol=1e-3, atol=1e-3)
        assert dense(model.model.layers[0].mlp.up_proj.weight).dtype == torch.float32
