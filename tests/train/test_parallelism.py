"""What is asked for and not active is an error, in words; on this machine that is all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT
from tests.devices import WITHOUT_GPU

SCRIPT = """
import sys
from tests import tiny
from transformers import TrainingArguments
from stillhouse.errors import EnvironmentFault
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig, FixedPolicy
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step
from stillhouse.train.trainer import StepTrainer

more = {"fsdp": "full_shard", "fsdp_config": {"version": 2}} if "argument" in sys.argv else {}
arguments = TrainingArguments(sys.argv[1], use_cpu=True, report_to=[], remove_unused_columns=False, **more)
teachers = {"main": LiveTeacher(tiny.model(7), tiny.VOCAB)}
step = Step(Method(FixedConfig(), build("forward_kl"), "token"), FixedPolicy(), teachers, 0, tiny.VOCAB)
try:
    StepTrainer(step=step, model=tiny.model(1), args=arguments, train_dataset=tiny.prompts(4))
except EnvironmentFault as error:
    print("refused:", error)
else:
    print("trains")
"""


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "refused: ACCELERATE_USE_FSDP asks for FSDP"),
        ({"argument": "fsdp"}, "refused: train.hf.fsdp asks for FSDP, and this is a single process"),
    ],
)
def test_sharding_that_accelerate_leaves_out_is_refused(
    asked: dict[str, str], words: str, tmp_path: Path
) -> None:
    environment = {**os.environ, **WITHOUT_GPU, **asked, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *(["argument"] if "argument" in asked else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert words in done.stdout, done.stderr[-2000:]
