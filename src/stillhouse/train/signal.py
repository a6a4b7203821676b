"""The teacher's signal for a micro-batch: computed, remembered, or left out where no loss asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stillhouse.core.sparse import SparseLogprobs, empty_sparse, scatter_sparse
from stillhouse.core.types import SOURCES
from stillhouse.objectives import Objective
from stillhouse.rollouts import TeacherHiddenCache
from stillhouse.teachers import AnyTeacher, PrefetchingTeacher, SparseTeacher, Teacher
from stillhouse.teachers.live import select_sequences


def sources_with_teacher(objective: Objective) -> frozenset[int]:
    """The codes of the sources whose objective looks at the teacher."""
    parts = {code: objective.for_source(source) for code, source in enumerate(SOURCES)}
    return frozenset(code for code, part in parts.items() if part is not None and part.needs_teacher)


def seen_by_teacher(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The batch in the teacher's token ids: its own sequences where its tokenizer is another one."""
    names = ("input_ids", "attention_mask", "response_mask", "labels")
    return {**batch, **{name: batch[f"teacher_{name}"] for name in names if f"teacher_{name}" in batch}}


def teacher_signal(
    teacher: AnyTeacher, batch: Mapping[str, Tensor], objective: Objective, memory: TeacherHiddenCache
) -> Tensor | SparseLogprobs:
    """What `fused_rows` takes as the teacher: hidden states [N, Dt], or a few tokens of each of the N rows.

    See `teacher_hidden` for the arguments. A sparse teacher is asked about the sequences that need it alone,
    and caches for itself.
    """
    if not isinstance(teacher, SparseTeacher):
        return teacher_hidden(teacher, batch, objective, memory)
    needs = sources_with_teacher(objective)
    wanted = torch.tensor([code in needs for code in batch["sources"].tolist()])
    if bool(wanted.all()):
        return teacher.sparse_logprobs(batch)
    mask = batch["response_mask"]
    rows = wanted.to(mask.device)[mask.nonzero()[:, 0]].nonzero().squeeze(-1)
    if not len(rows):
        return empty_sparse(teacher.form, int(mask.sum()), mask.device)
    part = select_sequences(batch, wanted.nonzero().squeeze(-1).tolist())
    return scatter_sparse(teacher.sparse_logprobs(part), rows, int(mask.sum()))


def look_ahead(teacher: object, batches: Sequence[Mapping[str, Tensor]], objective: Objective) -> None:
    """Let a teacher that is quicker that way hear of all micro-batches of a step at once."""
    if not isinstance(teacher, PrefetchingTeacher):
        return
    needs = sources_with_teacher(objective)
    parts = []
    for batch in batches:
        rows = [row for row, code in enumerate(batch["sources"].tolist()) if code in needs]
        if rows:
            parts.append(batch if len(rows) == len(batch["sources"]) else select_sequences(batch, rows))
    teacher.prefetch(parts)


def teacher_hidden(
    teacher: Teacher, batch: Mapping[str, Tensor], objective: Objective, memory: TeacherHiddenCache
) -> Tensor:
    """[N, Dt] hidden states for the response rows of a micro-batch; the teacher runs on as few sequences as
    it can.

    Sequences whose objective does not need it get zeros, remembered ones what was kept, and what is new and
    watched is kept.

    Args:
        teacher: the running teacher.
        batch: input_ids, attention_mask, response_mask [B, T], sources [B]; `kept` [B] numbers of the memory.
        objective: with plain numbers.
        memory: of responses that come again.
    """
    mask = batch["response_mask"]
    needs = sources_with_teacher(objective)
    wanted = [code in needs for code in batch["sources"].tolist()]
    numbers = batch["kept"].tolist() if "kept" in batch else [-1] * len(wanted)
    known = [memory.get(number) if want else None for number, want in zip(numbers, wanted, strict=True)]
    asked = [row for row, want in enumerate(wanted) if want and known[row] is None]
    if len(asked) == len(wanted):
        hidden = teacher.hidden(batch)
        new = hidden.split(mask.sum(1).tolist())
    else:
        new = _run(teacher, batch, asked)
        hidden = _assemble(teacher, mask, dict(zip(asked, new, strict=True)), known)
    for row, states in zip(asked, new, strict=True):
        memory.put(numbers[row], states)
    return hidden


def _run(teacher: Teacher, batch: Mapping[str, Tensor], rows: list[int]) -> tuple[Tensor, ...]:
    """The teacher on some sequences of the batch, cut to the longest of them."""
    if not rows:
        return ()
    part = select_sequences(batch, rows)
    return teacher.hidden(part).split(part["response_mask"].sum(1).tolist())


def _assemble(
    teacher: Teacher, mask: Tensor, new: Mapping[int, Tensor], known: list[Tensor | None]
) -> Tensor:
    counts = mask.sum(1).tolist()
    weight = teacher.head.weight
    some = next(iter(new.values()), None)
    dtype = weight.dtype if some is None else some.dtype
    parts = []
    for row, count in enumerate(counts):
        states = new.get(row, known[row])
        if states is None:
            states = torch.zeros(count, weight.shape[1], dtype=dtype)
        parts.append(states.to(mask.device, dtype))
    return torch.cat(parts)
