"""After an interruption a user is told the command that starts as many processes again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.core.launcher import launcher_words, start_again

RUN = ["run", "run.yaml", "train.seed=1"]
BIN = "/opt/python/bin"
STARTED = {
    "torchrun --nproc_per_node 2 -m stillhouse": [
        f"{BIN}/python3.11", f"{BIN}/torchrun", "--nproc_per_node", "2", "-m", "stillhouse",
    ],
    "accelerate launch --config_file a.yaml -m stillhouse": [
        f"{BIN}/python", f"{BIN}/accelerate", "launch", "--config_file", "a.yaml", "-m", "stillhouse",
    ],
    "python -m torch.distributed.run --nproc-per-node=8 -m stillhouse": [
        f"{BIN}/python", "-m", "torch.distributed.run", "--nproc-per-node=8", "-m", "stillhouse",
    ],
    "torchrun --no-python stillhouse": ["torchrun", "--no-python", "stillhouse"],
}  # fmt: skip


@pytest.mark.parametrize("words", STARTED)
def test_the_launcher_s_own_words_are_those_before_the_command(words: str) -> None:
    assert launcher_words([*STARTED[words], *RUN], RUN) == words.split()


@pytest.mark.parametrize(
    "above",
    [
        [],
        ["bash", "start.sh", *RUN],
        ["slurmstepd: [17.0]"],
        [f"{BIN}/python", f"{BIN}/torchrun", "other.py"],
    ],
)
def test_another_parent_is_no_launcher(above: list[str]) -> None:
    assert launcher_words(above, RUN) is None


def test_a_started_process_knows_its_launcher(tmp_path: Path) -> None:
    launcher, script = tmp_path / "torchrun", tmp_path / "train.py"
    launcher.write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[3:]], check=True)\n"
    )
    script.write_text(
        "from stillhouse.core.launcher import start_again\nprint(start_again(['run', 'a b.yaml']))"
    )
    said = {}
    for nodes in ("1", "2"):
        env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": nodes}
        words = [sys.executable, launcher, "--nproc_per_node", "2", script, *RUN]
        said[nodes] = subprocess.run(
            words, env=env, capture_output=True, text=True, check=True
        ).stdout.strip()
    command = f"torchrun --nproc_per_node 2 {script} run 'a b.yaml'"
    assert said == {"1": command, "2": f"(on every machine with the launcher's options there) {command}"}


def test_a_started_process_knows_the_options_of_its_launcher(tmp_path: Path) -> None:
    """Those of the launcher, not of its own."""
    launcher, script = tmp_path / "accelerate", tmp_path / "train.py"
    launcher.write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[4:]], check=True)\n"
    )
    script.write_text(
        "from stillhouse.core.launcher import launched_with\n"
        "print([launched_with(one) for one in ('parallelism_config_', 'num_', 'own')])"
    )
    words = ["launch", "--parallelism-config-dp-shard-size", "2", script, "run", "--own"]
    said = subprocess.run([sys.executable, launcher, *words], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[True, False, False]"


def test_without_a_launcher_the_number_of_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_again(RUN) == "stillhouse run run.yaml train.seed=1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 processes" in start_again(RUN)
    assert start_again(RUN).endswith("stillhouse run run.yaml train.seed=1")
