"""The prompts of a teacher that does not read the student's: another template, another tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stillhouse.core.images import expander_of, with_expander
from stillhouse.data.templates import Template, Tokenizer
from stillhouse.data.tokenise import Encoder


class TemplatePair(NamedTuple):
    """`data.template` and `data.teacher_template`. Example: `TemplatePair(Auto(), teacher=None)`"""

    student: Template
    teacher: Template | None


@dataclass(frozen=True, slots=True)
class TeacherReads:
    """What the prompts of a teacher depend on.

    Example: `TeacherReads(tokenizer, context=4096)`
    """

    tokenizer: Tokenizer | None = None
    """The teacher's; None: the teacher reads the student's prompts."""
    other_vocabulary: bool = False
    """Whether its ids are not the student's."""
    vocab: int | None = None
    """How many of the student's ids it can read, where these are not all."""
    context: int | None = None
    """The most tokens that it takes; None: unknown."""
    mixed: bool = False
    """Whether student and teacher write a text together, and so read one prompt."""

    def cannot_read(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int] | None,
        teacher_ids: Sequence[int] | None,
        room: int,
    ) -> str | None:
        """Why the teacher cannot read a row; None if it can. Its prompt is never cut.

        Args:
            prompt_ids: the student's.
            response_ids: of the data set, if it has one.
            teacher_ids: the teacher's prompt; None where it reads the student's.
            room: tokens that the response may take.
        """
        read = (*(teacher_ids or prompt_ids), *(response_ids or ()))
        if self.vocab is not None and max(read) >= self.vocab:
            return "a token that the teacher does not have"
        if teacher_ids is None or self.context is None or len(teacher_ids) + room <= self.context:
            return None
        return "prompt too long for the teacher"


def teacher_encoder(
    settled: Template, config: TemplatePair, tokenizer: Tokenizer, teacher: TeacherReads | None
) -> Encoder | None:
    """The encoder of a teacher that reads prompts of its own; None if it reads the student's.

    With the student's vocabulary it has its own prompts by `data.teacher_template`, or where `data.template`
    is the chat template of a tokenizer and its tokenizer has another one than the student's.

    Args:
        settled: the template of the student's prompts.
        config: the templates of the configuration.
        tokenizer: the student's.
        teacher: what the teacher's prompts depend on; None: nothing is known of it.
    """
    if teacher is None or teacher.tokenizer is None:
        return None
    theirs, own = teacher.tokenizer, config.teacher
    if teacher.other_vocabulary:
        return Encoder(own or config.student, theirs)
    images = None
    if expander_of(tokenizer) is not None:  # else no row has images
        images = Encoder(settled, _with_images_of(theirs, tokenizer), differs_in_images=True)
    chats = config.student.from_tokenizer and getattr(theirs, "chat_template", None)
    if own is None and (teacher.mixed or not chats):
        return images
    found = (own or config.student).resolved(theirs)
    if found != config.student.resolved(tokenizer):
        return Encoder(found, theirs)
    alike = not found.from_tokenizer or theirs.chat_template == tokenizer.chat_template
    return images if alike else Encoder(settled, theirs)


def _with_images_of(teachers: Tokenizer, students: Tokenizer) -> Tokenizer:
    """The student's tokenizer for the images of the teacher, which writes them in its own way."""
    both = with_expander(copy.copy(students), expander_of(teachers))
    both.name_or_path = teachers.name_or_path
    return both
