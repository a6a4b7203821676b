"""The fused loss over two processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_ddp_and_a_sharded_head_give_the_gradient_of_one_process() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__).with_name("ranks.py"))
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), port], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
