"""Tiny models of several architectures: loading, starting from layers or a configuration, adapters, heads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.conftest import shared
from torch import nn

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import EnvironmentFault, ModelError
from stillhouse.models import (
    LoraConfig,
    Prune,
    StudentConfig,
    TeacherModel,
    check_same_tokenizer,
    head_of,
    hidden_rows,
    load_student,
    load_teacher,
    load_tokenizer,
    parameter_counts,
    unwrap,
)
from stillhouse.models.hidden import check_head

WIDE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GPT = {"n_embd": 16, "n_layer": 3, "n_head": 2, "initializer_range": 0.3}
MANY_HEADS = {name: value for name, value in WIDE.items() if name != "num_key_value_heads"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE,
    "qwen3": {**WIDE, "head_dim": 8},
    "mistral": {**WIDE, "sliding_window": 4},
    "gemma2": {**WIDE, "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "gemma3_text": {
        **WIDE,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "cohere": {**WIDE, "logit_scale": 0.25},
    "granite": {**WIDE, "logits_scaling": 4.0},
    "hyperclovax": {**WIDE, "logits_scaling": 4.0},
    "phi": WIDE,
    "mixtral": {**WIDE, "num_local_experts": 2},
    "gpt2": GPT,
    "gpt_neox": MANY_HEADS,
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "word_embed_proj_dim": 8,
        "max_position_embeddings": 64,
        "init_std": 0.3,
    },
}
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


class Ids(SimpleNamespace):
    """All that a random student takes from a tokenizer."""

    eos_token_id = tiny.END
    bos_token_id = None
    pad_token_id = tiny.PAD

    def __len__(self) -> int:
        return tiny.VOCAB


def made(kind: str, seed: int = 0, **more: Any) -> nn.Module:
    config = StudentConfig(from_config={"model_type": kind, **ARCHITECTURES[kind]}, **more)
    return load_student(config, Ids(), None, seed)


def batch() -> TokenBatch:
    ids = torch.randint(2, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).tolist()
    return TokenBatch.of([ids[0], ids[1][:6]], [5, 3], tiny.PAD)


def logits(model: nn.Module, inputs: TokenBatch) -> torch.Tensor:
    found = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False)
    whole: torch.Tensor = found.logits
    return whole[inputs.response_mask]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_hidden_rows_through_the_head_are_the_models_own_logits(kind: str) -> None:
    model = made(kind).eval()
    inputs = batch()
    with torch.no_grad():
        ours = head_of(model).logits(hidden_rows(model, inputs))
        theirs = logits(model, inputs)
    assert theirs.std() > 0.05  # flat logits would hide a missing scale
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_kept_layers_compute_what_the_teacher_does_without_the_others(kind: str) -> None:
    teacher = made(kind).eval()
    student = load_student(StudentConfig(from_teacher=Prune(layers=(0, 2))), Ids(), teacher, 0).eval()
    cut = copy.deepcopy(teacher)
    stack = cut.get_submodule(LAYERS.get(kind, "model.layers"))
    stack[1].forward = lambda hidden_states, *_, **__: hidden_states
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(logits(student, inputs), logits(cut, inputs), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits(student, inputs), logits(teacher, inputs), atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "opt"])
def test_a_pruned_student_is_saved_and_loads_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher = made(kind)
    student = load_student(StudentConfig(from_teacher=Prune(layers=(0, 2))), Ids(), teacher, 0).eval()
    student.save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.equal(logits(again, batch()), logits(student, batch()))


def test_all_layers_are_a_copy_that_trains_alone() -> None:
    teacher = made("llama")
    student = load_student(StudentConfig(from_teacher=Prune(layers=(0, 1, 2))), Ids(), teacher, 0)
    assert torch.equal(logits(student, batch()), logits(teacher, batch()))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(bool(parameter.any()) for parameter in teacher.parameters() if parameter.ndim > 1)


def test_a_student_of_a_frozen_teacher_can_be_trained() -> None:
    teacher = made("llama").requires_grad_(False)
    student = load_student(StudentConfig(from_teacher=Prune(layers=(0, 2))), Ids(), teacher, 0)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_layer_that_the_teacher_lacks_is_refused() -> None:
    config = StudentConfig(from_teacher=Prune(layers=(0, 3)))
    with pytest.raises(ModelError, match=r"layer 3 does not exist; the teacher has 3 \(0 to 2\)"):
        load_student(config, Ids(), made("llama"), 0)


def test_layers_that_break_a_fixed_pattern_are_refused() -> None:
    options = {
        "model_type": "recurrent_gemma",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "lru_width": 16,
        "head_dim": 8,
    }
    teacher = load_student(StudentConfig(from_config=options), Ids(), None, 0)
    config = StudentConfig(from_teacher=Prune(layers=(0, 2)))
    with pytest.raises(ModelError, match="fixed pattern"):
        load_student(config, Ids(), teacher, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_frequencies_stay_exact_in_bfloat16(dtype: str) -> None:
    teacher = made("llama", dtype=dtype)
    student = load_student(StudentConfig(from_teacher=Prune(layers=(0, 2)), dtype=dtype), Ids(), teacher, 0)
    wanted = made("llama").model.rotary_emb.inv_freq
    for model in (teacher, student):
        assert next(model.parameters()).dtype == getattr(torch, dtype)
        assert torch.equal(model.model.rotary_emb.inv_freq, wanted)


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = made("llama", 1), made("llama", 1), made("llama", 2)
    weights = [model.get_output_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_random_student_takes_vocabulary_and_special_ids_from_the_tokenizer() -> None:
    config = made("llama").config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (tiny.VOCAB, tiny.END, tiny.PAD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_type": "lama"},
            r"from_config.model_type: 'lama' is not known .*\(did you mean 'llama'",
        ),
        ({"model_type": "llama", "hiden_size": 64}, r"from_config.hiden_size: .*did you mean 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "from_config: no model can be made of it"),
        ({"model_type": "llama", "hidden_size": 15, "num_attention_heads": 2}, "no model can be made of it"),
    ],
)
def test_a_wrong_from_config_is_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_student(StudentConfig(from_config=options), Ids(), None, 0)


def test_adapters_alone_are_trained_and_merge_into_the_same_model() -> None:
    model = made("llama", lora=LoraConfig(rank=2, targets=("q_proj", "v_proj"))).eval()
    facts = parameter_counts(model)
    assert 0 < facts["trainable"] < facts["parameters"] / 4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        inputs = batch()
        ours = head_of(model).logits(hidden_rows(model, inputs))
        torch.testing.assert_close(ours, logits(model, inputs), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours, logits(made("llama").eval(), inputs), atol=1e-3)
        merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
        torch.testing.assert_close(logits(merged, inputs), ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("lm_head",), "the head .lm_head. has an adapter"), (("qqq",), "student.lora: .*qqq")],
)
def test_adapters_in_wrong_places_are_refused(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        made("llama", lora=LoraConfig(rank=2, targets=targets))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, lora: LoraConfig | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = made(kind, lora=lora, gradient_checkpointing=checkpointing).eval()
        if kind == "llama":
            model.train()  # llama has no dropout here; checkpointing is on in training mode only
        hidden_rows(model, batch()).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert any(bool(grad.any()) for grad in found.values())
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)


def test_checkpointing_is_really_on() -> None:
    assert unwrap(made("llama", gradient_checkpointing=True)).is_gradient_checkpointing
    assert not unwrap(made("llama")).is_gradient_checkpointing


def test_a_head_of_another_height_takes_the_shared_ids_alone() -> None:
    tall = load_student(
        StudentConfig(from_config={"model_type": "llama", **WIDE, "vocab_size": tiny.VOCAB + 7}),
        Ids(),
        None,
        0,
    ).eval()
    inputs = batch()
    with torch.no_grad():
        ours = head_of(tall, vocab=tiny.VOCAB).logits(hidden_rows(tall, inputs))
        torch.testing.assert_close(ours, logits(tall, inputs)[:, : tiny.VOCAB])


def test_an_architecture_with_an_unknown_change_of_logits_is_refused() -> None:
    model = made("llama")
    plain = model.forward

    def doubled(**inputs: Any) -> Any:
        output = plain(**inputs)
        output.logits = 2 * output.logits
        return output

    check_head(model)
    model.forward = doubled
    with pytest.raises(ModelError, match="LlamaForCausalLM changes its logits after the head"):
        check_head(model)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "does not exist. A model path is a folder with config.json and weights, or a hub name"),
        ("nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("{file}", "is a file, not a folder"),
        ("{empty}", "is not a model folder. It has no config.json"),
        ("{packed}", "It holds GGUF: set gguf_file: small.gguf"),
        ("{packed}/small.gguf", r"Name its folder as path .*: \{path: .*packed, gguf_file: small.gguf\}"),
        ("{broken}", "no causal language model could be loaded"),
    ],
)
def test_a_wrong_path_is_explained(path: str, message: str, tmp_path: Path) -> None:
    places = {"file": tmp_path / "model.bin", "empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    places["file"].write_bytes(b"x")
    places["empty"].mkdir()
    places["broken"].mkdir()
    places["packed"] = tmp_path / "packed"
    places["packed"].mkdir()
    (places["packed"] / "small.gguf").write_bytes(b"GGUF")
    (places["broken"] / "config.json").write_text(json.dumps({"model_type": "nothing-of-the-kind"}))
    with pytest.raises(ModelError, match=message):
        load_teacher(TeacherModel(path=path.format(**{name: str(place) for name, place in places.items()})))


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(EnvironmentFault, match="pip install no_such_package"):
        load_teacher(TeacherModel(path="package:no_such_package/model"))


def test_a_folder_without_a_tokenizer_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded.*It has no config.json"):
        load_tokenizer(TeacherModel(path=str(tmp_path)))
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded.*set gguf_file: small.gguf"):
        load_tokenizer(TeacherModel(path=str(tmp_path)))


def test_a_saved_teacher_is_frozen_and_says_the_same(tmp_path: Path) -> None:
    model = made("gemma2").eval()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    teacher = load_teacher(TeacherModel(path=str(tmp_path)))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.no_grad():
        assert torch.equal(logits(teacher, batch()), logits(model, batch()))


def test_an_adapter_is_merged_into_the_teacher(tmp_path: Path) -> None:
    base = made("llama").eval()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tuned = made("llama", lora=LoraConfig(rank=2, targets=("q_proj",))).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    teacher = load_teacher(TeacherModel(path=str(tmp_path / "base"), adapter=str(tmp_path / "adapter")))
    with torch.no_grad():
        torch.testing.assert_close(logits(teacher, batch()), logits(tuned, batch()), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(logits(teacher, batch()), logits(base, batch()), atol=1e-3)


@pytest.mark.needs_shared
def test_tokenizers_are_the_same_or_refused() -> None:
    stories = load_tokenizer(TeacherModel(path=str(shared() / "data/models/stories260k")))
    gpt2 = load_tokenizer(TeacherModel(path=str(shared() / "data/tokenizers/gpt2")))
    assert gpt2.pad_token_id == gpt2.eos_token_id
    assert check_same_tokenizer(stories, stories) == len(stories)
    with pytest.raises(ModelError, match=r"different tokenizers: .* of the student's 512 tokens"):
        check_same_tokenizer(stories, gpt2)
    with pytest.raises(ModelError, match="from_teacher"):
        check_same_tokenizer(gpt2, stories)


@pytest.mark.needs_shared
def test_a_published_model_loads_and_its_end_token_is_known() -> None:
    config = TeacherModel(path=str(shared() / "data/models/stories260k"))
    teacher, tokenizer = load_teacher(config), load_tokenizer(config)
    assert teacher.config.vocab_size == len(tokenizer) == 512
    assert tokenizer.eos_token_id is not None


def test_a_transformers_that_asks_less_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is switched off in a forward pass without a mask has other names in other versions."""
    from stillhouse.models import hidden

    monkeypatch.delattr("transformers.PreTrainedModel.warn_if_padding_and_no_attention_mask")
    with hidden._without_host_syncs():
        pass
