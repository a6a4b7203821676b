"""Students in fewer bits: what is written is what others load, and what cannot be is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.errors import ConfigError, ModelError
from stillhouse.models import QuantiseConfig, TeacherModel, fingerprint, load_teacher, parameter_counts
from stillhouse.models.hidden import image_reader
from stillhouse.models.quantise import (
    dense,
    dequantise_layers,
    is_quantised_weight,
    quantise_layers,
    quantised_dtype,
)
from stillhouse.runs.export.quantised import quantise_student
from tests import tiny
from tests.small_runs import TEACHER

WEIGHTS = ("int8", "int4", "nf4")
IDS = torch.arange(5, 25)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


def teacher(path: str = TEACHER) -> Any:
    return load_teacher(TeacherModel(path=path, dtype="float32"))


@pytest.fixture(scope="module", params=WEIGHTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("quantised") / request.param
    return request.param, quantise_student(Path(TEACHER), QuantiseConfig(weights=request.param), folder)


def test_transformers_loads_what_was_quantised(written: tuple[str, Path]) -> None:
    weights, folder = written
    as_stored = load_teacher(TeacherModel(path=TEACHER))
    in_memory = logits(quantise_layers(as_stored, QuantiseConfig(weights=weights)))
    assert torch.equal(logits(load_teacher(TeacherModel(path=str(folder)))), in_memory)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(loaded), in_memory, rtol=0.1, atol=0.2)  # bfloat16
    error = (logits(loaded) - logits(teacher())).abs().mean() / logits(teacher()).std()
    assert 0 < error < (0.02 if weights == "int8" else 0.2)
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(_local()).get_vocab()
    )


def _local() -> Path:
    import stillhouse

    return Path(stillhouse.__file__).parent / "demo" / "teacher"


class Shapes(TorchDispatchMode):
    """Keeps how large the largest result of an operation was."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, getattr(found, "numel", lambda: 0)())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_dtype_is_known_without_dequantising(weights: str, dtype: torch.dtype) -> None:
    model = quantise_layers(tiny.model(1, width=64, dtype=dtype), QuantiseConfig(weights=weights))
    weight = next(one for one in model.parameters() if is_quantised_weight(one))
    with Shapes() as shapes:
        assert dense(weight).dtype == dtype
    assert shapes.largest >= 64 * 64, "what is to be avoided"
    with Shapes() as shapes:
        assert quantised_dtype(model) == dtype
    assert shapes.largest < 64 * 64


def test_our_own_loading_takes_it_as_a_teacher(written: tuple[str, Path]) -> None:
    weights, folder = written
    found = parameter_counts(teacher(str(folder)))
    whole = parameter_counts(teacher())
    assert found["parameters"] == whole["parameters"]
    assert found["quantised"] == 1_769_472
    assert found["bytes"] < 0.6 * whole["bytes"]
    if weights == "nf4":
        assert found["bytes"] < 0.25 * whole["bytes"]


def test_it_is_evaluated_as_any_model_is(written: tuple[str, Path], tmp_path: Path) -> None:
    from stillhouse.runs.evaluate_models import evaluate_model
    from tests.small_runs import write_data

    write_data(tmp_path, rows=2, valid=2)
    evaluate = {"sampling": {"max_tokens": 4, "temperature": 0.0}, "limit": 2}
    found, _ = evaluate_model(
        str(written[1]), tmp_path / "valid.jsonl", teacher=TEACHER, template="plain", evaluate=evaluate
    )
    assert 0 < found["metrics"]["kl_to_teacher"] < 0.1


def test_the_head_and_what_is_not_linear_keep_their_numbers(written: tuple[str, Path]) -> None:
    _, folder = written
    with (
        safe_open(folder / "model.safetensors", "pt") as kept,
        safe_open(_local() / "model.safetensors", "pt") as old,
    ):
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            assert torch.equal(kept.get_tensor(name), old.get_tensor(name))


def test_the_card_says_so(written: tuple[str, Path]) -> None:
    card = (written[1] / "README.md").read_text()
    assert "base_model_relation: quantized" in card
    assert "1,769,472 of the 1,967,808 parameters are quantised" in card


@pytest.mark.parametrize("weights", WEIGHTS)
def test_dequantised_layers_compute_the_same(weights: str) -> None:
    model = quantise_layers(teacher(), QuantiseConfig(weights=weights))
    quantised, before = logits(model), fingerprint(model)
    assert fingerprint(model) == before
    dequantise_layers(model)
    torch.testing.assert_close(logits(model), quantised, rtol=1e-4, atol=1e-4)
    assert fingerprint(model) != before
    assert type(model.model.layers[0].mlp.up_proj.weight) is torch.nn.Parameter


def test_a_fingerprint_sees_a_change_of_one_integer() -> None:
    model = quantise_layers(teacher(), QuantiseConfig(weights="int4"))
    before = fingerprint(model)
    model.model.layers[3].mlp.up_proj.weight.qdata[5, 7] += 1
    assert fingerprint(model) != before


@pytest.mark.parametrize(("weights", "bound"), [("int8", 1 / 127), ("int4", 1 / 7)])
def test_no_weight_is_off_by_more_than_a_step(weights: str, bound: float) -> None:
    before = teacher().model.layers[1].mlp.down_proj.weight
    model = quantise_layers(teacher(), QuantiseConfig(weights=weights, group_size=32))
    after = dense(model.model.layers[1].mlp.down_proj.weight)
    size = before.shape[1] if weights == "int8" else 32
    largest = before.reshape(len(before), -1, size).abs().amax(-1, keepdim=True)
    off = (before - after).abs().reshape(len(before), -1, size)
    assert bool((off <= 0.51 * bound * largest + 1e-6).all())


def test_a_vision_tower_keeps_its_numbers_and_the_folder_reads_images(tmp_path: Path) -> None:
    from tests.vision_models import vision_model

    source = vision_model(tmp_path / "model", "llava")
    folder = quantise_student(source, QuantiseConfig(), tmp_path / "int8")
    found = load_teacher(TeacherModel(path=str(folder)))
    rounded = {name for name, weight in found.named_parameters() if is_quantised_weight(weight)}
    assert rounded
    assert all(".language_model." in name for name in rounded)
    assert {path.name for path in source.glob("*processor_config.json")} <= {p.name for p in folder.iterdir()}
    assert image_reader(found) is not None


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"group_size: the 192 weights in a row of \S+ cannot be cut into groups of 72"
    ):
        quantise_student(Path(TEACHER), QuantiseConfig(weights="int4", group_size=72), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    done = quantise_student(Path(TEACHER), QuantiseConfig(), tmp_path / "done")
    with pytest.raises(ModelError, match="is quantised already"):
        quantise_student(done, QuantiseConfig(), tmp_path / "again")
    with pytest.raises(ConfigError, match="is there already"):
        quantise_student(Path(TEACHER), QuantiseConfig(), done)
    with pytest.raises(ModelError, match="has no linear layers"):
        quantise_layers(_gpt2(), QuantiseConfig())


def _gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10, n_positions=8))
