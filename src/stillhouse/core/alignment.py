"""Which rows of two models cover the same text where their tokenizers differ, and which tokens they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.core.host import Ints, RowIndex, as_host, to_device
from stillhouse.core.requirements import Granularity

UNALIGNED = -1
"""The group of a row that has no counterpart in the other model's tokens."""


@dataclass(frozen=True, slots=True)
class MatchedIds:
    """The token ids of a `VocabularyMatch` on a device."""

    student: Tensor
    """[K]"""
    teacher: Tensor
    """[K]"""
    student_rest: Tensor
    """The student's ids that the teacher does not have."""
    teacher_rest: Tensor
    """The teacher's ids that the student does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyMatch:
    """The tokens that two vocabularies spell with the same bytes; the ends of a response count as one.

    Example: `VocabularyMatch(student=[5, 9], teacher=[2, 0], sizes=(1024, 512))`
    """

    student: Ints
    """[K] ids of the student."""
    teacher: Ints
    """[K] the teacher's ids of the same tokens."""
    sizes: tuple[int, int]
    """How many ids the student and the teacher have."""
    _moved: dict[torch.device, MatchedIds] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("student", "teacher"):
            object.__setattr__(self, name, as_host(getattr(self, name)))

    @classmethod
    def same(cls, size: int) -> VocabularyMatch:
        """Two vocabularies that are one."""
        ids = np.arange(size)
        return cls(ids, ids, (size, size))

    @property
    def share(self) -> float:
        """The share of the teacher's tokens that the student has too."""
        return len(self.teacher) / max(1, self.sizes[1])

    def on(self, device: torch.device) -> MatchedIds:
        """The ids on a device, copied there once."""
        if device not in self._moved:
            found = (
                self.student,
                self.teacher,
                np.setdiff1d(np.arange(self.sizes[0]), self.student),
                np.setdiff1d(np.arange(self.sizes[1]), self.teacher),
            )
            self._moved[device] = MatchedIds(*(to_device(ids, device) for ids in found))
        return self._moved[device]


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
    def of(cls, groups: Ints, last: bool, device: torch.device) -> Members:
        """From the group of every row; the rows of a group may have rows of no group between them."""
        rows = np.flatnonzero(groups != UNALIGNED)
        begins = np.diff(groups[rows], prepend=UNALIGNED) != 0  # the group changes at this row
        dense = begins.cumsum() - 1
        edge = np.append(begins[1:], True)[: len(rows)] if last else begins
        return cls(*(to_device(part, device) for part in (rows[edge], rows[~edge], dense[~edge])))

    def chained(self, logprobs: Tensor) -> Tensor:
        """The log-probability of each group's other tokens together, [G]; `logprobs` is that of each other's
        label."""
        total = torch.zeros(self.anchors.shape[0], dtype=logprobs.dtype, device=logprobs.device)
        return total.index_add(0, self.owners, logprobs)


