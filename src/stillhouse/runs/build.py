"""Builds the parts of a run from its configuration, in the order in which they depend on each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import nn

from stillhouse.core.requirements import MAIN
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Response
from stillhouse.data import Data, load_data
from stillhouse.data.tokenise import Encoder
from stillhouse.data.translate import Translator
from stillhouse.engines import Engine, Sampling, ServerEngine, TokenizerInfo
from stillhouse.errors import ModelError
from stillhouse.models import (
    fingerprint,
    load_student,
    load_teacher,
    local_device,
    parameter_counts,
    unwrap,
)
from stillhouse.rollouts import ResponseGenerator, RolloutContext
from stillhouse.rollouts.base import ModelPair
from stillhouse.rollouts.offline.filters.overlap import held_out_texts
from stillhouse.rollouts.offline.scoring import scorers
from stillhouse.runs.checks import context_length, longest_sequence
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.servers import teacher_text_server
from stillhouse.runs.tokenizers import Translation, tokenizers
from stillhouse.train.step import Method, Step


@dataclass
class Parts:
    """Everything that a run works with."""

    config: RunConfig
    tokenizer: Any
    facts: TokenizerInfo
    student: nn.Module
    teacher: nn.Module | None
    vocab: int
    data: Data
    translation: Translation | None = None
    """Between the two tokenizers, where the teacher has another one."""

    @property
    def sampling(self) -> Sampling:
        """How text is written by default: `engine.sampling`, with data.max_response as its length limit."""
        return self.limited(self.config.engine.sampling)

    def limited(self, sampling: Sampling) -> Sampling:
        """The sampling with data.max_response as its length limit, unless it sets one."""
        if "max_tokens" in sampling.model_fields_set:
            return sampling
        limited: Sampling = sampling.model_copy(update={"max_tokens": self.config.data.max_response})
        return limited

    @property
    def contexts(self) -> dict[str, int | None]:
        """The most tokens that each model can take."""
        models = {"student": self.student, "teacher": self.teacher}
        return {
            name: context_length(unwrap(model).config) for name, model in models.items() if model is not None
        }

    @property
    def translator(self) -> Translator | None:
        """What goes between the two tokenizers, where the teacher has another one."""
        return None if self.translation is None else self.translation.translator

    @property
    def comparable(self) -> nn.Module | None:
        """The teacher, where its distributions can be compared with the student's token by token."""
        return self.teacher if self.translation is None else None

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens of a response as text, as the evaluation reads them."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def engine(self, model: nn.Module) -> Engine:
        """The configured engine over one of the models."""
        if model is self.teacher:
            assert self.teacher_engine is not None
            return self.teacher_engine
        engine: Engine = self.config.engine.for_student().build(model, self.facts)
        return engine

    @cached_property
    def teacher_engine(self) -> Engine | None:
        """What generates the teacher's text: its own server, or the configured engine over it."""
        facts = self.facts if self.translation is None else self.translation.facts
        if (server := teacher_text_server(self.config)) is not None:
            return server.build(None, facts)
        if self.teacher is None:
            return None
        engine: Engine = self.config.engine.build(self.teacher, facts)
        return engine

    def model_facts(self) -> dict[str, Any]:
        """What the run folder keeps about the models."""
        student = {"path": self.config.student.path, **parameter_counts(self.student), "vocab": self.vocab}
        teacher = None
        if self.teacher is not None and self.config.teacher is not None:
            teacher = {"path": getattr(self.config.teacher, "path", None), **parameter_counts(self.teacher)}
        return {"student": student, "teacher": teacher}


def assemble(config: RunConfig) -> Parts:
    """Load tokenizer, teacher, student and data; the cheapest checks come first.

    Raises:
        ModelError: a model or tokenizer cannot be had, or the two do not fit.
        DataError: the data cannot be used.
    """
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # bars for shards of weights would break up ours
    set_seed(config.train.seed)
    teacher_model = config.teacher.model_to_load() if config.teacher is not None else None
    found = tokenizers(config)
    tokenizer = found.student
    data = load_data(
        config.data,
        tokenizer,
        needs_response="responses" in config.responses.requirements().data,
        teacher_tokenizer=found.teacher,
    )
    if config.teacher is not None and config.objective.needs_teacher:
        config.teacher.check_signal(longest_sequence(config, data.train))
    teacher = load_teacher(teacher_model) if teacher_model is not None else None
    student = load_student(config.student, tokenizer, teacher, config.train.seed)
    _finite("student", student)
    if teacher is not None:
        _finite("teacher", teacher)
    device = local_device()
    facts = TokenizerInfo((data.end_id,), tokenizer.pad_token_id, tokenizer)
    context = None if teacher is None else context_length(unwrap(teacher).config)
    parts = Parts(
        config,
        tokenizer,
        facts,
        student.to(device),
        None if teacher is None else teacher.to(device),
        len(tokenizer),
        data,
        Translation.of(found, data, context),
    )
    if config.responses.requirements().asks(MAIN, "text"):
        _ = parts.teacher_engine  # a server that cannot write is told of before anything is evaluated
    return parts


