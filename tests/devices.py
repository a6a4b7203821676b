"""A test's runs go to the machine's GPU, if it has one; what is equal to the bit on a CPU is near there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""The environment of a process that runs on the CPU, such as one of two beside a single GPU."""


def same(values: Any) -> Any:
    """Compares equal to the same numbers of another run: to the bit on a CPU. On a GPU the order in which
    attention adds up its gradients differs from run to run."""
    return pytest.approx(values, rel=1e-4, abs=1e-6) if torch.cuda.is_available() else values


def same_tensors(one: torch.Tensor, other: torch.Tensor) -> bool:
    """As `same`."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    near = torch.cuda.is_available() and one.is_floating_point()
    return torch.allclose(one.cpu(), other.cpu(), rtol=1e-3, atol=1e-5) if near else torch.equal(one, other)
