"""Builds the parts of a run from its configuration, in the order in which they depend on each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from stillhouse.core.distributed import is_sharded, rank_and_size
from stillhouse.core.requirements import MAIN, teacher_path
from stillhouse.data import Data, load_data
from stillhouse.data.text_tokens import response_text
from stillhouse.data.translate import Translator
from stillhouse.engines import Engine, Sampling, TokenizerInfo
from stillhouse.errors import ConfigError, DataError, Fault, ModelError
from stillhouse.models import (
    choose_packing,
    compile_layers,
    image_reader,
    load_student,
    load_teacher,
    local_device,
    parameter_counts,
    unwrap,
    vision_facts,
    weights_digest,
)
from stillhouse.models.pruning.plan import with_tokens
from stillhouse.models.quantise import dense
from stillhouse.models.sharding import shard_for_inference
from stillhouse.objectives import Objective
from stillhouse.runs.checks import context_length, longest_sequence
from stillhouse.runs.config import RunConfig
from stillhouse.runs.pruning import describe_pruning, pruning_plan
from stillhouse.runs.servers import teacher_text_server
from stillhouse.runs.teacher_import import with_known_rows
from stillhouse.runs.tokenizers import Translation, format_notes, tokenizers
from stillhouse.teachers import TeacherConfig
from stillhouse.train.parallelism import asked_for

logger = logging.getLogger("stillhouse")


@dataclass
class Parts:
    """Everything that a run works with."""

    config: RunConfig
    tokenizer: Any
    facts: TokenizerInfo
    student: nn.Module
    teachers: dict[str, nn.Module | None]
    """By name; None for a teacher that is not loaded here, such as one on a server."""
    vocab: int
    data: Data
    translation: Translation | None = None
    """The teacher's prompts and ends, and what goes between two vocabularies."""
    pruning: Mapping[str, Any] | None = None
    """What of the teacher the student started with, and how it was chosen."""
    sharded_digests: Mapping[str, str] = field(default_factory=dict)
    """Of teachers whose weights processes share: the digest of the whole, known to the first process."""

    @property
    def teacher(self) -> nn.Module | None:
        """The main teacher's model, if it is loaded here."""
        return self.teachers.get(MAIN)

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
        models = {
            "student": self.student,
            **{teacher_path(name): model for name, model in self.teachers.items()},
        }
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
        return self.whole_teacher if self.translator is None else None

    @property
    def whole_teacher(self) -> nn.Module | None:
        """The main teacher's model, unless processes share its weights and so read with it together."""
        return None if self.teacher is None or is_sharded(self.teacher) else self.teacher

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens of a response as text."""
        return response_text(self.tokenizer, ids)

    def engine(self, model: nn.Module) -> Engine:
        """The configured engine over one of the models."""
        if model is self.teacher:
            assert self.teacher_engine is not None
            return self.teacher_engine
        engine: Engine = self.config.engine.for_student().build(model, self.facts)
        return engine

    @property
    def connected_engine(self) -> Engine | None:
        """`teacher_engine`, if it has been asked for; nothing is connected for this alone."""
        return vars(self).get("teacher_engine")

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
        if self.pruning is not None:
            student["kept"] = describe_pruning(self.pruning)
        if vision := vision_facts(self.student):
            student["vision"] = vision
        teachers: dict[str, Any] = {"teacher": None}
        for name, config in self.config.all_teachers.items():
            model = self.teachers.get(name)
            if model is not None:
                loaded = config.model_to_load()  # of a teacher behind a cache, too
                teachers[teacher_path(name)] = {
                    "path": getattr(loaded, "path", None),
                    **parameter_counts(model),
                }
        return {"student": student, **teachers}


def assemble(config: RunConfig, pruning: Mapping[str, Any] | None = None) -> Parts:
    """Load tokenizer, teacher, student and data; the cheapest checks come first.

    Args:
        config: the run.
        pruning: what the run that goes on has recorded of its student's start from the teacher.

    Raises:
        ModelError: a model or tokenizer cannot be had, or the two do not fit.
        DataError: the data cannot be used.
    """
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # bars for shards of weights would break up ours
    set_seed(config.train.seed)
    found = tokenizers(config)
    tokenizer = found.student
    data = load_data(config.data, tokenizer, needs=config.responses.requirements().data, teacher=found.reads)
    data = with_known_rows(config, data)
    config = with_resolved_template(config, data)
    encoder = data.encoder
    assert encoder is not None
    for note in format_notes(found, data).values():
        logger.warning("teacher: %s", note)
    teachers = _loaded_teachers(config, data, found.kept)
    main = teachers.get(MAIN)
    plan = pruning_plan(config, main, data.train, found, pruning)
    kept = None if plan is None else plan.kept
    student = load_student(config.student, tokenizer, main, config.train.seed, kept)
    for name, model in {
        "student": student,
        **{teacher_path(one): model for one, model in teachers.items()},
    }.items():
        if model is not None:
            _finite(name, model)
    device = local_device()
    digests = _digests_of_sharded(config, teachers)
    parts = Parts(
        config,
        tokenizer,
        found.student_facts(encoder),
        student.to(device),
        {name: _placed(config.all_teachers[name], model, device) for name, model in teachers.items()},
        found.ids,
        data,
        Translation.of(found, data, None if main is None else context_length(unwrap(main).config)),
        pruning=None if plan is None else plan.facts,
        sharded_digests=digests,
    )
    _check_shards_see(parts)
    pack_where_possible(parts)
    if config.train.compile_models:
        for model in (parts.student, *parts.teachers.values()):
            if model is not None:
                compile_layers(model)
    if config.responses.requirements().asks(MAIN, "text"):
        _ = parts.teacher_engine  # a server that cannot write is told of before anything is evaluated
    return parts


def _placed(config: TeacherConfig, model: nn.Module | None, device: torch.device) -> nn.Module | None:
    """A teacher on its device, or this process's share of it."""
    if model is None:
        return None
    return shard_for_inference(model) if config.sharded and rank_and_size()[1] > 1 else model.to(device)


