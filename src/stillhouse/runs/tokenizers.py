"""The tokenizers of a run: one for both models, or one for each and what goes between them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.core.images import expander_of, with_expander
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Prompt, Response
from stillhouse.data import Data, TeacherReads, load_data
from stillhouse.data.token_bytes import TokenBytes
from stillhouse.data.tokenise import Encoder
from stillhouse.data.translate import Translator
from stillhouse.engines import TokenizerInfo
from stillhouse.errors import ConfigError, Fault, ModelError
from stillhouse.models import (
    check_same_tokenizer,
    generation_ends,
    load_tokenizer,
    model_reader,
    shared_ids,
    student_reader,
    tokenizer_difference,
)
from stillhouse.models.from_config import config_from_options
from stillhouse.models.pruning.vocabulary import check_encodes_alike, trimmed_tokenizer
from stillhouse.objectives import Objective
from stillhouse.runs.checks import context_length, context_of_files
from stillhouse.runs.compatibility import innermost_asking
from stillhouse.runs.config import RunConfig

logger = logging.getLogger("stillhouse")

CHECKED_TEXTS = 500
"""Prompts that a trimmed tokenizer must cut as the whole one."""


@dataclass(frozen=True)
class Tokenizers:
    """What student and teacher read and write.

    Example: `Tokenizers(student=tokenizer, teacher=None)` where both are one and there is no teacher.
    """

    student: Any
    teacher: Any = None
    """The teacher's; None: it has none of its own here."""
    same_ids: bool = True
    """Whether the teacher's ids are the student's, as far as both go."""
    shared: int | None = None
    """How many ids, from the first, both have, where one vocabulary has more; None: all."""
    student_ends: tuple[int, ...] = ()
    """What ends the student's text by its generation config."""
    teacher_ends: tuple[int, ...] = ()
    """What ends the teacher's text by its generation config."""
    context: int | None = None
    """The most tokens that the teacher takes; None: unknown."""
    kept: tuple[int, ...] | None = None
    """The ids of the teacher's whole tokenizer that both models keep; None: all."""
    whole: int | None = None
    """How many tokens that one has."""
    mixed: bool = False
    """Whether both models write a text together, and so read one prompt."""

    @property
    def ids(self) -> int:
        """How many of the student's ids take part: those that a teacher with its ids has too."""
        return len(self.student) if self.shared is None else self.shared

    @property
    def reads(self) -> TeacherReads | None:
        """What the teacher's prompts depend on."""
        if self.teacher is None:
            return None if self.context is None else TeacherReads(context=self.context)
        return TeacherReads(
            self.teacher,
            other_vocabulary=not self.same_ids,
            vocab=None if self.ids == len(self.student) else self.ids,
            context=self.context,
            mixed=self.mixed,
        )

    def student_facts(self, encoder: Encoder) -> TokenizerInfo:
        """What ends the student's text, and what it may hold.

        Its own ends; with a teacher of the same ids also that one's, which it learns to end with too.
        """
        ends = (*encoder.ends, *self.student_ends)
        if self.teacher is not None and self.same_ids:
            ends += tuple(one for one in self._teacher_ends(encoder) if one < self.ids)
        return TokenizerInfo(tuple(dict.fromkeys(ends)), self.student.pad_token_id, self.student, self.shared)

    def teacher_facts(self, encoder: Encoder) -> TokenizerInfo:
        """What ends the teacher's text, in its own ids; the student's end too where it can write that."""
        ends = self._teacher_ends(encoder)
        if self.same_ids:
            ends = tuple(dict.fromkeys((*ends, encoder.end_id)))
        return TokenizerInfo(ends, self.teacher.pad_token_id, self.teacher)

    def _teacher_ends(self, encoder: Encoder) -> tuple[int, ...]:
        own = self.teacher_encoder(encoder).ends
        return tuple(dict.fromkeys((*own, *self.teacher_ends)))

    def teacher_encoder(self, encoder: Encoder) -> Encoder:
        """The encoder of the prompts as the teacher reads them.

        Args:
            encoder: the student's.
        """
        if encoder.teacher is not None:
            return encoder.teacher
        takes = not encoder.template.from_tokenizer or getattr(self.teacher, "chat_template", None)
        return Encoder(encoder.template, self.teacher if takes else encoder.tokenizer)

    def different_ends(self, encoder: Encoder) -> str | None:
        """In words, how student and teacher end their texts; None where they end alike."""
        if self.teacher is None or not self.same_ids:
            return None
        ours, theirs = dict.fromkeys((*encoder.ends, *self.student_ends)), self._teacher_ends(encoder)
        if set(ours) == set(theirs):
            return None
        end = repr(self.student.convert_ids_to_tokens(encoder.end_id))
        students, teachers = (
            " or ".join(repr(tokenizer.convert_ids_to_tokens(one)) for one in ends)
            for tokenizer, ends in ((self.student, ours), (self.teacher, theirs))
        )
        return (
            f"the student's text ends with {students}, the teacher's with {teachers}; a response is trained "
            f"to end with {end}, which takes the place of the teacher's own"
        )


