"""Where one process of a command dies, the others say which, and not what gloo says of its socket."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from stillhouse.core.lost_peers import lost_peers_as_faults
from stillhouse.core.other_processes import OtherProcesses
from stillhouse.errors import EnvironmentFault
from tests.children import ranks


def _waits_for_a_dead_one(said: Path) -> None:
    import torch.distributed as dist

    OtherProcesses.join()
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with lost_peers_as_faults():
            dist.barrier()
    except EnvironmentFault as fault:
        said.write_text(str(fault), encoding="utf-8")
    os._exit(0)


def test_a_collective_operation_names_the_process_that_died(tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert ranks(2, _waits_for_a_dead_one, said, seconds=100) == [0, -signal.SIGKILL]
    assert "process 1 of 2" in said.read_text(encoding="utf-8")
    assert "has died" in said.read_text(encoding="utf-8")
