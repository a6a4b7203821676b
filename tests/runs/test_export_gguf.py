"""GGUF files answer in llama.cpp word for word as the model does in transformers, or are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stillhouse.errors import EngineError, ModelError
from stillhouse.files import locate
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.llama_cpp.file import answer_of, serving, write_file
from stillhouse.runs.export.llama_cpp.folder import compared
from stillhouse.runs.export.llama_cpp.vocabulary import SPLITS
from stillhouse.runs.export.student import read_student
from stillhouse.runs.export.targets import export_student
from tests.runs.test_exported_student import STARTS, distil
from tests.small_runs import TEACHER

ROW = "name[Cocum], eatType[coffee shop], food[Chinese], area[riverside]"
TURNS = (
    "{% for message in messages %}<pad>{{ message['role'] }}: {{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant:{% endif %}"
)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 256}
SCALED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, **HEADS, "tie_word_embeddings": False, "attention_bias": True},
    "llama3": {
        "model_type": "llama", **SMALL, **HEADS, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **SCALED},
    },
    "mistral": {"model_type": "mistral", **SMALL, **HEADS},
    "qwen2": {"model_type": "qwen2", **SMALL, **HEADS, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SMALL, **HEADS},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {
        "model_type": "gpt_neox", **SMALL, "num_attention_heads": 4, "rotary_pct": 0.25,
        "hidden_act": "gelu_pytorch_tanh",
    },
}  # fmt: skip
"""Each family that is written: with few heads for keys, biases, a head of its own or a tied one."""


def make(folder: Path, options: dict[str, Any], template: str | None = None) -> Path:
    """A model of random weights, spread so that its greedy choices are clear, with the demo's tokenizer."""
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(locate(TEACHER))
    tokenizer.chat_template = template
    rest = {
        "vocab_size": len(tokenizer) + 8,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
        **options,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(rest.pop("model_type"), **rest))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)  # an untrained bias is 0, and a wrong layout would not be seen
        for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            rows[len(tokenizer) :] = 0  # rows without a token, as many models have them
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_family_answers_word_for_word(name: str, tmp_path: Path) -> None:
    config = ExportConfig(to="gguf", prompt=ROW, max_tokens=24)
    student = read_student(make(tmp_path, MODELS[name]), config)
    write_file(student, "float32", tmp_path / "it.gguf")
    assert answer_of(tmp_path / "it.gguf", student.example) == student.example.answer
    assert len(student.example.answer) > 10


@pytest.mark.needs_shared
def test_a_sentencepiece_tokenizer_answers_word_for_word(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260k"
    config = ExportConfig(
        to="gguf", prompt="Once upon a time, there was a boy named\n\nTim é.", max_tokens=40
    )
    student = read_student(source, config)
    write_file(student, "float32", tmp_path / "it.gguf")
    answer = answer_of(tmp_path / "it.gguf", student.example)
    assert answer.strip() == student.example.answer.strip()
    assert len(answer.split()) > 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pruned student keeps its adapter beside it; its template is no chat template."""
    folder = tmp_path_factory.mktemp("gguf")
    return distil(folder, "apart", {**STARTS["pruned"], "lora": {"rank": 4, "merge": False}})


def test_a_run_leaves_a_folder_that_llama_cpp_answers_from(run: Path, tmp_path: Path) -> None:
    folder = export_student(run, ExportConfig(to="gguf", max_tokens=12), tmp_path / "shipped")
    found = {path.name for path in folder.iterdir()}
    assert found == {"apart-F32.gguf", "README.md", "smoke_test.py", "stillhouse.json"}
    card = (folder / "README.md").read_text("utf-8")
    assert "llama-server -m apart-F32.gguf" in card
    assert "word for word" in card
    assert metadata_load(folder / "README.md")["library_name"] == "gguf"
    assert "from_pretrained(folder" not in card, "the usage of another format"


@pytest.mark.parametrize("template", [None, TURNS])
def test_the_chat_template_of_the_file_gives_the_prompt_of_the_training(
    run: Path, tmp_path: Path, template: str | None
) -> None:
    """Through llama.cpp's own rendering, for a chat template and for one of single questions."""
    source = run if template is None else make(tmp_path / "chat", MODELS["llama"], template)
    student = read_student(source, ExportConfig(to="gguf", prompt=ROW, max_tokens=4))
    write_file(student, "float32", tmp_path / "it.gguf")
    with serving(tmp_path / "it.gguf", 256) as post:
        asked = {"messages": [{"role": "user", "content": ROW}]}
        assert post("/apply-template", asked)["prompt"] == student.example.prompt


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "q8_0"])
def test_fewer_bits_answer_too(dtype: str, tmp_path: Path) -> None:
    config = ExportConfig(to="gguf", dtype=dtype, prompt=ROW, max_tokens=16)
    student = read_student(Path(TEACHER), config)
    write_file(student, dtype, tmp_path / "it.gguf")
    assert (tmp_path / "it.gguf").stat().st_size < 2.2 * student.parameters + 200_000
    compared(student.example.answer.strip(), answer_of(tmp_path / "it.gguf", student.example).strip(), dtype)


