"""Shared by all tests: one thread per process, no network, and the reference data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


def shared() -> Path:
    """The folder of reference data: STILLHOUSE_SHARED, or `shared` beside the checkout."""
    return Path(os.environ.get("STILLHOUSE_SHARED", ROOT.parent / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shared().is_dir():
        return
    skip = pytest.mark.skip(reason="the reference data (STILLHOUSE_SHARED) is not on this machine")
    for item in items:
        if "needs_shared" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
