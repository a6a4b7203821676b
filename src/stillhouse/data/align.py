"""The same responses under two tokenizers: which tokens of one belong to which of the other."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from stillhouse.data.token_bytes import TokenBytes

NOTHING = -1
"""The group of a token that spells nothing, such as a special token within a text."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Two spellings of one text, in groups that spell the same bytes.

    A group ends where both have a boundary, so no group can be parted: at its start and at its end both
    tokenizers have said the same. The groups are numbered in order and cover the text without gap.

    Example: "ab" as one token and as two, then the end:
        `Spans((0, 1), (0, 0, 1), (0.0, 1.0), (0.0, 0.5, 1.0))`
    """

    student: tuple[int, ...]
    """The group of each token of the student; -1 for tokens that spell nothing."""
    teacher: tuple[int, ...]
    """The group of each token of the teacher."""
    student_places: tuple[float, ...]
    """Where each token of the student starts: the share of the bytes before it, from 0 to 1."""
    teacher_places: tuple[float, ...]

    @property
    def count(self) -> int:
        """How many groups there are."""
        return 1 + max(self.student, default=NOTHING)

    @property
    def single(self) -> int:
        """How many groups are one token of each."""
        ours, theirs = Counter(self.student), Counter(self.teacher)
        return sum(ours[group] == 1 == theirs[group] for group in range(self.count))


def align(ours: Sequence[bytes], theirs: Sequence[bytes], ends: bool) -> Spans:
    """Group two spellings of one text.

    Args:
        ours: what each token of the student spells.
        theirs: what each token of the teacher spells; the same bytes in all.
        ends: whether both have one more token after the text, which ends it: a last group of two tokens.

    Raises:
        ValueError: the two spell different text.
    """
    if b"".join(ours) != b"".join(theirs):
        raise ValueError("the two do not spell the same text")
    our_ends, their_ends = list(accumulate(map(len, ours))), list(accumulate(map(len, theirs)))
    shared = sorted(set(our_ends) & set(their_ends) - {0})

    def groups(pieces: Sequence[bytes], reached: list[int]) -> tuple[int, ...]:
        found = [
            bisect_left(shared, end) if piece else NOTHING for piece, end in zip(pieces, reached, strict=True)
        ]
        return (*found, len(shared)) if ends else tuple(found)

    def places(pieces: Sequence[bytes], reached: list[int]) -> tuple[float, ...]:
        total = max(1, reached[-1] if reached else 0)
        found = [(end - len(piece)) / total for piece, end in zip(pieces, reached, strict=True)]
        return (*found, 1.0) if ends else tuple(found)

    return Spans(
        groups(ours, our_ends), groups(theirs, their_ends), places(ours, our_ends), places(theirs, their_ends)
    )


def matched(student: TokenBytes, teacher: TokenBytes, ends: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The ids of tokens that both spell alike, of the student and of the teacher; the ends of text first.

    Special tokens, which spell nothing, are alike if they have the same name.
    """
    pairs = [ends]
    for name, index in student.special.items():
        other = teacher.special.get(name)
        if other is not None and index != ends[0] and other != ends[1]:
            pairs.append((index, other))
    for spelt, index in student.ids.items():
        theirs = teacher.ids.get(spelt)
        if theirs is not None:
            pairs.append((index, theirs))
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
