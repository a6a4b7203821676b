"""Two real processes (gloo) train as one does: same weights, although their token counts differ."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from tests.conftest import ROOT

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests import tiny
from transformers import TrainingArguments
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig
from stillhouse.rollouts.fixed import FixedPolicy
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step
from stillhouse.train.trainer import StepTrainer, Ranks

folder, accumulation, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
arguments = TrainingArguments(
    output_dir=str(folder), max_steps=4, per_device_train_batch_size=6 if tokens else 3,
    gradient_accumulation_steps=accumulation,
    learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.5, use_cpu=True, report_to=[],
    save_strategy="no", remove_unused_columns=False, disable_tqdm=True, seed=5, optim="sgd",
)
student, teacher = tiny.model(1, dtype=torch.float64), tiny.model(7, width=24, dtype=torch.float64)
step = Step(
    Method(FixedConfig(), build("forward_kl"), "token"), FixedPolicy(),
    {"main": LiveTeacher(teacher, tiny.VOCAB)},
    0, tiny.VOCAB, world=Ranks(arguments.world_size, arguments.device),
    micro_batch_tokens=tokens or None,
)
trainer = StepTrainer(step=step, model=student, args=arguments, train_dataset=tiny.prompts(48))
trainer.train()
if arguments.process_index == 0:
    torch.save(student.state_dict(), folder / "weights.pt")
"""


def launch(
    folder: Path, ranks: int, accumulation: int, tokens: int = 0, code: str = SCRIPT
) -> dict[str, torch.Tensor]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(ranks):
        distributed = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment = {
            **os.environ,
            **(distributed if ranks > 1 else {}),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, str(script), str(folder), str(accumulation), str(tokens)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=180)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(one[-3000:] for one in errors)
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return weights


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    alone = launch(tmp_path / "one", ranks=1, accumulation=4)
    together = launch(tmp_path / "two", ranks=2, accumulation=2)
    by_tokens = launch(tmp_path / "tokens", ranks=2, accumulation=1, tokens=30)
    moved = max((alone[name] - start).abs().max().item() for name, start in _start().items())
    assert moved > 1e-3
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(by_tokens[name], expected, rtol=1e-9, atol=1e-11)


def _start() -> dict[str, torch.Tensor]:
    from tests import tiny

    return dict(tiny.model(1, dtype=torch.float64).state_dict())
