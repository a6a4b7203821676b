"""A model with compiled layers is the same model: states, gradients, names, copies, text, runs that go on.

With the eager backend: what is tested is our use of `torch.compile`, not the compiler of this machine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.small_runs import tree, write_data
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.data.collate import collate
from stillhouse.errors import ModelError
from stillhouse.models import compile_layers, compiling, hidden_rows, layer_rows
from stillhouse.models.adapters import add_lora
from stillhouse.models.config import LoraConfig
from stillhouse.runs.execute import execute
from stillhouse.runs.resolve import resolve


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the compiled functions, at each call."""
    made: list[str] = []
    compiler = torch.compile

    def eagerly(function, **options):
        found = compiler(function, backend="eager", **options)

        def counted(*args, **more):
            made.append(function.__qualname__)
            return found(*args, **more)

        return counted

    monkeypatch.setattr(torch, "compile", eagerly)
    compiling._compiled.cache_clear()
    yield made
    compiling._compiled.cache_clear()


def read(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and states of layers for two batches, and the gradients of all parameters that train."""
    found = []
    for count in (2, 5):
        batch = collate(tiny.responses(count, seed=count), tiny.PAD)
        hidden = hidden_rows(model, batch)
        last, layers = layer_rows(model, batch, (0.0, 0.5, 1.0))
        found += [hidden, last, *layers.values()]
    sum(one.square().sum() for one in found).backward()
    slopes = [one.grad for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    return found, slopes


@pytest.mark.parametrize(("lora", "checkpointing"), [(False, False), (True, True)])
def test_states_and_gradients_are_those_of_the_model(
    calls: list[str], lora: bool, checkpointing: bool
) -> None:
    model = tiny.model(1).train()
    if lora:
        model = add_lora(model, LoraConfig(rank=2))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    wanted = read(model)
    assert calls == []
    found = read(compile_layers(model))
    assert set(calls) == {"LlamaDecoderLayer.forward"}
    for one, other in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(one, other)


def test_names_of_weights_stay_and_a_copy_is_a_copy(calls: list[str]) -> None:
    model, plain = tiny.model(1), tiny.model(1)
    compile_layers(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    other = copy.deepcopy(model)
    for one in other.parameters():
        one.data.zero_()
    batch = collate(tiny.responses(2), tiny.PAD)
    assert (hidden_rows(other, batch) == 0).all()
    assert torch.equal(hidden_rows(model, batch), hidden_rows(plain, batch))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_decoding_with_a_cache_is_not_compiled(calls: list[str], kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
    config = AutoConfig.for_model(kind, **sizes, intermediate_size=32, eos_token_id=None, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.tensor([[5, 9, 33]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, **options)
    compile_layers(model)
    assert torch.equal(model.generate(prompt, **options), wanted)
    assert calls == []
    hidden_rows(model, collate(tiny.responses(2), tiny.PAD))
    assert len(calls) == 2


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = tiny.model(1)
    model.config.num_hidden_layers = 5
    with pytest.raises(
        ModelError, match=r"train\.compile_models: cannot find the 5 layers of LlamaForCausalLM"
    ):
        compile_layers(model)


def test_a_compiled_run_goes_on_as_if_it_had_not_stopped_and_exports_plain_names(
    calls: list[str], tmp_path: Path
) -> None:
    write_data(tmp_path, rows=8, valid=2)
    train = {"max_steps": 4, "validate_every": "never", "save_every": 2}
    results = {}
    for compiled in (False, True):
        name = f"compiled-{compiled}".lower()
        config = tree(tmp_path, name, recipe="kd", train={**train, "compile_models": compiled})
        folder = execute(resolve(config)).folder
        results[name] = load_file(folder / "student" / "model.safetensors")
    assert {name.split(".")[0] for name in calls} == {"GPT2Block", "LlamaDecoderLayer"}, "student and teacher"
    (folder / "checkpoints" / "checkpoint-4" / "complete.json").unlink()
    assert execute(resolve(config), resume=True).state == "done"
    results["resumed"] = load_file(folder / "student" / "model.safetensors")
    plain = results.pop("compiled-false")
    for other in results.values():
        assert list(other) == list(plain)
        assert all(torch.equal(other[name], plain[name]) for name in plain)