def tokenizers(config: RunConfig, online: bool = True) -> Tokenizers:
    """Load them, and refuse what needs them to be one where they are not.

    Args:
        config: the run.
        online: whether servers of teachers are asked for theirs.

    Raises:
        ModelError: a tokenizer cannot be had, or the method compares or mixes single tokens of two that
            differ.
        ConfigError: the configuration has a template for a teacher that there is not.
    """
    if config.teacher is None and config.data.teacher_template is not None:
        raise ConfigError(Fault("data.teacher_template", "has no effect: there is no teacher"))
    model = config.teacher.model_to_load() if config.teacher is not None else None
    images = None if model is None else model_reader(model)
    ours = load_tokenizer(config.student, model)
    with_expander(ours, student_reader(config.student, ours, images))
    _check_further_teachers(config, ours, online)
    initial = model if config.student.from_teacher is not None else config.student
    found = Tokenizers(ours, student_ends=() if initial is None else generation_ends(initial, ours))
    if model is None:
        if config.teacher is None:
            return found
        if online or not config.teacher.addresses:
            config.teacher.check_tokenizer(ours)
        if config.teacher.of_student:
            found = replace(found, context=student_context(config, ours))
        theirs = _readers_tokenizer(config, ours)
        return found if theirs is None else _one_prompt(config, replace(found, teacher=theirs))
    theirs = with_expander(load_tokenizer(model), images)
    both = compared(
        config,
        replace(
            found,
            teacher=theirs,
            teacher_ends=generation_ends(model, theirs),
            context=context_of_files(model),
        ),
    )
    prune = config.student.from_teacher
    return _trimmed(config, both) if prune is not None and prune.vocabulary == "data" else both


def _trimmed(config: RunConfig, found: Tokenizers) -> Tokenizers:
    """The tokens that the training data use, in a tokenizer for both models: responses of `data.train`,
    and `data.text`. Other text is read in smaller pieces of these.

    Raises:
        ConfigError: a teacher's signal is kept under the ids of all tokens, there are further teachers, or
            the models read images.
    """
    assert config.teacher is not None
    path = "student.from_teacher.vocabulary"
    if expander_of(found.student) is not None:
        raise ConfigError(
            Fault(path, "data: a model that reads images keeps all tokens", hint="Use vocabulary: all.")
        )
    if config.teacher.caches or config.teachers:
        what = "further teachers" if config.teachers else f"teacher.kind={config.teacher.kind}"
        hint = "Use vocabulary: all, or one teacher of kind live."
        raise ConfigError(Fault(path, f"data: {what} would still speak of all tokens", hint=hint))
    with _without_warnings():  # of the data, which are told when they are read for the run
        data = load_data(
            config.data, found.student, needs=config.responses.requirements().data, teacher=found.reads
        )
    used = {one for prompt in data.train for one in _ids_of(prompt)}
    used |= {one for block in data.text for one in (*block.prompt.token_ids, *block.token_ids)}
    assert data.encoder is not None
    used |= {*data.encoder.ends, *found.student_ends, *found.teacher_ends, found.student.pad_token_id}
    ours, kept = trimmed_tokenizer(found.student, used)
    check_encodes_alike(ours, found.student, kept, [prompt.text for prompt in data.train[:CHECKED_TEXTS]])
    student_ends, teacher_ends = (
        tuple(kept.index(one) for one in ends) for ends in (found.student_ends, found.teacher_ends)
    )
    return replace(
        found,
        student=ours,
        teacher=ours,
        student_ends=student_ends,
        teacher_ends=teacher_ends,
        kept=kept,
        whole=len(found.student),
    )


