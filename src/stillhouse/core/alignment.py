"""Which rows of two models say the same text where their tokenizers differ, and which tokens they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

NOTHING = -1
"""The group of a row that is compared with nothing."""


@dataclass(frozen=True, eq=False)
class VocabularyMatch:
    """The tokens that two vocabularies spell with the same bytes; the ends of a response count as one.

    Example: `VocabularyMatch(student=torch.tensor([5, 9]), teacher=torch.tensor([2, 0]), sizes=(1024, 512))`
    """

    student: Tensor
    """[K] ids of the student."""
    teacher: Tensor
    """[K] the teacher's ids of the same tokens."""
    sizes: tuple[int, int]
    """How many ids the student and the teacher have."""

    @classmethod
    def same(cls, size: int) -> VocabularyMatch:
        """Two vocabularies that are one."""
        ids = torch.arange(size)
        return cls(ids, ids, (size, size))

    @property
    def share(self) -> float:
        """The share of the teacher's tokens that the student has too."""
        return self.teacher.shape[0] / max(1, self.sizes[1])

    @cached_property
    def rest(self) -> tuple[Tensor, Tensor]:
        """The ids of the student and of the teacher that the other does not have."""
        return _without(self.student, self.sizes[0]), _without(self.teacher, self.sizes[1])

    def to(self, device: torch.device) -> VocabularyMatch:
        """On another device; itself if it is there already."""
        if self.student.device == device:
            return self
        return VocabularyMatch(self.student.to(device), self.teacher.to(device), self.sizes)


def _without(ids: Tensor, size: int) -> Tensor:
    left = torch.ones(size, dtype=torch.bool, device=ids.device)
    left[ids] = False
    return left.nonzero().squeeze(-1)


@dataclass(frozen=True, slots=True)
class Members:
    """The rows of one model by group, G groups in all.

    Example: groups (0, 0, 1) give `Members(anchors=[0, 2], others=[1], owners=[0])`
    """

    anchors: Tensor
    """[G] the row whose distribution stands for the group: its first or its last."""
    others: Tensor
    """The other rows of all groups."""
    owners: Tensor
    """Which group, 0 to G - 1, each of the others belongs to."""

    @classmethod
    def of(cls, groups: Tensor, last: bool) -> Members:
        """From the group of every row; the rows of a group may have rows of no group between them."""
        rows = (groups != NOTHING).nonzero().squeeze(-1)
        _, dense = torch.unique_consecutive(groups[rows], return_inverse=True)
        edge = torch.ones_like(rows, dtype=torch.bool)
        inner = dense[1:] != dense[:-1]
        if last:
            edge[:-1] = inner
        else:
            edge[1:] = inner
        return cls(rows[edge], rows[~edge], dense[~edge])

    def chained(self, logprobs: Tensor) -> Tensor:
        """The log-probability of each group's other tokens together, [G]; `logprobs` is that of each other's
        label."""
        total = torch.zeros(self.anchors.shape[0], dtype=logprobs.dtype, device=logprobs.device)
        return total.index_add(0, self.owners, logprobs)


@dataclass(frozen=True, slots=True, eq=False)
class TokenAlignment:
    """N rows of the student and M rows of the teacher over the same responses.

    A group is the shortest run of rows after which both have said the same bytes: at its start both know the
    same text, at its end too. Groups are numbered in the order of the rows; the end of a response is a group
    of its own.

    Example: "ab" in one token for the student and two for the teacher, then the end:
        `TokenAlignment(student_groups=[0, 1], teacher_groups=[0, 0, 1], ...)`
    """

    student_groups: Tensor
    """[N] int64; -1 for rows that are compared with nothing, such as special tokens."""
    teacher_groups: Tensor
    """[M] int64."""
    teacher_labels: Tensor
    """[M] the teacher's id that each of its rows predicts."""
    student_sequences: Tensor
    """[N] the sequence that the row belongs to."""
    teacher_sequences: Tensor
    """[M]"""
    student_places: Tensor
    """[N] where in its response the row stands: the share of the bytes before it."""
    teacher_places: Tensor
    """[M]"""
    matching: VocabularyMatch | None = None
    """Tokens that both have; None: the vocabularies are the same."""

    @classmethod
    def identity(cls, labels: Tensor, sequence_ids: Tensor) -> TokenAlignment:
        """For models that share a tokenizer: each row is a group."""
        rows = torch.arange(sequence_ids.shape[0], device=sequence_ids.device)
        places = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
        for sequence in sequence_ids.unique():
            inside = sequence_ids == sequence
            places[inside] = torch.arange(int(inside.sum()), device=rows.device).double() / inside.sum()
        return cls(rows, rows, labels, sequence_ids, sequence_ids, places, places)

    def teacher_rows(self, index: Tensor) -> Tensor:
        """The teacher's rows that belong to these rows of the student: those of their groups."""
        wanted = torch.isin(self.teacher_groups, self.student_groups[index])
        return (wanted & (self.teacher_groups != NOTHING)).nonzero().squeeze(-1)

    def at(self, index: Tensor) -> TokenAlignment:
        """For some of the student's rows and the teacher's that belong to them."""
        theirs = self.teacher_rows(index)
        return replace(
            self,
            student_groups=self.student_groups[index],
            student_sequences=self.student_sequences[index],
            student_places=self.student_places[index],
            teacher_groups=self.teacher_groups[theirs],
            teacher_labels=self.teacher_labels[theirs],
            teacher_sequences=self.teacher_sequences[theirs],
            teacher_places=self.teacher_places[theirs],
        )

    def members(self, last: bool = False) -> tuple[Members, Members]:
        """The student's and the teacher's rows by group; `last`: a group is stood for by its last row.

        Raises:
            ValueError: a group has rows of one model only.
        """
        ours, theirs = Members.of(self.student_groups, last), Members.of(self.teacher_groups, last)
        if ours.anchors.shape != theirs.anchors.shape:
            raise ValueError(
                f"the student's rows make {ours.anchors.shape[0]} groups and the teacher's "
                f"{theirs.anchors.shape[0]}; every group needs rows of both"
            )
        return ours, theirs

    def units(self, whole: str) -> Tensor:
        """[N] a number for each row that changes where the rows may be cut.

        Args:
            whole: what must not be cut: "row", "group" or "sequence".
        """
        if whole == "row":
            return torch.arange(self.student_groups.shape[0], device=self.student_groups.device)
        if whole == "sequence":
            return self.student_sequences
        return self.student_groups.cummax(0).values if len(self.student_groups) else self.student_groups
