"""examples/distil.ipynb runs from top to bottom in a fresh kernel and shows curves."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tests.conftest import ROOT

NOTEBOOK = ROOT / "examples" / "distil.ipynb"


def test_the_notebook_runs_and_shows_curves(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    fresh = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    for outputs in (stored, fresh):
        assert any("image/png" in one.get("data", {}) for cell in outputs for one in cell), "no curves"
        assert not [one for cell in outputs for one in cell if one.output_type == "error"]
    texts = [
        one.text for cell in fresh for one in cell if one.output_type == "stream" and one.name == "stdout"
    ]
    assert "teacher: " in "".join(texts)
    assert "kd: " in "".join(texts)
