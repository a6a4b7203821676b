"""The tokenizers of a run: one for both models, or one for each and what goes between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Prompt, Response
from stillhouse.data import Data
from stillhouse.data.token_bytes import TokenBytes
from stillhouse.data.tokenise import Encoder
from stillhouse.data.translate import Translator
from stillhouse.engines import TokenizerInfo
from stillhouse.errors import ModelError
from stillhouse.models import check_same_tokenizer, load_tokenizer, tokenizer_difference
from stillhouse.objectives import Objective
from stillhouse.runs.compatibility import innermost_asking
from stillhouse.runs.config import RunConfig


@dataclass(frozen=True)
class Tokenizers:
    """What student and teacher read and write.

    Example: `Tokenizers(student=tokenizer, teacher=None)` where both are one.
    """

    student: Any
    teacher: Any = None
    """The teacher's, where it is another one."""


def tokenizers(config: RunConfig) -> Tokenizers:
    """Load them, and refuse what needs them to be one where they are not.

    Raises:
        ModelError: a tokenizer cannot be had, or the method compares or mixes single tokens of two that
            differ.
    """
    model = config.teacher.model_to_load() if config.teacher is not None else None
    ours = load_tokenizer(config.student, model)
    _check_further_teachers(config, ours)
    if model is None:
        if config.teacher is not None:
            config.teacher.check_tokenizer(ours)
        return Tokenizers(ours)
    theirs = load_tokenizer(model)
    found = tokenizer_difference(ours, theirs)
    if found is None:
        return Tokenizers(ours)
    if config.objective.shares_vocabulary:
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
            f"student and teacher have different tokenizers ({found}), but {' and '.join(reasons)}. "
            f"{_way_out(config)}"
        )
    return Tokenizers(ours, theirs)


def _check_further_teachers(config: RunConfig, ours: Any) -> None:
    """Refuse teachers other than the main one whose token ids are not the student's: they read its tokens."""
    for name, teacher in config.teachers.items():
        model = teacher.model_to_load()
        if model is None:
            teacher.check_tokenizer(ours)
        elif (found := tokenizer_difference(ours, load_tokenizer(model))) is not None:
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
    """The teacher's side of a run whose teacher has another tokenizer."""

    translator: Translator
    encoder: Encoder
    facts: TokenizerInfo

    @classmethod
    def of(cls, found: Tokenizers, data: Data, context: int | None) -> Translation | None:
        """What goes between the two tokenizers; None if there is one only.

        Args:
            found: both tokenizers.
            data: loaded with the teacher's tokenizer.
            context: the most tokens that the teacher can take.

        Raises:
            ModelError: the tokens of one of them cannot be read as bytes.
        """
        if found.teacher is None:
            return None
        assert data.encoder is not None
        encoder = data.encoder.teacher
        assert encoder is not None
        facts = TokenizerInfo((encoder.end_id,), found.teacher.pad_token_id, found.teacher)
        translator = Translator(
            TokenBytes(found.student),
            TokenBytes(found.teacher),
            (data.end_id, encoder.end_id),
            facts.pad_id,
            context,
        )
        return cls(translator, encoder, facts)

    def prompts(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """The same prompts and reference responses in the teacher's tokens."""
        return tuple(self._prompt(prompt) for prompt in prompts)

    def _prompt(self, prompt: Prompt) -> Prompt:
        assert prompt.teacher_ids is not None
        answer = None
        if prompt.response_ids is not None:
            response = Response(prompt, prompt.response_ids, "fixed", prompt.response_finished)
            found = self.translator.translate(response)
            answer = None if isinstance(found, str) else found.token_ids
        return replace(prompt, token_ids=prompt.teacher_ids, response_ids=answer, teacher_ids=None)


def describe(found: Tokenizers, config: RunConfig, data: Data) -> str:
    """In words, how the models are compared."""
    if found.teacher is None:
        return f"one for both, {len(found.student):,} ids"
    translation = Translation.of(found, data, None)
    assert translation is not None
    how = f"compared by {config.objective.name} over bytes"
    if not config.objective.needs_teacher:
        how = "the teacher only generates"
    shared = translation.translator.vocabulary_match
    return (
        f"two, {shared.sizes[0]:,} ids of the student and {shared.sizes[1]:,} of the teacher, "
        f"{shared.student.shape[0]:,} with the same bytes; {how}"
    )
