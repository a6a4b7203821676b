"""ONNX folders answer in ONNX Runtime as the model does in transformers, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.repocard import metadata_load
from transformers import AutoModelForCausalLM

from stillhouse.errors import ModelError
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.targets import export_student
from tests.runs.test_export_gguf import HEADS, ROW, SMALL, make

LLAMA = {"model_type": "llama", **SMALL, **HEADS, "num_hidden_layers": 1}


def test_a_folder_answers_in_onnx_runtime_with_any_batch_and_cache(tmp_path: Path) -> None:
    import onnxruntime

    source = make(tmp_path / "model", LLAMA)
    folder = export_student(source, ExportConfig(to="onnx", prompt=ROW, max_tokens=12), tmp_path / "shipped")
    found = {path.name for path in folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "README.md", "smoke_test.py", "config.json"} <= found
    assert {"generation_config.json", "tokenizer.json"} <= found
    assert metadata_load(folder / "README.md")["library_name"] == "onnx", "also where there was no card"
    assert not [name for name in found if name.endswith((".safetensors", ".bin"))]
    assert b".py" not in (folder / "model.onnx").read_bytes(), "stack traces, with paths of the machine"
    assert str(tmp_path) not in "".join(path.read_text("utf-8") for path in folder.glob("*.json"))

    tokens = torch.randint(2, 200, (3, 9))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(tokens).logits.numpy()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [value.name.replace("output.", "input.", 1) for value in session.get_outputs()[1:]]
    assert len(names) == 2
    cache = [np.zeros((3, HEADS["num_key_value_heads"], 0, HEADS["head_dim"]), np.float32)] * 2
    for start, end in ((0, 1), (1, 6), (6, 7), (7, 9)):  # one token and several, with and without a cache
        positions = np.arange(start, end)[None].repeat(3, 0)
        feeds = {"input_ids": tokens[:, start:end].numpy(), "position_ids": positions}
        logits, *cache = session.run(None, feeds | dict(zip(names, cache, strict=True)))
        np.testing.assert_allclose(logits, expected[:, start:end], rtol=1e-3, atol=1e-3)


def test_another_state_or_dtype_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "model", {**LLAMA, "model_type": "mistral", "sliding_window": 16})
    with pytest.raises(ModelError, match="MistralForCausalLM is another"):
        export_student(source, ExportConfig(to="onnx", prompt=ROW, max_tokens=2), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="dtype bfloat16 is not written to ONNX"):
        ExportConfig(to="onnx", dtype="bfloat16")
