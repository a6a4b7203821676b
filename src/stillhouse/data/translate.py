"""A teacher with another tokenizer: the same prompts and responses in its ids, beside the student's batch.

The student's token ids stay as they are. Its response is taken as the bytes that it spells; the teacher reads
its own prompt and the same bytes in its own tokens, and learns nothing of how the student cut them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stillhouse.core.alignment import NOTHING, TokenAlignment, VocabularyMatch
from stillhouse.core.batch import IGNORED
from stillhouse.core.types import Completion, Response
from stillhouse.data.align import Spans, align, match_vocabularies
from stillhouse.data.token_bytes import TokenBytes

logger = logging.getLogger("stillhouse")


@dataclass(frozen=True, slots=True)
class Translated:
    """A response as the teacher reads it.

    Example: `Translated(token_ids=(17, 4, 0), spans=Spans((0, 1), (0, 0, 1), ...))`
    """

    token_ids: tuple[int, ...]
    """Ends with the teacher's end token if the student's response is finished."""
    spans: Spans


class Translator:
    """Between the two tokenizers of a run.

    Example:
        >>> translator = Translator(TokenBytes(ours), TokenBytes(theirs), ends=(2, 50256), pad_id=50256)
        >>> batch |= translator.beside(responses)
    """

    def __init__(
        self,
        student: TokenBytes,
        teacher: TokenBytes,
        ends: tuple[int, int],
        pad_id: int,
        context: int | None = None,
    ) -> None:
        """Put two tokenizers side by side.

        Args:
            student: what the student's tokens spell.
            teacher: what the teacher's tokens spell.
            ends: the tokens that end a response, of the student and of the teacher.
            pad_id: fills the right of the teacher's shorter sequences.
            context: the most tokens that the teacher can take; None: nobody knows.
        """
        self.student = student
        self.teacher = teacher
        self.ends = ends
        self.counts: Counter[str] = Counter()
        """Since it was last emptied: responses, dropped, groups, single (groups of one token each)."""
        self._pad_id = pad_id
        self._context = context
        self._told: set[str] = set()

    @cached_property
    def matching(self) -> VocabularyMatch:
        """The tokens that both spell alike."""
        ours, theirs = match_vocabularies(self.student, self.teacher, self.ends)
        return VocabularyMatch(
            torch.tensor(ours), torch.tensor(theirs), (len(self.student), len(self.teacher))
        )

    def translate(self, response: Response) -> Translated | str:
        """The response in the teacher's tokens, or why there is none."""
        ids, ends = list(response.token_ids), response.finished
        if ends and ids[-1] == self.ends[0]:
            ids.pop()
        else:
            ends = False
        pieces = self.student.pieces(ids)
        theirs = self.teacher.encode(b"".join(pieces))
        if theirs is None:
            return "the teacher's tokenizer cannot spell it"
        room = len(response.prompt.teacher_ids or ()) + len(theirs) + ends
        if self._context is not None and room > self._context:
            return f"longer than the teacher's context of {self._context} tokens"
        if not theirs and not ends:
            return "it spells nothing"
        spans = align(pieces, self.teacher.pieces(theirs), ends)
        return Translated((*theirs, self.ends[1]) if ends else tuple(theirs), spans)

    def beside(self, responses: Sequence[Response]) -> dict[str, Tensor]:
        """What a micro-batch needs beside the student's tensors.

        A response that cannot be translated gets no rows of the teacher and groups of -1: it is compared
        with nothing, and counted. Plain text has no prompt and is left out.

        Returns:
            teacher_input_ids, teacher_attention_mask, teacher_response_mask, teacher_labels, teacher_groups,
            teacher_places [B, T'], as `collate` has them for the student; student_groups and student_places
            [B, T]. Groups are numbered through the batch.
        """
        known = [self._counted(response) for response in responses]
        prompts = [response.prompt.teacher_ids or (self._pad_id,) for response in responses]
        lengths = [
            len(prompt) + (0 if one is None else len(one.token_ids))
            for prompt, one in zip(prompts, known, strict=True)
        ]
        theirs = _Sheet.blank(len(responses), max(lengths), self._pad_id)
        ours = _Sheet.blank(
            len(responses), max(len(r.prompt.token_ids) + len(r.token_ids) for r in responses), self._pad_id
        )
        first = 0
        for row, (response, prompt, one) in enumerate(zip(responses, prompts, known, strict=True)):
            theirs.input_ids[row, : len(prompt)] = torch.tensor(prompt)
            theirs.attention_mask[row, : lengths[row]] = 1
            if one is None:
                continue
            theirs.write(row, len(prompt), one.token_ids)
            theirs.place(row, len(prompt), one.spans.teacher, one.spans.teacher_places, first)
            start = len(response.prompt.token_ids)
            ours.place(row, start, one.spans.student, one.spans.student_places, first)
            first += one.spans.count
        return {
            **{f"teacher_{name}": getattr(theirs, name) for name in _Sheet.__dataclass_fields__},
            "student_groups": ours.groups,
            "student_places": ours.places,
        }

    def to_student(self, completion: Completion, limit: int) -> Completion:
        """What the teacher wrote, in the student's tokens: new text, tokenised once.

        Bytes that the student cannot spell, such as half a character at the end, are left out.
        """
        ids = list(completion.token_ids)
        if completion.finished and ids and ids[-1] == self.ends[1]:
            ids.pop()
        text = b"".join(self.teacher.pieces(ids))
        ours = self.student.encode(text) or self.student.encode(text.decode(errors="ignore").encode()) or []
        whole = (*ours, self.ends[0]) if completion.finished else tuple(ours)
        cut = whole[:limit] or (self.ends[0],)
        return Completion(cut, cut[-1] == self.ends[0])

    def facts(self) -> dict[str, tuple[float, float]]:
        """Sums and counts for the metrics log since the last call."""
        counts, self.counts = self.counts, Counter()
        return {
            "alignment/dropped": (counts["dropped"], counts["responses"]),
            "alignment/one_to_one": (counts["single"], counts["groups"]),
        }

    def _counted(self, response: Response) -> Translated | None:
        if response.source == "text":
            return None
        found = self.translate(response)
        self.counts["responses"] += 1
        if isinstance(found, str):
            self.counts["dropped"] += 1
            if found not in self._told:
                self._told.add(found)
                logger.warning(
                    "A response to %s is not compared with the teacher: %s. Such responses are counted as "
                    "alignment/dropped in the metrics.",
                    response.prompt.id,
                    found,
                )
            return None
        self.counts["groups"] += found.spans.count
        self.counts["single"] += found.spans.one_to_one
        return found


