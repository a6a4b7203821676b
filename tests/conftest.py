"""Shared by all tests: one thread per process, no network, and the reference data beside the checkout."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("STILLHOUSE_TEST_DEVICE") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a GPU
if not Path("/dev/nvidiactl").exists():  # Triton decides when it is imported: kernels run on tensors of a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell without job control starts what is in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def shared() -> Path:
    """The folder of reference data: STILLHOUSE_SHARED, or `shared` beside the checkout."""
    return Path(os.environ.get("STILLHOUSE_SHARED", ROOT.parent / "shared"))


def script(path: Path) -> ModuleType:
    """A Python file outside the package, such as an example, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as for `python FILE`: it may import its neighbours
        spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shared().is_dir():
        return
    skip = pytest.mark.skip(reason="the reference data (STILLHOUSE_SHARED) is not on this machine")
    for item in items:
        if "needs_shared" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Objects of modules and of tests stay: each run's garbage collection would visit all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def llama_server() -> Iterator[str]:
    """The URL of llama.cpp's server with SmolLM2-135M, called "smollm2"."""
    from tests.servers import llama_cpp

    with llama_cpp() as url:
        yield url


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