def _ids_of(prompt: Prompt) -> Iterator[int]:
    """Every token of a prompt and of its responses, whoever reads them."""
    for ids in (
        prompt.token_ids,
        prompt.response_ids,
        prompt.rejected_ids,
        prompt.direct_ids,
        prompt.teacher_ids,
    ):
        yield from ids or ()
    for ids in prompt.context_ids.values():
        yield from ids


@contextmanager
def _without_warnings() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def compared(config: RunConfig, found: Tokenizers) -> Tokenizers:
    """Both tokenizers once they are loaded: whether they have the same ids, and how many they share.

    Raises:
        ModelError: they differ, and the method compares or mixes single tokens.
        ConfigError: student and teacher write together, and the teacher is to read another prompt.
    """
    ours, theirs = found.student, found.teacher
    difference = tokenizer_difference(ours, theirs)
    if difference is None:
        return _one_prompt(config, found)
    shared = shared_ids(ours, theirs)
    if shared is not None and _compares_shared(config, ours, shared):
        return _one_prompt(config, replace(found, shared=shared))
    _check_two(config, ours, theirs, difference)
    return replace(found, same_ids=False)


def student_context(config: RunConfig, tokenizer: Any) -> int | None:
    """The most tokens that the student takes, by its configuration; None if that does not say."""
    if config.student.from_config is None:
        return context_of_files(config.student)
    return context_length(config_from_options(config.student.from_config, len(tokenizer)))


def _readers_tokenizer(config: RunConfig, ours: Any) -> Any:
    """The tokenizer of a teacher with the student's ids that is not loaded here, for its prompts.

    That of the model behind a cache, where it is on this machine; the student's for a `teacher_template`.
    """
    assert config.teacher is not None
    model = config.teacher.model_that_reads()
    if model is not None:
        try:
            theirs = with_expander(load_tokenizer(model), model_reader(model))
        except ModelError:  # the model is on another machine, which is what the cache is for
            logger.info("%s: has no tokenizer here; the teacher's prompts are the student's", model.path)
        else:
            return theirs if tokenizer_difference(ours, theirs) is None else None
    return None if config.data.teacher_template is None else ours


def _one_prompt(config: RunConfig, found: Tokenizers) -> Tokenizers:
    """The same, told whether student and teacher write together.

    Raises:
        ConfigError: they do, and the teacher is to read another prompt.
    """
    mixed = MAIN in config.responses.requirements().same_tokenizer
    if mixed and config.data.teacher_template is not None:
        raise ConfigError(
            Fault(
                "data.teacher_template",
                "student and teacher write a text together, so they read one prompt",
                got=f"responses.kind={config.responses.kind}",
                hint="Remove it, or choose responses that each model writes alone.",
            )
        )
    return replace(found, mixed=mixed)


def _compares_shared(config: RunConfig, ours: Any, shared: int) -> bool:
    """Whether the ids that both have are enough: the student's end is one, and the student has no others or
    is compared with the teacher token by token anyway."""
    if Encoder(config.data.template, ours).end_id >= shared:
        return False
    return len(ours) == shared or MAIN in config.objective.requirements().same_tokenizer


def _check_two(config: RunConfig, ours: Any, theirs: Any, difference: str) -> None:
    """Refuse what needs one tokenizer.

    Raises:
        ModelError: the method compares or mixes single tokens.
    """
    if MAIN in config.objective.requirements().same_tokenizer:
        check_same_tokenizer(ours, theirs)
    reasons = [
        f"{path}{_kind(part)} needs both models to read the same token ids"
        for path, part in innermost_asking(
            config.stating_parts, lambda requirements: MAIN in requirements.same_tokenizer
        )
    ]
    if config.data.text is not None and _teacher_on_text(config):
        reasons.append(f"objective={config.objective.name} compares with the teacher on data.text")
    if reasons:
        raise ModelError(
            f"student and teacher have different tokenizers ({difference}), but {' and '.join(reasons)}. "
            f"{_way_out(config)}"
        )


