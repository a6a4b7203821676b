"""Which implementation computes values and gradients of the loss over the head."""

from __future__ import annotations

import functools
import os
from typing import Literal

import torch

from stillhouse.errors import EnvironmentFault

Backend = Literal["auto", "triton", "closed_form", "compile"]
OLDEST_TRITON = (3, 4)
"""The oldest that the kernels were compiled with (3.4, 3.6 and 3.9 were); torch 2.8 brings it along."""


def uses_triton(backend: Backend, device: torch.device) -> bool:
    """Whether objectives that state a kernel form go through the Triton template on this device.

    Raises:
        EnvironmentFault: Triton is asked for and cannot run here.
    """
    if backend == "triton":
        check_available(backend, device.type)
        return True
    return backend == "auto" and device.type == "cuda" and without_triton() is None


def check_available(backend: Backend, device: str | None = None) -> None:
    """Refuse a backend that cannot run on a device; by default on the one that a run would take.

    Raises:
        EnvironmentFault: Triton is asked for and not installed, or there is no GPU.
    """
    if backend != "triton":
        return
    if (problem := without_triton()) is not None:
        raise EnvironmentFault(
            f"train.fused.backend: triton: {problem}. Install it with: pip install 'stillhouse[triton]' "
            "(torch for CUDA brings it along), or set train.fused.backend: auto."
        )
    found = "torch sees none" if device is None else f"the tensors are on {device}"
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda" and not interpreted():
        raise EnvironmentFault(
            f"train.fused.backend: triton needs a CUDA GPU, and {found}. Set "
            "train.fused.backend: auto, which takes the closed forms there. (To try the kernels without a "
            "GPU, slowly, set the environment variable TRITON_INTERPRET=1.)"
        )


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on tensors of a CPU; decided when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def without_triton() -> str | None:
    """Why Triton is not to be had; None if it is."""
    try:
        import triton
    except ImportError:
        return "the package triton is not installed"
    found = triton.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {found} is too old, {'.'.join(map(str, OLDEST_TRITON))} is needed"
    return None
