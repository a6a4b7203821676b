"""What rounds of responses need of a run to be filtered and labelled."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stillhouse.core.types import Response
from stillhouse.data import DatasetConfig, load_prompts
from stillhouse.data.tokenise import Encoder
from stillhouse.rollouts.offline.curated import SUMMARY
from stillhouse.rollouts.offline.scoring import mean_logprobs
from stillhouse.rollouts.pairs import Pairs
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder

if TYPE_CHECKING:
    from stillhouse.runs.build import Parts


def scorers(parts: Parts) -> dict[str, Callable[[Sequence[Response]], list[float]]]:
    """How likely each model of a run finds responses, in nats per token.

    A teacher with another tokenizer is not among them: its tokens are others.
    """
    models = {"student": parts.student, "teacher": parts.comparable}
    options: dict[str, Any] = {
        "pad_id": parts.facts.pad_id,
        "vocab": parts.vocab,
        "batch_size": parts.config.evaluate.batch_size,
    }
    return {
        name: partial(mean_logprobs, model, **options) for name, model in models.items() if model is not None
    }


def evaluation_sets(config: RunConfig) -> tuple[DatasetConfig, ...]:
    """Every set of rows that the run measures a system on."""
    tasks = [source for task in config.evaluate.expanded_tasks() for source in task.datasets().values()]
    named = (config.data.valid, config.evaluate.data, *tasks)
    return tuple(source for source in named if source is not None)


def other_responses(parts: Parts) -> dict[str, dict[tuple[int, ...], Response]]:
    """The responses of other generators that responses.teacher_side names, by name and prompt tokens.

    Raises:
        DataError: a file cannot be read.
    """
    config = parts.config
    if not isinstance(config.responses, Pairs) or not config.responses.others():
        return {}
    encoder = Encoder(config.data.template, parts.tokenizer)
    found = {}
    for name, source in config.responses.others().items():
        prompts = load_prompts(name, source, config.data, encoder, needs_response=True).prompts
        found[name] = {
            prompt.token_ids: Response(prompt, prompt.response_ids, "teacher", prompt.response_finished)
            for prompt in reversed(prompts)  # of several responses to a prompt the first
            if prompt.response_ids is not None
        }
    return found


def curation_totals(folder: RunFolder) -> dict[str, Any]:
    """What data.json says about filters: prompts kept in each round. Empty where nothing was filtered."""
    path = folder.responses / SUMMARY
    if not path.exists():
        return {}
    rounds = json.loads(path.read_text(encoding="utf-8"))["rounds"]
    return {
        "curation": [
            {"round": one["round"], "prompts": one["prompts"], "kept": one["kept"], "sides": one["sides"]}
            for one in rounds.values()
        ]
    }
