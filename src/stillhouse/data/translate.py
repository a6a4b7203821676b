"""A teacher with another tokenizer: the student's prompts and responses in the teacher's tokens.

The student's token ids stay as they are. The bytes of its response are the text; the teacher reads its own
prompt and the same bytes in its own tokens, whatever the boundaries of the student's tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from stillhouse.core.alignment import UNALIGNED, TokenAlignment, VocabularyMatch
from stillhouse.core.batch import TokenBatch
from stillhouse.core.types import Completion, Response, images_of
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
        >>> student, teacher = TokenBytes(student_tokenizer), TokenBytes(teacher_tokenizer)
        >>> translator = Translator(student, teacher, end_ids=(2, 50256), pad_id=50256)
        >>> batch, alignment = translator.teacher_batch(responses)
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
        student, teacher = match_vocabularies(self.student, self.teacher, self.end_ids)
        return VocabularyMatch(np.array(student), np.array(teacher), (len(self.student), len(self.teacher)))

    def translate(self, response: Response) -> TranslatedResponse | str:
        """The response in the teacher's tokens, or the reason why it cannot be translated."""
        if response.teacher_reads_instead is not None:
            return self._read_in_its_place(response)
        ids, finished = list(response.token_ids), response.finished
        if finished and (ids[-1] == self.end_ids[0] or not self.student.pieces(ids[-1:])[0]):
            ids.pop()  # whichever of the student's end tokens it is
        else:
            finished = False
        pieces = self.student.pieces(ids)
        teacher_ids = self._teacher_ids(ids, pieces)
        if teacher_ids is None:
            return "the teacher's tokenizer cannot represent it exactly"
        length = len(response.prompt.teacher_ids or ()) + len(teacher_ids) + finished
        if self._context is not None and length > self._context:
            return f"longer than the teacher's context of {self._context} tokens"
        if not teacher_ids and not finished:
            return "it has no text"
        spans = align(pieces, self.teacher.pieces(teacher_ids), finished)
        return TranslatedResponse((*teacher_ids, self.end_ids[1]) if finished else tuple(teacher_ids), spans)

    def _read_in_its_place(self, response: Response) -> TranslatedResponse | str:
        """Of a response in whose place the teacher reads another one: that, all of both in one group."""
        instead = response.teacher_reads_instead
        assert instead is not None
        found = self.translate(replace(response, token_ids=instead, teacher_reads_instead=None))
        if isinstance(found, str):
            return found
        return replace(found, spans=Spans.whole(len(response.token_ids), len(found.token_ids)))

    def _teacher_ids(self, ids: Sequence[int], pieces: Sequence[bytes]) -> list[int] | None:
        """The teacher's ids of a response: control tokens that both have by name, other text as bytes."""
        found: list[int] = []
        text = b""
        for index, piece in zip([*ids, None], [*pieces, b""], strict=True):
            control = None if index is None else self._shared_control.get(index)
            if index is not None and control is None:
                text += piece
                continue
            encoded = self.teacher.encode(text) if text else []
            if encoded is None:
                return None
            found += encoded if control is None else [*encoded, control]
            text = b""
        return found

    @cached_property
    def _shared_control(self) -> dict[int, int]:
        """The teacher's id of each control token of the student that both spell, such as `<think>`."""
        theirs = self.teacher.texts.control
        pairs = {index: theirs[name] for name, index in self.student.texts.control.items() if name in theirs}
        return {
            ours: other
            for ours, other in pairs.items()
            if self.student.bytes_of_id.get(ours) == self.teacher.bytes_of_id.get(other)
        }

    def teacher_batch(self, responses: Sequence[Response]) -> tuple[TokenBatch, TokenAlignment]:
        """The teacher's input for a micro-batch, and the alignment of its rows with the student's.

        A response that cannot be translated is counted as dropped: it has no response tokens for the teacher
        and groups of -1, so that it is not compared. Nor is plain text, which has no prompt.
        """
        translated = [self._translate_and_count(response) for response in responses]
        prompts = [response.prompt.teacher_ids or (self._pad_id,) for response in responses]
        sequences = [
            prompt if one is None else (*prompt, *one.token_ids)
            for prompt, one in zip(prompts, translated, strict=True)
        ]
        images = images_of([response.prompt for response in responses])
        batch = TokenBatch.of(sequences, [len(one) for one in prompts], self._pad_id, images=images)
        return batch, self._alignment(responses, translated)

    def _alignment(
        self, responses: Sequence[Response], known: Sequence[TranslatedResponse | None]
    ) -> TokenAlignment:
        """The groups of a micro-batch, numbered through it."""
        student, teacher = _Column(), _Column()
        first = 0
        for row, (response, one) in enumerate(zip(responses, known, strict=True)):
            if one is None:
                count = len(response.token_ids)
                student.add(row, [UNALIGNED] * count, [0.0] * count, first)
                continue
            student.add(row, one.spans.student, one.spans.student_places, first)
            teacher.add(row, one.spans.teacher, one.spans.teacher_places, first)
            first += one.spans.count
        labels = [label for one in known if one is not None for label in one.token_ids]
        return TokenAlignment(
            student_groups=np.array(student.groups, dtype=np.int64),
            teacher_groups=np.array(teacher.groups, dtype=np.int64),
            teacher_labels=np.array(labels, dtype=np.int64),
            student_sequences=np.array(student.sequences, dtype=np.int64),
            teacher_sequences=np.array(teacher.sequences, dtype=np.int64),
            student_places=np.array(student.places, dtype=np.float32),
            teacher_places=np.array(teacher.places, dtype=np.float32),
            matching=self.vocabulary_match,
        )

    def to_student(self, completion: Completion, limit: int) -> Completion:
        """A completion of the teacher in the student's tokens, truncated to `limit` tokens.

        Bytes that the student's tokenizer cannot represent, such as half a character at the end, are dropped.
        """
        ids = list(completion.token_ids)
        if completion.finished and ids:  # by whichever of the teacher's end tokens
            ids.pop()
        text = b"".join(self.teacher.pieces(ids))
        student_ids = (
            self.student.encode(text) or self.student.encode(text.decode(errors="ignore").encode()) or []
        )
        whole = (*student_ids, self.end_ids[0]) if completion.finished else tuple(student_ids)
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
class _Column:
    """One model's rows of a micro-batch while they are collected."""

    groups: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    places: list[float] = field(default_factory=list)

    def add(self, sequence: int, groups: Sequence[int], places: Sequence[float], first: int) -> None:
        """A response, its groups counted from `first`."""
        self.groups += [group if group == UNALIGNED else group + first for group in groups]
        self.sequences += [sequence] * len(groups)
        self.places += places
