"""A reward model from preference pairs: the head of one number on the body of the student, trained by TRL."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from stillhouse import console
from stillhouse.config import FilePath, StrictConfig, read_config
from stillhouse.core.types import Prompt
from stillhouse.data import DataConfig, load_data, load_prompts
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.files import write_json, write_jsonl
from stillhouse.models import load_reward_model, load_tokenizer, local_device, rewards
from stillhouse.models.config import ModelConfig
from stillhouse.runs.training_arguments import optimisation
from stillhouse.train import checkpoints
from stillhouse.train.config import MICRO_BATCH, check_divisible, dividing

MODEL, METRICS, SCORE = "model", "metrics.jsonl", "accuracy.json"


class RewardRun(StrictConfig):
    """How a reward model is trained: -log sigma(R(x, y_w) - R(x, y_l)) + center (R(x, y_w) + R(x, y_l))^2.

    Source: Bradley and Terry 1952, as in Ouyang et al. 2022 (arXiv 2203.02155); TRL's RewardTrainer.
    """

    name: str = Field("reward", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of its folder."""
    model: str
    """The causal model whose body it starts from: the student, so that both read the same token ids."""
    data: DataConfig
    """`train` and, held out, `valid` are preference pairs."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the pairs."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; if given, it decides instead of `epochs`."""
    batch_size: int = Field(64, ge=1)
    """Pairs in one optimiser step."""
    micro_batch_size: int = Field(MICRO_BATCH, ge=1)
    """Pairs in one forward pass. Default: the largest of 1 to 8 that divides `batch_size`."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls to 0."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which it rises."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay."""
    center: float = Field(0.01, ge=0)
    """Weight of the term that keeps rewards around 0, which pairs alone leave free."""
    seed: int = 0
    """Of the new head and the order of the pairs."""
    log_every: int = Field(10, ge=1)
    """Optimiser steps between two rows of metrics."""
    save_every: int = Field(500, ge=1)
    """Optimiser steps between two checkpoints to resume from."""
    output: FilePath | None = None
    """The folder; default: runs/NAME."""

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.max_steps is None else {"epochs": "max_steps decides"}

    @model_validator(mode="before")
    @classmethod
    def _default_micro_batch(cls, values: Any) -> Any:
        return dividing(values)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        check_divisible(self.batch_size, self.micro_batch_size)
        return self

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return self.output or Path("runs") / self.name

    def arguments(self) -> dict[str, Any]:
        """The options of TRL's RewardConfig."""
        return {
            **optimisation(self),
            "per_device_train_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.batch_size // self.micro_batch_size,
            "center_rewards_coefficient": self.center or None,
            "save_steps": self.save_every,
            "max_length": None,  # data.max_prompt and data.max_response have cut already
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": "none",
        }


def reward_run(source: Path, overrides: list[str]) -> RewardRun:
    """The configuration of a YAML file under `a.b=value` texts.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    return read_config(RewardRun, source, overrides)


def train_reward_model(config: RewardRun, resume: bool = False) -> dict[str, float]:
    """Train a reward model and leave FOLDER/model, which transformers reads, with the log beside it.

    Args:
        config: how.
        resume: go on from the newest checkpoint in its folder.

    Returns:
        The share of pairs whose chosen response has the higher reward, by "train" and "valid".

    Raises:
        StillhouseError: TRL is missing, the folder is taken, or model or data cannot be used.
    """
    if find_spec("trl") is None:
        raise EnvironmentFault(
            "a reward model is trained by TRL, which is not installed. Install it: "
            "pip install 'stillhouse[preference]'."
        )
    _check_folder(config.folder, resume)
    from transformers.utils.logging import disable_progress_bar

    from stillhouse.train.reward_trainer import train_on_pairs

    tokenizer = load_tokenizer(ModelConfig(path=config.model))
    data = load_data(config.data, tokenizer, needs={"responses", "rejected"})
    sets = {"train": data.train, "valid": held_out_pairs(config, data.encoder)}
    disable_progress_bar()  # bars for shards of weights would break up ours
    torch.manual_seed(config.seed)
    model = load_reward_model(config.model, tokenizer, start=True).to(local_device())
    with console.phase("Training the reward model"):
        options, place = config.arguments(), config.folder / "checkpoints"
        log = train_on_pairs(model, tokenizer, data.train, options, place)
    write_jsonl(config.folder / METRICS, log)
    _save(model, tokenizer, config.folder)
    found = {name: accuracy(model, pairs) for name, pairs in sets.items() if pairs}
    write_json(config.folder / SCORE, found)
    return found


def accuracy(model: nn.Module, pairs: Iterable[Prompt]) -> float:
    """The share of preference pairs whose chosen response has the higher reward."""
    model.eval()
    both = [pair for prompt in pairs if (pair := prompt.preference_pair()) is not None]
    chosen, rejected = (
        rewards(model, [(*pair[side].prompt.token_ids, *pair[side].token_ids) for pair in both])
        for side in (0, 1)
    )
    return sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(both)


def held_out_pairs(config: RewardRun, encoder: Any) -> tuple[Prompt, ...]:
    """The pairs of `data.valid`; none without it."""
    if config.data.valid is None:
        return ()
    found = load_prompts("valid", config.data.valid, config.data, encoder, needs={"responses", "rejected"})
    return tuple(found.prompts)


def _check_folder(folder: Path, resume: bool) -> None:
    started = folder.exists() and any(folder.iterdir())
    if started and not resume:
        hint = "Resume it (--resume), choose another name (name=...), or delete the folder."
        raise ConfigError(Fault("output", "is there already", got=str(folder), hint=hint))
    if resume and (not started or (folder / MODEL).exists()):
        what = "has finished" if started else "has not begun"
        raise ConfigError(Fault("--resume", f"the reward model in {folder} {what}"))


def _save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    fresh = folder / ".model.new"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)  # type: ignore[operator]
    tokenizer.save_pretrained(fresh)
    checkpoints.replace_folder(fresh, folder / MODEL)