@dataclass(frozen=True, slots=True, eq=False)
class TokenAlignment:
    """N rows of the student and M rows of the teacher over the same responses; known on the host.

    A group is the shortest run of rows that covers the same bytes in both tokenizations, so both models
    condition on the same text at its start and at its end. Groups are numbered in the order of the rows; the
    end of a response is a group of its own.

    Example: "ab" in one token for the student and two for the teacher, then the end:
        `TokenAlignment(student_groups=[0, 1], teacher_groups=[0, 0, 1], ...)`
    """

    student_groups: Ints
    """[N]; -1 for rows without a counterpart, such as special tokens."""
    teacher_groups: Ints
    """[M]"""
    teacher_labels: Ints
    """[M] the teacher's id that each of its rows predicts."""
    student_sequences: Ints
    """[N] the sequence that the row belongs to."""
    teacher_sequences: Ints
    """[M]"""
    student_places: NDArray[np.floating]
    """[N] the row's offset in its response, from 0 to 1: the share of the bytes before it."""
    teacher_places: NDArray[np.floating]
    """[M]"""
    matching: VocabularyMatch | None = None
    """Tokens that both have; None: the vocabularies are the same."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.name != "matching":
                object.__setattr__(self, one.name, as_host(getattr(self, one.name)))

    @classmethod
    def identity(cls, sequence_ids: Ints) -> TokenAlignment:
        """For models that share a tokenizer: each row is a group, so labels are never read."""
        rows = np.arange(len(sequence_ids))
        places = np.zeros(len(rows))
        for sequence in np.unique(sequence_ids):
            inside = np.flatnonzero(sequence_ids == sequence)
            places[inside] = np.arange(len(inside)) / len(inside)
        return cls(rows, rows, np.zeros_like(rows), sequence_ids, sequence_ids, places, places)

    @classmethod
    def with_other_texts(
        cls, ours: Sequence[int], theirs: Sequence[int], others: Sequence[bool]
    ) -> TokenAlignment:
        """For models that share a tokenizer, where the teacher reads another response in the place of some.

        Args:
            ours: [S] the student's rows of each sequence.
            theirs: [S] the teacher's rows of each.
            others: [S] whether its response is another one: then all rows of both are one group.
        """
        parts: dict[str, list[NDArray[Any]]] = {"ours": [], "theirs": []}
        first = 0
        for mine, other_rows, other in zip(ours, theirs, others, strict=True):
            for name, count in (("ours", mine), ("theirs", other_rows)):
                parts[name].append(np.full(count, first) if other else np.arange(first, first + count))
            first += 1 if other else mine
        student, teacher = (np.concatenate(parts[name]) for name in ("ours", "theirs"))
        return cls(
            student,
            teacher,
            np.zeros_like(teacher),
            np.repeat(np.arange(len(ours)), ours),
            np.repeat(np.arange(len(theirs)), theirs),
            np.concatenate([np.arange(count) / count for count in ours]),
            np.concatenate([np.arange(count) / count for count in theirs]),
        )

    @property
    def same_rows(self) -> bool:
        """Whether row n of both models predicts the same token."""
        return self.matching is None and np.array_equal(self.student_groups, self.teacher_groups)

    def teacher_rows(self, index: Ints | slice) -> Ints:
        """The teacher's rows that belong to these rows of the student: those of their groups."""
        wanted = np.isin(self.teacher_groups, self.student_groups[index])
        return np.flatnonzero(wanted & (self.teacher_groups != UNALIGNED))

    def at(self, index: Ints | slice) -> TokenAlignment:
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

    def members(self, device: torch.device, last: bool = False) -> tuple[Members, Members]:
        """The student's and the teacher's rows by group; `last`: a group is stood for by its last row.

        Raises:
            ValueError: a group has rows of one model only.
        """
        ours = Members.of(self.student_groups, last, device)
        theirs = Members.of(self.teacher_groups, last, device)
        if ours.anchors.shape != theirs.anchors.shape:
            raise ValueError(
                f"the student's rows make {ours.anchors.shape[0]} groups and the teacher's "
                f"{theirs.anchors.shape[0]}; every group needs rows of both"
            )
        return ours, theirs

    def sequences(self) -> list[tuple[RowIndex, RowIndex]]:
        """The aligned rows of the student and of the teacher, sequence by sequence."""
        ours, theirs = self.student_groups != UNALIGNED, self.teacher_groups != UNALIGNED
        return [
            (
                RowIndex.of(np.flatnonzero(ours & (self.student_sequences == sequence))),
                RowIndex.of(np.flatnonzero(theirs & (self.teacher_sequences == sequence))),
            )
            for sequence in np.unique(self.student_sequences[ours])
        ]

    def units(self, granularity: Granularity) -> Ints:
        """[N] a number for each row that changes wherever rows may be cut without parting a unit."""
        if granularity == "token":
            return np.arange(len(self.student_groups))
        if granularity == "sequence":
            return self.student_sequences
        return np.maximum.accumulate(self.student_groups)
