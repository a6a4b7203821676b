"""TRL's RewardTrainer over pairs that are token ids already.

It is imported where a reward model is trained, because TRL is an extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import RewardConfig as RewardArguments
from trl import RewardTrainer

from stillhouse.core.types import Prompt
from stillhouse.train import checkpoints


class RewardModelTrainer(RewardTrainer):
    """RewardTrainer that leaves the card to us."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: it would be beside the model that the folder writes whole."""


class SealedCheckpoints(TrainerCallback):
    """Marks what the trainer saved as whole, and removes old ones."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once a checkpoint is written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            checkpoints.seal(folder / f"{checkpoints.PREFIX}{state.global_step}")
            checkpoints.rotate(folder, 1)


def train_on_pairs(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Prompt], options: dict[str, Any], folder: Path
) -> list[dict[str, Any]]:
    """Train a reward model in place, from the newest whole checkpoint in `folder` if there is one.

    Args:
        model: one of `load_reward_model`.
        tokenizer: the model's.
        pairs: preference pairs as token ids.
        options: of TRL's RewardConfig.
        folder: of the checkpoints.

    Returns:
        The trainer's log.
    """
    from transformers import PrinterCallback, ProgressCallback

    found = [pair for prompt in pairs if (pair := prompt.preference_pair()) is not None]
    ids = {
        f"{name}_ids": [[*pair[side].prompt.token_ids, *pair[side].token_ids] for pair in found]
        for side, name in enumerate(("chosen", "rejected"))
    }
    trainer = RewardModelTrainer(
        model=model,
        args=RewardArguments(output_dir=str(folder), **options),
        train_dataset=Dataset.from_dict(ids),
        processing_class=tokenizer,
        callbacks=[SealedCheckpoints()],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    newest = checkpoints.newest_whole(folder)
    checkpoints.drop_after(folder, -1 if newest is None else checkpoints.step_of(newest))
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    return [row for row in trainer.state.log_history if "loss" in row]