def _finite(name: str, model: nn.Module) -> None:
    """Refuse weights that would make every loss NaN."""
    broken = [key for key, weights in model.named_parameters() if not torch.isfinite(weights).all()]
    if broken:
        raise ModelError(
            f"{name}: {len(broken)} of its weights hold NaN or infinity, first {broken[0]}. The model was "
            "saved after its training broke down, or does not fit its number format. "
            "Take another copy."
        )


def make_context(
    parts: Parts,
    folder: RunFolder,
    version: Callable[[], int | None],
    on_tokens: Callable[[int], None] | None = None,
) -> RolloutContext:
    """What the run's response policy may use.

    Args:
        parts: what `assemble` gave.
        folder: where rounds of responses are kept.
        version: the optimiser step whose weights the student has now.
        on_tokens: called with the number of tokens whenever a model has written.
    """
    student = ResponseGenerator(
        parts.engine(parts.student),
        "student",
        parts.sampling,
        version,
        partial(fingerprint, parts.student),
        on_tokens=on_tokens,
    )
    teacher = models = None
    if (
        parts.config.responses.requirements().asks(MAIN, "text")
        and (engine := parts.teacher_engine) is not None
    ):
        if isinstance(engine, ServerEngine):
            engine.use_journal(folder.responses / "answers.jsonl")
        writes = partial(fingerprint, parts.teacher) if parts.teacher is not None else lambda: "unknown"
        teacher = ResponseGenerator(
            engine,
            "teacher",
            parts.sampling,
            lambda: None,
            engine.fingerprint if isinstance(engine, ServerEngine) else cache(writes),
            on_tokens=on_tokens,
            translator=parts.translator,
        )
    if parts.teacher is not None:
        models = ModelPair(parts.student, parts.teacher, parts.facts, parts.vocab)
    return RolloutContext(
        parts.data.train,
        student,
        teacher,
        folder.responses,
        parts.config.train.seed,
        models=models,
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        decode=parts.decode,
        scorers=scorers(
            {"student": parts.student, "teacher": parts.comparable},
            parts.facts.pad_id,
            parts.vocab,
            parts.config.evaluate.batch_size,
        ),
        held_out=cache(partial(held_out_texts, parts.config.evaluation_sets())),
        external_responses=parts.config.responses.external_responses(
            parts.config.data, Encoder(parts.config.data.template, parts.tokenizer)
        ),
    )


def make_step(parts: Parts, folder: RunFolder, version: Callable[[], int]) -> Step:
    """The step of the configured method over loaded parts; the arguments are those of `make_context`."""
    config = parts.config

    def written(tokens: int) -> None:
        step.meter.add("tokens/generate", tokens)

    context = make_context(parts, folder, version, written)
    signal = None
    if config.teacher is not None and config.objective.needs_teacher:
        vocab = parts.vocab if parts.translator is None else len(parts.translator.teacher)
        signal = config.teacher.build(parts.teacher, vocab)
    step = Step(
        Method(config.responses, config.objective, config.train.normalise),
        config.responses.build(context),
        signal,
        pad_id=parts.facts.pad_id,
        vocab=parts.vocab,
        text=_text(parts.data.text, config.train.seed, context.rank) if parts.data.text else None,
        memory=None if config.teacher is not None and config.teacher.caches else context.hidden_cache,
    )
    step.translator = parts.translator if signal is not None else None
    return step


def _text(blocks: tuple[Response, ...], seed: int, rank: int) -> Callable[[int, int], list[Response]]:
    def draw(step: int, count: int) -> list[Response]:
        picks = [derived_seed(seed, "text", step, rank, index) % len(blocks) for index in range(count)]
        return [blocks[pick] for pick in picks]

    return draw