@dataclass(slots=True)
class _Sheet:
    """Tensors [B, T] of one model while they are filled."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    labels: Tensor
    groups: Tensor
    places: Tensor

    @classmethod
    def blank(cls, rows: int, width: int, pad_id: int) -> _Sheet:
        shape = (rows, width)
        return cls(
            torch.full(shape, pad_id),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
            torch.full(shape, IGNORED),
            torch.full(shape, NOTHING),
            torch.zeros(shape),
        )

    def write(self, row: int, start: int, ids: Sequence[int]) -> None:
        """A response after a prompt of `start` tokens."""
        answer = torch.tensor(ids)
        self.input_ids[row, start : start + len(ids)] = answer
        self.response_mask[row, start - 1 : start - 1 + len(ids)] = True
        self.labels[row, start - 1 : start - 1 + len(ids)] = answer

    def place(self, row: int, start: int, groups: Sequence[int], places: Sequence[float], first: int) -> None:
        """Groups and places at the positions that predict a response, groups counted from `first`."""
        where = slice(start - 1, start - 1 + len(groups))
        numbers = torch.tensor(groups)
        self.groups[row, where] = torch.where(numbers == NOTHING, numbers, numbers + first)
        self.places[row, where] = torch.tensor(places)


def alignment_of(batch: Mapping[str, Tensor], matching: VocabularyMatch) -> TokenAlignment:
    """What a micro-batch with `Translator.beside` in it says about the rows of both models."""
    ours, theirs = batch["response_mask"], batch["teacher_response_mask"]
    return TokenAlignment(
        student_groups=batch["student_groups"][ours],
        teacher_groups=batch["teacher_groups"][theirs],
        teacher_labels=batch["teacher_labels"][theirs],
        student_sequences=ours.nonzero()[:, 0],
        teacher_sequences=theirs.nonzero()[:, 0],
        student_places=batch["student_places"][ours],
        teacher_places=batch["teacher_places"][theirs],
        matching=matching,
    )
