"""The size of a reward model's training, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.config import Layer, Layered, flatten, validate
from stillhouse.core.types import Prompt
from stillhouse.data import load_data
from stillhouse.errors import ConfigError, Fault
from stillhouse.models import TeacherModel, load_tokenizer
from stillhouse.runs.estimate import PEAK_MEMORY, StageSize, dropped_rows, this_gpu
from stillhouse.runs.memory import memory_of_reward, most_memory
from stillhouse.runs.model_sizes import model_size
from stillhouse.runs.reward import RewardRun, held_out_pairs
from stillhouse.runs.size_facts import HERE, Machine, memory_facts


def reward_size(config: RewardRun, machine: Machine = HERE) -> StageSize:
    """Pairs, tokens, steps and memory; reads the tokenizer, the data and the model's configuration.

    Raises:
        StillhouseError: something cannot be read, or the longest sequence does not fit the model's context.
    """
    model = TeacherModel(path=config.model, dtype="float32")
    tokenizer = load_tokenizer(model)
    data = load_data(config.data, tokenizer, needs={"responses", "rejected"})
    pairs, valid = _lengths(data.train), _lengths(held_out_pairs(config, data.encoder))
    if not pairs:
        raise ConfigError(Fault("data.train", "has no preference pairs"))
    size = model_size(model)
    longest = max(map(max, (*pairs, *valid)))
    if size.context is not None and longest > size.context:
        raise ConfigError(
            Fault(
                "data.max_response",
                f"the longest prompt and response have {longest} tokens",
                allowed=f"{size.context}, the context of the model",
                hint="Lower data.max_prompt or data.max_response.",
            )
        )
    per_epoch = -(-len(pairs) // config.batch_size)
    steps = config.max_steps or math.ceil(per_epoch * config.epochs)
    gpu = machine.gpu or this_gpu()
    memory = memory_of_reward(size, 2 * config.micro_batch_size * longest, gpu)
    facts: dict[str, Any] = {
        "pairs": len(pairs),
        "held_out_pairs": len(valid),
        "tokens": sum(map(sum, pairs)),
        "steps": steps,
        "steps_in_an_epoch": per_epoch,
        "longest_sequence": longest,
        "parameters": {"model": size.parameters},
        "tokens_to_write": {},
        **memory_facts(memory, gpu, machine.devices),
    }
    rows = {
        "preference pairs": len(pairs),
        "held-out pairs": len(valid),
        **dropped_rows(data),
        "tokens of both responses with their prompts": facts["tokens"],
        "optimiser steps": steps,
        "optimiser steps in an epoch": per_epoch,
        "parameters": size.parameters,
        "longest sequence (tokens)": longest,
        PEAK_MEMORY: float(f"{most_memory(memory) / 1e9:.2g}"),
    }
    return StageSize(rows, facts)


def reward_values(source: Path, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every value with its origin.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    upper = Layer.joined([Layer.override(text) for text in overrides])
    config, origins = validate(RewardRun, Layered.merged(Layer.read(source), upper))
    flat = flatten(config)
    return {path: {"value": flat[path], "origin": origin} for path, origin in origins.items()}


def _lengths(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Of each pair the tokens of the prompt with either response."""
    both = [pair for prompt in prompts if (pair := prompt.preference_pair()) is not None]
    return [
        (
            len(chosen.prompt.token_ids) + len(chosen.token_ids),
            len(rejected.prompt.token_ids) + len(rejected.token_ids),
        )
        for chosen, rejected in both
    ]