def test_another_text_is_refused_and_fewer_bits_are_told() -> None:
    assert "word for word (2 words)" in compared("A fig", "A fig", "float32")
    assert "the first 1 words" in compared("A fig", "A fruit", "q8_0")
    with pytest.raises(EngineError, match="otherwise than transformers"):
        compared("A fig", "A fruit", "float32")
    with pytest.raises(EngineError, match="otherwise than transformers"):
        compared("A fig", "Nothing", "q8_0")


def test_what_llama_cpp_cannot_carry_is_refused_by_name(tmp_path: Path) -> None:
    unknown = {
        "model_type": "opt",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "ffn_dim": 32,
        "num_attention_heads": 2,
    }
    relu = {**MODELS["llama"], "hidden_act": "relu"}
    for name, options, words in (("opt", unknown, "OPTForCausalLM"), ("relu", relu, "the activation relu")):
        source = make(tmp_path / name, options)
        with pytest.raises(ModelError, match=words):
            export_student(source, ExportConfig(to="gguf"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    tokenizer = tmp_path / "relu" / "tokenizer.json"
    shutil.copytree(make(tmp_path / "split", MODELS["llama"]), tmp_path / "other")
    rules = json.loads(tokenizer.read_text("utf-8"))
    rules["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Whitespace"}, rules["pre_tokenizer"]],
    }
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
    with pytest.raises(ModelError, match="splits text by a rule"):
        export_student(tmp_path / "other", ExportConfig(to="gguf"), tmp_path / "none")


def test_types_of_llama_cpp_are_named_with_its_tool() -> None:
    with pytest.raises(ValueError, match="llama-quantize FILE"):
        ExportConfig.model_validate({"to": "gguf", "dtype": "q4_k_m"})
    with pytest.raises(ValueError, match="q8_0 is GGUF's"):
        ExportConfig(dtype="q8_0")


TRICKY = "I've 3 33 3333 words, DON'T\n\n\n  you?  \t Größe—naïve 東京 🙂!!\n x_1=2;  "


@pytest.mark.parametrize("splits", SPLITS, ids=SPLITS.values())
def test_a_text_has_the_same_tokens_in_llama_cpp(splits: Any, tmp_path: Path) -> None:
    """Whatever the rule by which a tokenizer splits text, with the demo's merges."""
    source = make(tmp_path, MODELS["llama"])
    rules = json.loads((source / "tokenizer.json").read_text("utf-8"))
    made = {
        "bytes": lambda value: {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": value,
        },
        "digits": lambda value: {"type": "Digits", "individual_digits": value},
        "split": lambda value: {
            "type": "Split", "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False,
        },
    }  # fmt: skip
    rules["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [made[kind](value) for kind, value in splits],
    }
    rules["model"]["ignore_merges"] = SPLITS[splits] == "llama-bpe"
    (source / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
    student = read_student(source, ExportConfig(to="gguf", prompt=ROW, max_tokens=1))
    write_file(student, "float32", tmp_path / "it.gguf")
    with serving(tmp_path / "it.gguf", 256) as post:
        found = post("/tokenize", {"content": TRICKY, "add_special": True, "parse_special": True})["tokens"]
    assert found == student.tokenizer(TRICKY)["input_ids"]
