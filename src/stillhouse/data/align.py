"""Aligning one text in two tokenizations: which tokens of one cover the same bytes as which of the other."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from stillhouse.core.alignment import UNALIGNED
from stillhouse.data.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True)
class Spans:
    """The tokens of two tokenizations of one text, in groups that cover the same bytes.

    A group ends at a boundary that both tokenizations have, so no group can be split further. Groups are
    numbered in order and cover the text without gaps.

    Example: "ab" as one token and as two, then the end-of-sequence tokens:
        `Spans((0, 1), (0, 0, 1), (0.0, 1.0), (0.0, 0.5, 1.0))`
    """

    student: tuple[int, ...]
    """The group of each token of the student; -1 for tokens without bytes, such as special tokens."""
    teacher: tuple[int, ...]
    """The group of each token of the teacher."""
    student_places: tuple[float, ...]
    """Where each token of the student starts: the fraction of the bytes before it, from 0 to 1."""
    teacher_places: tuple[float, ...]
    """The same for each token of the teacher."""

    @classmethod
    def whole(cls, student: int, teacher: int) -> Spans:
        """Two different texts of so many tokens: one group, in which places are shares of the tokens."""
        places = (tuple(place / count for place in range(count)) for count in (student, teacher))
        return cls((0,) * student, (0,) * teacher, *places)

    @property
    def count(self) -> int:
        """Number of groups."""
        return 1 + max(self.student, default=UNALIGNED)

    @property
    def one_to_one(self) -> int:
        """Number of groups of one token of each."""
        student, teacher = Counter(self.student), Counter(self.teacher)
        return sum(student[group] == 1 == teacher[group] for group in range(self.count))


def align(student: Sequence[bytes], teacher: Sequence[bytes], finished: bool) -> Spans:
    """Group the tokens of two tokenizations of one text.

    Args:
        student: the bytes of each token of the student.
        teacher: the bytes of each token of the teacher; the same text.
        finished: whether an end-of-sequence token follows in both, which makes a last group of two tokens.

    Raises:
        ValueError: the two texts differ.
    """
    if b"".join(student) != b"".join(teacher):
        raise ValueError("the two tokenizations are not of the same text")
    student_ends, teacher_ends = list(accumulate(map(len, student))), list(accumulate(map(len, teacher)))
    shared = sorted(set(student_ends) & set(teacher_ends) - {0})

    def groups(pieces: Sequence[bytes], ends: list[int]) -> tuple[int, ...]:
        found = [
            bisect_left(shared, end) if piece else UNALIGNED for piece, end in zip(pieces, ends, strict=True)
        ]
        return (*found, len(shared)) if finished else tuple(found)

    def places(pieces: Sequence[bytes], ends: list[int]) -> tuple[float, ...]:
        total = max(1, ends[-1] if ends else 0)
        found = [(end - len(piece)) / total for piece, end in zip(pieces, ends, strict=True)]
        return (*found, 1.0) if finished else tuple(found)

    return Spans(
        groups(student, student_ends),
        groups(teacher, teacher_ends),
        places(student, student_ends),
        places(teacher, teacher_ends),
    )


def match_vocabularies(
    student: TokenBytes, teacher: TokenBytes, end_ids: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """The ids of tokens with the same bytes in both vocabularies, of the student and of the teacher.

    The end tokens `end_ids` come first and match each other; other special tokens, which have no bytes, match
    by name.
    """
    pairs = [end_ids]
    for name, index in student.special_ids.items():
        other = teacher.special_ids.get(name)
        if other is not None and index != end_ids[0] and other != end_ids[1]:
            pairs.append((index, other))
    for token_bytes, index in student.id_of_bytes.items():
        other = teacher.id_of_bytes.get(token_bytes)
        if other is not None:
            pairs.append((index, other))
    return [student_id for student_id, _ in pairs], [teacher_id for _, teacher_id in pairs]
