"""What the runs of a sweep ask the teacher together: which runs can, and which ask the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from stillhouse.config import flatten, to_yaml
from stillhouse.config.layers import OF_THE_SWEEP
from stillhouse.core.requirements import MAIN
from stillhouse.runs.config import RunConfig
from stillhouse.runs.resolve import Resolved
from stillhouse.runs.sweep.origins import configuration_key
from stillhouse.teachers.cached import cached_in

NOT_READ = (
    "name", "output", "evaluate", "objective", "recipe", "train.lr", "train.schedule",
    "train.warmup", "train.weight_decay", "train.clip", "train.epochs", "train.max_steps", "train.keep",
    "train.best_by", "train.validate_every", "train.validate_rouge", "train.save_every", "train.log_every",
    "train.keep_checkpoints", "train.report_to",
)  # fmt: skip
"""What the texts that are known before training, and what a teacher says of them, do not depend on."""


def with_shared_signal(resolved: Resolved, folder: Path) -> Resolved:
    """The run with its live teacher behind a cache that the sweep's runs share, where that saves work and
    changes nothing that the run asks of it; else as it is."""
    config = resolved.config
    asked = MAIN in config.objective.requirements().model_names
    if config.teacher is None or not asked or "student" in config.facts.sources:
        return resolved
    cached = cached_in(config.teacher, folder)
    if cached is None:
        return resolved
    try:
        shared = RunConfig.model_validate({**dict(config), "teacher": cached})
    except ValidationError:  # it asks for what a cache does not give, such as layers
        return resolved
    values = flatten(shared)
    before = resolved.provenance
    provenance = {
        path: before.get(path) or {"value": value, "origin": OF_THE_SWEEP} for path, value in values.items()
    }
    provenance |= {
        path: {"value": value, "origin": OF_THE_SWEEP}
        for path, value in values.items()
        if path.startswith("teacher.")
    }
    return replace(resolved, config=shared, provenance=provenance, yaml=to_yaml(shared))


def shared_texts_key(config: RunConfig) -> str | None:
    """Runs with the same key ask their cached teacher about the same texts; None where there is no cache that
    can be filled beforehand."""
    if config.teacher is None or not config.teacher.fills_cache or "student" in config.facts.sources:
        return None
    written = config.responses.requirements().asks(MAIN, "text")
    return configuration_key(config, {*NOT_READ, *(() if written else ("train.seed",))})
