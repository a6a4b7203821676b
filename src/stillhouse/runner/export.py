"""The student as others load it: weights, tokenizer and a card that says how it came to be."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from stillhouse import __version__
from stillhouse.files import told
from stillhouse.runner.assemble import Parts
from stillhouse.runner.folder import RunFolder
from stillhouse.train.checkpoints import replace_folder


def export(parts: Parts, folder: RunFolder) -> None:
    """Write the student into the run folder; adapters are merged unless the configuration keeps them apart.

    With `train.keep: best` the best weights are put into the student first.
    """
    if parts.config.train.keep == "best" and (folder.best / "weights.pt").exists():
        parts.student.load_state_dict(torch.load(folder.best / "weights.pt", weights_only=True))
    fresh = folder.path / ".student.new"
    shutil.rmtree(fresh, ignore_errors=True)
    with told(folder.student):
        merged(parts).save_pretrained(fresh)
        parts.tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card(parts), encoding="utf-8")
    replace_folder(fresh, folder.student)


def merged(parts: Parts) -> Any:
    """The model to save. Merging works on a copy, so the student in memory stays as it is."""
    lora = parts.config.student.lora
    if lora is None or not lora.merge:
        return parts.student
    import copy

    return copy.deepcopy(parts.student).merge_and_unload()  # type: ignore[operator]


def card(parts: Parts) -> str:
    """A model card in Markdown."""
    config = parts.config
    teacher = getattr(config.teacher, "path", "none")
    start = config.student.path or (
        "layers of the teacher" if config.student.from_teacher else "random weights"
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [distillation, stillhouse]",
            "---",
            "",
            f"# {config.name}",
            "",
            f"Distilled with Stillhouse {__version__}.",
            "",
            f"- method: {config.recipe or config.objective.name} (objective `{config.objective.name}`, "
            f"responses `{config.responses.kind}`)",
            f"- teacher: `{teacher}`",
            f"- student started from: `{start}`",
            f"- data: `{config.data.train.path}`",
            f"- seed: {config.train.seed}",
            "",
            "The licences of teacher, student and data apply to this model too; "
            "check them before you pass it on.",
            "",
        ]
    )