def _check_further_teachers(config: RunConfig, ours: Any, online: bool) -> None:
    """Refuse teachers other than the main one that lack ids of the student's: they read its tokens. What they
    have more, behind all of these, is not compared."""
    for name, teacher in config.teachers.items():
        model = teacher.model_to_load()
        if model is None:
            if online or not teacher.addresses:
                teacher.check_tokenizer(ours)
            continue
        theirs = load_tokenizer(model)
        found = tokenizer_difference(ours, theirs)
        if found is not None and shared_ids(ours, theirs) != len(ours):
            raise ModelError(
                f"teachers.{name}: student and teacher have different tokenizers: {found}. Only the main "
                "teacher, under teacher, may have a tokenizer of its own. Take a model with the student's."
            )


def _kind(part: Any) -> str:
    return f".kind={part.kind}" if hasattr(part, "kind") else ""


def _teacher_on_text(config: RunConfig) -> bool:
    """Whether plain text is compared with the teacher."""
    objective: Objective = config.objective
    return (objective.for_source("text") or objective).needs_teacher


def _way_out(config: RunConfig) -> str:
    if config.data.text is not None:
        return "Give plain text an objective of its own, such as objective.text: cross_entropy."
    return "Take a teacher with the student's tokenizer, or other responses."


@dataclass(frozen=True)
class Translation:
    """The teacher's side of a run: its prompts, its ends and, with another vocabulary, what goes between."""

    encoder: Encoder
    """Makes the teacher's prompts."""
    facts: TokenizerInfo
    """What ends its text."""
    end_id: int
    """The student's end of a response."""
    translator: Translator | None = None
    """None where the teacher's ids are the student's."""

    @classmethod
    def of(cls, found: Tokenizers, data: Data, context: int | None) -> Translation | None:
        """The teacher's side; None where nothing is known about it.

        Args:
            found: both tokenizers.
            data: loaded with them.
            context: the most tokens that the teacher can take.

        Raises:
            ModelError: the tokens of one of two vocabularies cannot be read as bytes.
        """
        if found.teacher is None or data.encoder is None:
            return None
        encoder = found.teacher_encoder(data.encoder)
        facts = found.teacher_facts(data.encoder)
        translator = None
        if not found.same_ids:
            translator = Translator(
                TokenBytes(found.student),
                TokenBytes(found.teacher),
                (data.end_id, encoder.end_id),
                facts.pad_id,
                context,
            )
        return cls(encoder, facts, data.end_id, translator)

    def prompts(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """The same prompts and reference responses as the teacher reads and writes them."""
        return tuple(self._prompt(prompt) for prompt in prompts)

    def _prompt(self, prompt: Prompt) -> Prompt:
        ids, answer = prompt.teacher_ids or prompt.token_ids, prompt.response_ids
        if answer is not None and self.translator is not None:
            found = self.translator.translate(Response(prompt, answer, "fixed", prompt.response_finished))
            answer = None if isinstance(found, str) else found.token_ids
        elif answer is not None and prompt.response_finished:
            answer = (*answer[:-1], self.encoder.end_id)
        return replace(prompt, token_ids=ids, response_ids=answer, rejected_ids=None, teacher_ids=None)


def describe(found: Tokenizers, config: RunConfig, data: Data) -> str:
    """In words, how the models are compared."""
    if found.same_ids:
        more = "" if found.shared is None else f"; shared: {found.shared:,}, what is beyond is not compared"
        return f"one for both, {len(found.student):,} ids{more}"
    translation = Translation.of(found, data, None)
    assert translation is not None
    assert translation.translator is not None
    how = f"compared by {config.objective.name} over bytes"
    if not config.objective.needs_teacher:
        how = "the teacher only generates"
    shared = translation.translator.vocabulary_match
    return (
        f"two, {shared.sizes[0]:,} ids of the student and {shared.sizes[1]:,} of the teacher, "
        f"{shared.student.shape[0]:,} with the same bytes; {how}"
    )


def format_notes(found: Tokenizers, data: Data) -> dict[str, str]:
    """What a user should know of prompts and ends that differ between student and teacher, by name."""
    if data.encoder is None or found.teacher is None:
        return {}
    notes = {}
    own = data.encoder.teacher
    if found.same_ids and own is not None and not own.differs_in_images:
        notes["teacher's prompts"] = (
            f"its own, by template {own.template.kind} of its tokenizer; the student's: "
            f"{data.encoder.template.kind}"
        )
    if (ends := found.different_ends(data.encoder)) is not None:
        notes["ends of responses"] = ends
    return notes
