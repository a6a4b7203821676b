"""The teacher runs on as few sequences as it can, and its signal is the same as if it ran on all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests import tiny
from torch import Tensor

from stillhouse.core.batch import TokenBatch
from stillhouse.core.host import Ints
from stillhouse.core.sparse import SparseLogprobs, topk_of
from stillhouse.core.types import Response
from stillhouse.data.collate import collate
from stillhouse.objectives import Objective
from stillhouse.objectives.registry import parse_objective
from stillhouse.rollouts import TeacherHiddenCache
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.teacher_signals import sequences_needing, teacher_signal

EVERYWHERE = parse_objective("forward_kl")
NOT_ON_TEXT = parse_objective({"student": "forward_kl", "text": "cross_entropy"})


class CountingTeacher(LiveTeacher):
    """A teacher that counts the sequences it was run on."""

    sequences = 0

    def hidden(self, batch: TokenBatch) -> Tensor:
        self.sequences += len(batch)
        return super().hidden(batch)


@pytest.fixture
def teacher() -> CountingTeacher:
    return CountingTeacher(tiny.model(7, width=24), tiny.VOCAB)


def signal(
    teacher: LiveTeacher, responses: list[Response], objective: Objective, cache: TeacherHiddenCache
) -> tuple[Tensor, Ints]:
    """The teacher's signal for the responses, and the sequence of each row."""
    batch = collate(responses, tiny.PAD)
    slots = [cache.slot(response) for response in responses]
    needed = sequences_needing(objective, batch, "main")
    found = teacher_signal(teacher, batch, needed, cache, slots)
    return found, batch.row_sequences  # type: ignore[return-value]


def test_plain_text_needs_no_teacher(teacher: CountingTeacher) -> None:
    responses = tiny.responses(6, sources=("student", "text"))
    hidden, rows = signal(teacher, responses, NOT_ON_TEXT, TeacherHiddenCache())
    assert teacher.sequences == 3
    wanted, _ = signal(teacher, responses, EVERYWHERE, TeacherHiddenCache())
    student = rows % 2 == 0
    torch.testing.assert_close(hidden[student], wanted[student], atol=1e-5, rtol=1e-5)
    assert not hidden[~student].any()


def test_remembered_responses_need_no_teacher_and_give_the_same(teacher: CountingTeacher) -> None:
    responses = [replace(r, student_version=0) for r in tiny.responses(5, sources=("student",))]
    cache = TeacherHiddenCache()
    for response in responses[:4]:
        cache.retain(response)
    first, _ = signal(teacher, responses, EVERYWHERE, cache)
    assert teacher.sequences == 5
    again, _ = signal(teacher, responses[::-1], EVERYWHERE, cache)
    assert teacher.sequences == 6, "only the response that nobody watches"
    parts = again.split([len(r.token_ids) for r in responses[::-1]])[::-1]
    torch.testing.assert_close(torch.cat(parts), first, atol=1e-5, rtol=1e-5)
    cache.release(responses[0])
    signal(teacher, responses, EVERYWHERE, cache)
    assert teacher.sequences == 8


def test_a_batch_that_needs_no_teacher_at_all_runs_none(teacher: CountingTeacher) -> None:
    hidden, _ = signal(teacher, tiny.responses(3, sources=("text",)), NOT_ON_TEXT, TeacherHiddenCache())
    assert teacher.sequences == 0
    assert hidden.shape[1] == 24


class MostProbable(LiveTeacher):
    """A teacher that tells its three most probable tokens alone, and counts as `CountingTeacher` does."""

    form = "topk"
    sequences = 0

    def sparse_logprobs(self, batch: TokenBatch) -> SparseLogprobs:
        self.sequences += len(batch)
        logits = self.head.logits(super().hidden(batch))
        return topk_of(torch.log_softmax(logits, -1), 3, batch.row_labels())


def test_a_compact_teacher_is_asked_about_the_sequences_that_need_it_alone() -> None:
    teacher = MostProbable(tiny.model(7, width=24), tiny.VOCAB)
    responses = tiny.responses(6, sources=("student", "text"))
    said, rows = signal(teacher, responses, NOT_ON_TEXT, TeacherHiddenCache())
    assert isinstance(said, SparseLogprobs)
    assert teacher.sequences == 3
    whole = teacher.sparse_logprobs(collate(responses, tiny.PAD))
    student = rows % 2 == 0
    assert torch.equal(said.ids[student], whole.ids[student])
    torch.testing.assert_close(said.labels[student], whole.labels[student])  # type: ignore[index]
    assert (said.ids[~student] == -1).all()
    signal(teacher, tiny.responses(2, sources=("text",)), NOT_ON_TEXT, TeacherHiddenCache())
    assert teacher.sequences == 9, "nobody is asked about a batch of plain text"
