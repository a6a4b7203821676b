"""stillhouse reward: a reward model from preference pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile


@app.command("reward", rich_help_panel=RUN)
def reward(
    file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint in its folder.")
    ] = False,
) -> None:
    """Train a reward model on preference pairs, as a YAML file says (model, data, lr, ...).

    It is used by responses.reward_model with objective policy_gradient, and to rank responses.
    """
    from stillhouse.runs.reward import MODEL, reward_run, train_reward_model

    config = reward_run(file, list(overrides or ()))
    for name, share in train_reward_model(config, resume).items():
        console.say(f"{name}: the chosen response has the higher reward in {share:.1%} of the pairs")
    console.say(f"Reward model: {config.folder / MODEL}")
