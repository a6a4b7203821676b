"""A script for TRL runs with its import changed, and trains the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from tests.children import run_script
from tests.conftest import ROOT

SCRIPT = (ROOT / "examples" / "trl_gkd.py").read_text(encoding="utf-8")
THEIRS = "from trl.experimental.gkd import GKDConfig, GKDTrainer"
OURS = "from stillhouse.trl import GKDConfig, GKDTrainer"
HISTORY = "\nimport json\njson.dump(trainer.state.log_history, open('history.json', 'w'))\n"

ON_POLICY = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

rows = [{"prompt": [{"role": "user", "content": f"Name {n} fruits."}]} for n in range(8)]
trainer = DistillationTrainer(
    model=AutoModelForCausalLM.from_pretrained("MODELS/student"),
    teacher_model="MODELS/teacher",
    args=DistillationConfig(
        output_dir="out", max_completion_length=6, per_device_train_batch_size=4, max_steps=2,
        logging_steps=1, bf16=False, gradient_checkpointing=False, learning_rate=1e-3, use_cpu=True,
        report_to="none", use_vllm=False, log_completions=False, top_p=0.9,
    ),
    train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained("MODELS/teacher"),
)
trainer.train()
"""


def run(folder: Path, text: str, *arguments: str) -> Path:
    folder.mkdir()
    (folder / "script.py").write_text(text + HISTORY, encoding="utf-8")
    done = run_script(folder / "script.py", *arguments, folder=folder, env={"TRL_EXPERIMENTAL_SILENCE": "1"})
    assert done.code == 0, done.err[-3000:]
    return folder


def losses(folder: Path) -> list[float]:
    import json

    rows = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in rows if "loss" in row]


def test_a_script_for_gkd_trains_the_same_with_the_import_changed(models: Path, tmp_path: Path) -> None:
    assert SCRIPT.count(THEIRS) == 1
    assert OURS in SCRIPT, "the script says what to change"
    arguments = (str(models / "student"), str(models / "teacher"), str(models / "rows.jsonl"))
    theirs = run(tmp_path / "theirs", SCRIPT, *arguments)
    ours = run(tmp_path / "ours", SCRIPT.replace(THEIRS, OURS), *arguments)
    assert len(losses(ours)) == 4
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    start = load_file(models / "student" / "model.safetensors")
    one, other = (load_file(folder / "gkd" / "model.safetensors") for folder in (theirs, ours))
    moved = torch.cat([(one[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(one[name] - other[name]).flatten() for name in start])
    assert apart.norm() < 1e-3 * moved.norm()


def test_a_script_for_the_distillation_trainer_runs(models: Path, tmp_path: Path) -> None:
    text = ON_POLICY.replace("from trl import", "from stillhouse.trl import").replace("MODELS", str(models))
    folder = run(tmp_path / "ours", text)
    found = losses(folder)
    assert len(found) == 2
    assert all(value > 0 for value in found)
    assert get_last_checkpoint(str(folder / "out")) is not None
