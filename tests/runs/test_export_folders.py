"""`stillhouse export`: folders that others load without Stillhouse, whole and tested, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.errors import ConfigError, EngineError, ModelError
from stillhouse.models import TeacherModel, load_teacher
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.smoke_test import run_smoke_test
from stillhouse.runs.export.targets import export_student
from tests.runs.test_exported_student import STARTS, distil, logits
from tests.small_runs import TEACHER

UNTESTED = ExportConfig(smoke_test=False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a pruned student whose adapter stands beside its base."""
    folder = tmp_path_factory.mktemp("export")
    return distil(folder, "apart", {**STARTS["pruned"], "lora": {"rank": 4, "merge": False}})


def test_a_folder_is_whole_merged_and_answers_as_recorded(adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = export_student(adapter, ExportConfig(max_tokens=8), tmp_path / "shipped")
    assert not list(folder.glob("adapter*"))
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(folder).eval()),
        logits(load_teacher(TeacherModel(path=str(adapter)))),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    turns = [{"role": "user", "content": "A fruit?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "A fruit?\n"
    card = (folder / "README.md").read_text("utf-8")
    assert card.count("\n## Export\n") == card.count("\n## Licences\n") == 1
    assert "python smoke_test.py" in card
    _roll_weights(folder)  # its smoke test has passed; with other weights it must not
    with pytest.raises(EngineError, match="smoke test failed: expected"):
        run_smoke_test(folder)


def _roll_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.roll(value, 1, -1) for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def test_a_dtype_and_a_question_are_taken(tmp_path: Path) -> None:
    config = ExportConfig(dtype="bfloat16", prompt="A fruit?", max_tokens=4, smoke_test=False)
    folder = export_student(Path(TEACHER), config, tmp_path / "shipped")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert "A fruit?" in (folder / "smoke_test.py").read_text("utf-8")


def test_what_is_there_stays_and_what_fails_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export_student(adapter, UNTESTED, tmp_path / "kept")
    with pytest.raises(ModelError, match="does not exist"):
        export_student(tmp_path / "none", UNTESTED, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"kept"}
