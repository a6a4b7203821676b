"""The pairs of a run's preference stage, read as its other rows are."""

from __future__ import annotations

import logging

from stillhouse.core.types import Prompt
from stillhouse.data import Data, load_prompts
from stillhouse.data.load import set_warnings
from stillhouse.runs.config import RunConfig

logger = logging.getLogger("stillhouse")

NAME = "preference"
"""What they are called among the sets of a run."""


def stage_pairs(config: RunConfig, data: Data) -> tuple[Prompt, ...]:
    """The preference pairs as token ids, reported among the sets of `data`; none without a stage.

    Raises:
        DataError: a row is no preference pair, or cannot be read.
    """
    if config.preference is None:
        return ()
    assert data.encoder is not None
    own = config.data.model_copy(update={"train": config.preference.data})
    loaded = load_prompts(NAME, own.train, own, data.encoder, needs={"responses", "rejected"})
    data.report["sets"].append(loaded.report)
    for warning in set_warnings(loaded):
        logger.warning(warning)
    if config.preference.swap:
        return tuple(prompt.swapped() for prompt in loaded.prompts)
    return loaded.prompts
