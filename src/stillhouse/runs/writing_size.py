"""The size of a stage that writes responses with one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillhouse.core.types import Prompt
from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import PEAK_MEMORY, StageSize, this_gpu
from stillhouse.runs.memory import MemoryParts, memory_of_writing, most_memory
from stillhouse.runs.model_sizes import ModelSize, model_size, student_size
from stillhouse.runs.size_facts import (
    HERE,
    Machine,
    Writing,
    max_tokens,
    memory_facts,
    writing_facts,
)
from stillhouse.runs.tokenizers import tokenizers


def writing_size(
    config: RunConfig, by: str, prompts: Sequence[Prompt], samples: int, machine: Machine = HERE
) -> StageSize:
    """The size of writing responses to prompts.

    Args:
        config: models, data and sampling.
        by: "teacher" or "student", which writes.
        prompts: to answer.
        samples: responses to each.
        machine: what the memory is estimated for; each of several processes holds the whole model.
    """
    responses = len(prompts) * samples
    writing = Writing(responses, responses * max_tokens(config, config.engine))
    rows: dict[str, Any] = {
        "prompts": len(prompts),
        "responses": responses,
        f"tokens to write by the {by}, at most": writing.tokens,
    }
    facts: dict[str, Any] = {"prompts": len(prompts), "tokens_to_write": writing_facts({by: writing})}
    writer, gpu = _writer(config, by), machine.gpu or this_gpu()
    at_once = getattr(config.engine, "batch_size", None)
    if writer is None or at_once is None:
        rows["memory"] = "not known: another process or engine writes"
        return StageSize(rows, facts)
    length = max(len(prompt.token_ids) for prompt in prompts) + max_tokens(config, config.engine)
    together = min(at_once, responses)
    buffered = config.engine.kept_tokens(together, length, gpu is not None)
    memory: dict[str, MemoryParts] = memory_of_writing(by, writer, length, together, buffered, gpu)
    rows |= {f"{by} parameters": writer.parameters, PEAK_MEMORY: float(f"{most_memory(memory) / 1e9:.2g}")}
    facts |= {"parameters": {by: writer.parameters}, **memory_facts(memory, gpu, machine.devices)}
    return StageSize(rows, facts)


def _writer(config: RunConfig, by: str) -> ModelSize | None:
    """The model that writes; None where it is not in this process."""
    teacher = None if config.teacher is None else config.teacher.model_to_load()
    if by == "teacher":
        return None if teacher is None else model_size(teacher)
    return student_size(config.student, teacher, len(tokenizers(config).student))
