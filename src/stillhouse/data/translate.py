"""A teacher with another tokenizer: the student's prompts and responses in the teacher's tokens.

The student's token ids stay as they are. The bytes of its response are the text; the teacher reads its own
prompt and the same bytes in its own tokens, whatever the boundaries of the student's tokens.
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
class TranslatedResponse:
    """A response in the teacher's tokens, aligned with the student's.

    Example: `TranslatedResponse(token_ids=(17, 4, 0), spans=Spans((0, 1), (0, 0, 1), ...))`
    """

    token_ids: tuple[int, ...]
    """Ends with the teacher's end token if the student's response is finished."""
    spans: Spans


class Translator:
    """Translates responses between the tokenizers of student and teacher.

    Example:
        >>> translator = Translator(TokenBytes(ours), TokenBytes(theirs), end_ids=(2, 50256), pad_id=50256)
        >>> batch |= translator.teacher_inputs(responses)
    """

    def __init__(
        self,
        student: TokenBytes,
        teacher: TokenBytes,
        end_ids: tuple[int, int],
        pad_id: int,
        context: int | None = None,
    ) -> None:
        """A translator between two tokenizers.

        Args:
            student: the bytes of the student's tokens.
            teacher: the bytes of the teacher's tokens.
            end_ids: the end tokens of a response, of the student and of the teacher.
            pad_id: the right padding of the teacher's sequences.
            context: the teacher's maximum sequence length; None: unknown.
        """
        self.student = student
        self.teacher = teacher
        self.end_ids = end_ids
        self.counts: Counter[str] = Counter()
        """Since the last `metrics`: responses, dropped, groups, one_to_one (groups of one token each)."""
        self._pad_id = pad_id
        self._context = context
        self._logged: set[str] = set()

    @cached_property
    def vocabulary_match(self) -> VocabularyMatch:
        """The tokens with the same bytes in both vocabularies."""
        ours, theirs = match_vocabularies(self.student, self.teacher, self.end_ids)
        return VocabularyMatch(
            torch.tensor(ours), torch.tensor(theirs), (len(self.student), len(self.teacher))
        )

    def translate(self, response: Response) -> TranslatedResponse | str:
        """The response in the teacher's tokens, or the reason why it cannot be translated."""
        ids, finished = list(response.token_ids), response.finished
        if finished and ids[-1] == self.end_ids[0]:
            ids.pop()
        else:
            finished = False
        pieces = self.student.pieces(ids)
        theirs = self.teacher.encode(b"".join(pieces))
        if theirs is None:
            return "the teacher's tokenizer cannot represent it exactly"
        length = len(response.prompt.teacher_ids or ()) + len(theirs) + finished
        if self._context is not None and length > self._context:
            return f"longer than the teacher's context of {self._context} tokens"
        if not theirs and not finished:
            return "it has no text"
        spans = align(pieces, self.teacher.pieces(theirs), finished)
        return TranslatedResponse((*theirs, self.end_ids[1]) if finished else tuple(theirs), spans)

    def teacher_inputs(self, responses: Sequence[Response]) -> dict[str, Tensor]:
        """The teacher's tensors of a micro-batch, and the groups of both models.

        A response that cannot be translated is counted as dropped: it has no response tokens for the teacher
        and groups of -1, so that it is not compared. Nor is plain text, which has no prompt.

        Returns:
            teacher_input_ids, teacher_attention_mask, teacher_response_mask, teacher_labels, teacher_groups,
            teacher_places [B, T'], as `collate` makes them for the student; student_groups and student_places
            [B, T]. Groups are numbered through the batch.
        """
        known = [self._translate_and_count(response) for response in responses]
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
        """A completion of the teacher in the student's tokens, truncated to `limit` tokens.

        Bytes that the student's tokenizer cannot represent, such as half a character at the end, are dropped.
        """
        ids = list(completion.token_ids)
        if completion.finished and ids and ids[-1] == self.end_ids[1]:
            ids.pop()
        text = b"".join(self.teacher.pieces(ids))
        ours = self.student.encode(text) or self.student.encode(text.decode(errors="ignore").encode()) or []
        whole = (*ours, self.end_ids[0]) if completion.finished else tuple(ours)
        cut = whole[:limit] or (self.end_ids[0],)
        return Completion(cut, cut[-1] == self.end_ids[0])

    def metrics(self) -> dict[str, tuple[float, float]]:
        """(Sum, count) of each metric since the last call."""
        counts, self.counts = self.counts, Counter()
        return {
            "alignment/dropped": (counts["dropped"], counts["responses"]),
            "alignment/one_to_one": (counts["one_to_one"], counts["groups"]),
        }

    def _translate_and_count(self, response: Response) -> TranslatedResponse | None:
        if response.source == "text":
            return None
        translated = self.translate(response)
        self.counts["responses"] += 1
        if isinstance(translated, str):
            self.counts["dropped"] += 1
            if translated not in self._logged:
                self._logged.add(translated)
                logger.warning(
                    "A response to %s is not compared with the teacher: %s. Such responses are counted as "
                    "alignment/dropped in the metrics.",
                    response.prompt.id,
                    translated,
                )
            return None
        self.counts["groups"] += translated.spans.count
        self.counts["one_to_one"] += translated.spans.one_to_one
        return translated


@dataclass(slots=True)
class _Sheet:
    """Tensors [B, T] of one model under construction."""

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
        """Write a response after a prompt of `start` tokens."""
        answer = torch.tensor(ids)
        self.input_ids[row, start : start + len(ids)] = answer
        self.response_mask[row, start - 1 : start - 1 + len(ids)] = True
        self.labels[row, start - 1 : start - 1 + len(ids)] = answer

    def place(self, row: int, start: int, groups: Sequence[int], places: Sequence[float], first: int) -> None:
        """Write the groups, numbered from `first`, and places at the positions that predict a response."""
        positions = slice(start - 1, start - 1 + len(groups))
        group_ids = torch.tensor(groups)
        self.groups[row, positions] = torch.where(group_ids == NOTHING, group_ids, group_ids + first)
        self.places[row, positions] = torch.tensor(places)


def alignment_of(batch: Mapping[str, Tensor], vocabulary_match: VocabularyMatch) -> TokenAlignment:
    """The alignment of the rows of both models in a micro-batch with `Translator.teacher_inputs`."""
    ours, theirs = batch["response_mask"], batch["teacher_response_mask"]
    return TokenAlignment(
        student_groups=batch["student_groups"][ours],
        teacher_groups=batch["teacher_groups"][theirs],
        teacher_labels=batch["teacher_labels"][theirs],
        student_sequences=ours.nonzero()[:, 0],
        teacher_sequences=theirs.nonzero()[:, 0],
        student_places=batch["student_places"][ours],
        teacher_places=batch["teacher_places"][theirs],
        matching=vocabulary_match,
    )
