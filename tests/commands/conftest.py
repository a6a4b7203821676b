"""The workshop: tiny models made once, a fresh folder for each test, which is the working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workshop import Workshop, make_models, make_workshop


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture
def workshop(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Workshop:
    make_workshop(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    # What the command sets for itself must not stay for other tests.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "error" if name == "TRANSFORMERS_VERBOSITY" else "1")
    return Workshop(tmp_path, capsys)