def _digests_of_sharded(config: RunConfig, teachers: Mapping[str, nn.Module | None]) -> dict[str, str]:
    """Before they are sharded: afterwards no process has all weights of a teacher."""
    rank, size = rank_and_size()
    if rank or size == 1:
        return {}
    shared = {name: model for name, model in teachers.items() if config.all_teachers[name].sharded}
    return {name: weights_digest(model) for name, model in shared.items() if model is not None}


def _check_shards_see(parts: Parts) -> None:
    """Refuse a sharded student of which some processes would use the vision tower and others not."""
    asked = next(asked_for(parts.config.train.hf), None)
    if asked is None or image_reader(parts.student) is None:
        return
    seen = [bool(prompt.images) for prompt in parts.data.train]
    if any(seen) and not all(seen):
        raise ConfigError(
            Fault(
                asked[1],
                "a process that reads rows of text alone would not gather the shards of vision tower and "
                "projector that others wait for",
                got=f"{sum(seen):,} of {len(seen):,} rows with images",
                hint="Train without it, with rows that all have images, or with rows of text alone.",
            )
        )


def _loaded_teachers(
    config: RunConfig, data: Data, tokens: tuple[int, ...] | None
) -> dict[str, nn.Module | None]:
    """Every teacher by name, with these tokens alone if there are such; None for one not loaded here."""
    asked = config.objective.requirements().model_names
    for name, teacher in config.all_teachers.items():
        if name in asked:
            teacher.check_signal(longest_sequence(config, data.train))
    _check_named_teachers(config, data)
    loads = {name: teacher.model_to_load() for name, teacher in config.all_teachers.items()}
    loaded = {name: None if model is None else load_teacher(model) for name, model in loads.items()}
    if tokens is None:
        return loaded
    return {name: None if model is None else with_tokens(model, tokens) for name, model in loaded.items()}


def with_resolved_template(config: RunConfig, data: Data) -> RunConfig:
    """The run with the template that its data were rendered with, so that everything else renders alike."""
    if data.encoder is None or data.encoder.template.kind != "chat":
        return config
    update = {"template": data.encoder.template}
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def _check_named_teachers(config: RunConfig, data: Data) -> None:
    """Refuse rows that name no teacher of the run, where the objective goes by that."""
    if "teachers" not in config.objective.requirements().rows:
        return
    objective: Objective = config.objective
    sources = config.facts.sources - {"text"}

    def taught_by(name: str | None) -> bool:
        return any(name in objective.teachers_of(source, name) for source in sources)

    named: dict[Any, str] = {prompt.facts.get("teacher"): prompt.id for prompt in data.train}
    unknown = {name: row for name, row in named.items() if not taught_by(name)}
    if not unknown:
        return
    known = [name for name in config.all_teachers if taught_by(name)]
    name, row = min(unknown.items(), key=str)
    told = "names no teacher" if name is None else f"names the teacher {name!r}"
    raise DataError(
        f"data.train: {row} {told}, and the objective goes by that. There are {', '.join(known)}. Name one "
        "of these in the column teacher of every row, or map another column: data.row_teacher: {column: "
        f"domain, teachers: {{maths: {known[0] if known else MAIN}, ...}}, otherwise: ...}}."
    )


def pack_where_possible(parts: Parts) -> None:
    """Let the models read packed sequences where they can, and say where they cannot."""
    train = parts.config.train
    autocast = torch.bfloat16 if train.precision == "bfloat16" else None
    models = {"student": parts.student, **{teacher_path(name): one for name, one in parts.teachers.items()}}
    for name, model in models.items():
        dtype = autocast if model is parts.student else None
        if model is not None and (note := choose_packing(model, train.packing, dtype)) is not None:
            logger.warning("train.packing: %s: %s", name, note)


def _finite(name: str, model: nn.Module) -> None:
    """Refuse weights that would make every loss NaN."""
    broken = [key for key, weights in model.named_parameters() if not torch.isfinite(dense(weights)).all()]
    if broken:
        raise ModelError(
            f"{name}: {len(broken)} of its weights hold NaN or infinity, first {broken[0]}. The model was "
            "saved after its training broke down, or does not fit its dtype. "
            "Take another copy."
        )
