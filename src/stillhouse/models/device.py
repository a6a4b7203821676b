"""Where the models of this process are."""

from __future__ import annotations

import os

import torch


def own_device() -> torch.device:
    """The GPU of this process, the one that the trainer takes too; the CPU where there is none.

    Of several processes on a machine (torchrun) each has its own.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
    torch.cuda.set_device(device)
    return device
