"""What of the teacher a run's student starts with: the same in every process and on resumption."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stillhouse import console
from stillhouse.core.batch import TokenBatch
from stillhouse.core.types import Prompt
from stillhouse.models import local_device
from stillhouse.models.pruning.choose import Kept, evenly
from stillhouse.models.pruning.config import WIDTHS, Prune
from stillhouse.models.pruning.plan import PruningPlan, plan_pruning
from stillhouse.runs.config import RunConfig
from stillhouse.runs.tokenizers import Tokenizers

FILE = "pruning.json"
"""In the run folder: what was kept of the teacher, and what went before it."""
BATCH_ROWS = 4
"""Rows that are read together where importance is measured."""
NAMES = {
    "hidden_size": "channels of the hidden size",
    "intermediate_size": "MLP channels",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key-value heads",
    "vocabulary": "tokens",
}


def pruning_plan(
    config: RunConfig,
    teacher: nn.Module | None,
    prompts: Sequence[Prompt],
    tokenizers: Tokenizers,
    recorded: Mapping[str, Any] | None = None,
) -> PruningPlan | None:
    """What of the teacher the student starts with; None where it starts from something else.

    Of several processes the first one measures, and the others take over what it chose.

    Args:
        config: the run.
        teacher: the main one, with its weights.
        prompts: of the training data; importance is measured on some of them.
        tokenizers: of the run.
        recorded: `pruning.json` of the run that goes on; its choice stays if it is of the same settings.

    Raises:
        ModelError: the teacher cannot be cut like that.
    """
    prune = config.student.from_teacher
    if prune is None or teacher is None:
        return None
    asked = prune.model_dump(mode="json")
    if recorded and recorded.get("asked") == asked:
        return PruningPlan(Kept.from_dict(recorded["kept"]), dict(recorded))
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    found: list[PruningPlan | None] = [None]
    if not several or torch.distributed.get_rank() == 0:
        batches = None
        if prune.measures:
            teacher.to(local_device())
            batches = _batches(prune, prompts, tokenizers.student.pad_token_id)
        plan = plan_pruning(prune, teacher, batches)
        facts = {"asked": asked, **plan.facts}
        if tokenizers.whole is not None:
            facts["sizes"] = {**facts["sizes"], "vocabulary": (plan.kept.sizes.vocabulary, tokenizers.whole)}
        found = [PruningPlan(plan.kept, facts)]
    if several:
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _batches(prune: Prune, prompts: Sequence[Prompt], pad_id: int) -> Iterator[TokenBatch]:
    """The rows that importance is measured on, prompt and response, a few at a time."""
    count = min(prune.rows, len(prompts))
    rows = [prompts[index] for index in evenly(len(prompts), count)]
    with console.progress("Measuring importance", count) as bar:
        for start in range(0, count, BATCH_ROWS):
            some = rows[start : start + BATCH_ROWS]
            batch = TokenBatch.of(
                [(*one.token_ids, *(one.response_ids or ())) for one in some],
                [len(one.token_ids) for one in some],
                pad_id,
                images=[one.images for one in some],
            )
            yield batch.to(local_device())
            bar.advance(len(some))


def describe_pruning(facts: Mapping[str, Any]) -> str:
    """What was kept, in words, for terminal and page."""
    kept, whole = ({name: pair[index] for name, pair in facts["sizes"].items()} for index in (0, 1))
    parts = []
    if kept["layers"] < whole["layers"]:
        how = " by block influence" if "block_influence" in facts and _counted(facts) else ""
        parts.append(f"layers {in_short(facts['kept']['layers'])} of {whole['layers']}{how}")
    for name in (*WIDTHS, "vocabulary"):
        if kept[name] < whole[name]:
            parts.append(f"{kept[name]:,} of {whole[name]:,} {NAMES[name]}")
    how = {
        "importance": f", chosen on {facts.get('rows', 0):,} rows of the training data",
        "even": ", evenly spaced",
    }.get(facts["choose"], "")
    return "; ".join(parts or ["everything"]) + how


def _counted(facts: Mapping[str, Any]) -> bool:
    """Whether the layers were chosen, not named."""
    return not isinstance(facts["asked"]["layers"], list)


def in_short(numbers: Sequence[int]) -> str:
    """Numbers in short: `0-11, 21-29`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
