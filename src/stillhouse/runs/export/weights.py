"""The student as others load it: weights, tokenizer and a card that says how it came to be."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from stillhouse.files import atomic, os_errors_as_faults
from stillhouse.report import load_run
from stillhouse.runs.build import Parts
from stillhouse.runs.export.card import model_card
from stillhouse.runs.folder import RunFolder
from stillhouse.train.checkpoints import replace_folder


def export(parts: Parts, folder: RunFolder) -> None:
    """Write the student into the run folder; adapters are merged unless the configuration keeps them apart.

    With `train.keep: best` the best weights are put into the student first.
    """
    if parts.config.train.keep == "best" and (folder.best / "weights.pt").exists():
        parts.student.load_state_dict(torch.load(folder.best / "weights.pt", weights_only=True))
    fresh = folder.path / ".student.new"
    shutil.rmtree(fresh, ignore_errors=True)
    with os_errors_as_faults(folder.student):
        merged(parts).save_pretrained(fresh)
        parts.tokenizer.save_pretrained(fresh)
        model_card(parts.config, load_run(folder.path, responses=False)).save(fresh / "README.md")
    replace_folder(fresh, folder.student)


def merged(parts: Parts) -> Any:
    """The model to save. Merging works on a copy, so the student in memory stays as it is."""
    lora = parts.config.student.lora
    if lora is None or not lora.merge:
        return parts.student
    import copy

    return copy.deepcopy(parts.student).merge_and_unload()  # type: ignore[operator]


def write_card(parts: Parts, folder: RunFolder) -> None:
    """Write the student's card anew, with what the run folder holds by now."""
    if folder.main:
        with atomic(folder.student / "README.md") as handle:
            handle.write(model_card(parts.config, load_run(folder.path, responses=False)).content)
