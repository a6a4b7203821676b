"""The preference stage of a run: from the distilled student to the one that is exported, in the same folder.

RUN/preference has its checkpoints, its metrics and the weights that it began with. These are written once,
when the distillation has come to its end; a resumed run that finds them goes on with the stage.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from stillhouse import recipes
from stillhouse.models import unwrap
from stillhouse.models.adapters import merged_copy, restore_state, save_state
from stillhouse.objectives import REGISTRY as OBJECTIVES
from stillhouse.rollouts import REGISTRY as RESPONSES
from stillhouse.runs.build import Parts
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.training_arguments import training_arguments
from stillhouse.train import checkpoints
from stillhouse.train.config import TrainConfig
from stillhouse.train.interrupt import Interrupt
from stillhouse.train.preference import PreferenceStage, StageTraining
from stillhouse.train.stage_callbacks import LibraryStep, StageLog, StageProgress, StageSaver
from stillhouse.train.trainer import Ranks, steps_in_all, steps_in_epoch

FOLDER = "preference"
_SHARED = (
    "epochs", "max_steps", "batch_size", "micro_batch_size", "lr", "schedule", "warmup", "weight_decay",
    "clip", "log_every", "save_every", "keep_checkpoints",
)  # fmt: skip
"""Settings that a stage and `train` have in common."""

Train = Callable[[Parts, RunFolder, Interrupt, Path | None], bool]


class StageFolder(RunFolder):
    """The part of a run folder that a stage writes; what it notes goes into the state of the run."""

    def __init__(self, run: RunFolder) -> None:
        """The stage's folder below that of its run."""
        super().__init__(run.path / FOLDER, run.main)
        self.run = run
        self.start_weights = self.path / "start"
        """The weights that the stage begins with."""

    @property
    def began(self) -> bool:
        """Whether the distillation before it has come to its end."""
        return (self.start_weights / "weights.pt").is_file()

    def note(self, **facts: Any) -> None:
        """Add facts to the state of the run."""
        known = self.run.saved_state().get(FOLDER, {})
        self.run.note(**{FOLDER: {**known, **facts}})


def stage_of(config: RunConfig) -> PreferenceStage:
    """The stage of a run that has one."""
    assert config.preference is not None
    stage: PreferenceStage = config.preference
    return stage


def stage_config(config: RunConfig) -> RunConfig:
    """The configuration of the stage as a run of its own: its recipe's loss on its pairs."""
    stage = stage_of(config)
    shared = {name: getattr(stage, name) for name in _SHARED}
    train = TrainConfig.model_validate(
        {**dict(config.train), **shared, "normalise": "sequence", "micro_batch_tokens": None}
    )
    train = train.model_copy(update={"validate_every": "never", "keep": "last"})
    changes: dict[str, Any] = {
        "name": f"{config.name}: {stage.kind}",
        "train": train,
        "teacher": None,
        "teachers": {},
        "data": config.data.model_copy(update={"train": stage.data, "text": None}),
        "preference": None,
    }
    if stage.recipe is not None:
        values = yaml.safe_load(recipes.find(stage.recipe).path.read_text(encoding="utf-8"))
        changes["objective"] = OBJECTIVES.parse(values["objective"])
        changes["responses"] = RESPONSES.parse(values["responses"])
    return config.model_copy(update=changes)


def begin(parts: Parts, run: RunFolder) -> StageFolder:
    """Put the student to the start of the stage: as the distillation left it, or as that was written down."""
    folder = StageFolder(run)
    if not folder.began and parts.config.train.keep == "best" and (run.best / "weights.pt").exists():
        restore_state(parts.student, run.best / "weights.pt")
    if not folder.began and run.main:
        fresh = run.path / ".start.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_state(parts.student, fresh / "weights.pt")
        folder.path.mkdir(exist_ok=True)
        checkpoints.replace_folder(fresh, folder.start_weights)
    elif folder.began:
        restore_state(parts.student, folder.start_weights / "weights.pt")
    if parts.config.student.lora is None:
        reference: Any = copy.deepcopy(parts.student)
    else:
        reference = merged_copy(parts.student)  # TRL takes no adapter as a reference of its own
    parts.reference = reference.requires_grad_(False).eval()
    return folder


def run_stage(parts: Parts, folder: StageFolder, interrupt: Interrupt, train: Train) -> bool:
    """Train the distilled student on the pairs, from the newest checkpoint of the stage if there is one.

    Args:
        parts: the loaded run, put to the stage's start by `begin`.
        folder: what `begin` returned.
        interrupt: requests a stop after a step.
        train: trains a loaded run in place, for a stage with a recipe.

    Returns:
        Whether it came to the end; False after a signal.
    """
    config = stage_config(parts.config)
    data = replace(parts.data, train=parts.pairs, text=())
    stage_parts = replace(parts, config=config, teachers={}, translation=None, data=data)
    checkpoint = checkpoints.newest_whole(folder.checkpoints)
    if stage_of(parts.config).recipe is not None:
        return train(stage_parts, folder, interrupt, checkpoint)
    return _train_by_library(stage_parts, stage_of(parts.config), folder, interrupt, checkpoint)


def _train_by_library(
    parts: Parts, stage: PreferenceStage, folder: StageFolder, interrupt: Interrupt, checkpoint: Path | None
) -> bool:
    from transformers import PrinterCallback, ProgressCallback

    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # of TRL's own settings
    kind, more = stage.arguments_class()
    arguments = training_arguments(parts.config, folder.checkpoints, kind, more)
    pairs = len(parts.data.train)
    reached = -1 if checkpoint is None else checkpoints.step_of(checkpoint)
    bar = StageProgress(f"Training {parts.config.name}")
    saver = StageSaver(
        stage.save_every, stage.keep_checkpoints, folder.checkpoints, steps_in_epoch(arguments, pairs)
    )
    if folder.main:
        checkpoints.drop_after(folder.checkpoints, reached)
    assert parts.reference is not None
    with _as_it_was(parts.student), _as_it_was(parts.reference):
        training = StageTraining(
            student=parts.student,
            reference=parts.reference,
            prompts=parts.data.train,
            tokenizer=parts.tokenizer,
            pad_id=parts.facts.pad_id,
            arguments=arguments,
            callbacks=(StageLog(folder.metrics, reached), saver, bar, interrupt),
        )
        trainer = stage.trainer(training)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        steps = steps_in_all(arguments, pairs)
        folder.note(max_steps=steps)
        if checkpoint is not None and reached >= steps:
            trainer._load_from_checkpoint(str(checkpoint))  # train() would do one step more
            return True
        try:
            with interrupt.waits_for(LibraryStep(Ranks(arguments.world_size, arguments.device))):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            bar.close()
    return not interrupt.requested or bool(trainer.state.global_step >= trainer.state.max_steps)


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Take back what a library's trainer changes besides the weights: `forward` and the padding id."""
    inner: Any = unwrap(model)
    configs = [one for one in (inner.config, getattr(inner, "generation_config", None)) if one is not None]
    pads = [getattr(one, "pad_token_id", None) for one in configs]
    models = (model,) if inner is model else (model, inner)
    forwards = [(one, one.__dict__.get("forward")) for one in models]
    try:
        yield
    finally:
        for one, pad in zip(configs, pads, strict=True):
            one.pad_token_id = pad
        for one, forward in forwards:
            one.__dict__.pop("forward", None)
            if forward is not None:
                one.__dict__["forward"] = forward
