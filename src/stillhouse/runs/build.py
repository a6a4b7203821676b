"""Builds the parts of a run from its configuration, in the order in which they depend on each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import nn

from stillhouse.core.distributed import Ranks, SingleProcess, World, is_sharded, rank_and_size
from stillhouse.core.requirements import MAIN, teacher_path
from stillhouse.core.seeds import derived_seed
from stillhouse.core.shared import SharedResults
from stillhouse.core.types import Response
from stillhouse.data import Data, load_data
from stillhouse.data.templates import Template
from stillhouse.data.text_tokens import response_text
from stillhouse.data.tokenise import Encoder
from stillhouse.data.translate import Translator
from stillhouse.engines import Engine, Sampling, ServerEngine, TokenizerInfo
from stillhouse.errors import ConfigError, DataError, Fault, ModelError
from stillhouse.models import (
    choose_packing,
    compile_layers,
    fingerprint,
    image_reader,
    load_reward_model,
    load_student,
    load_teacher,
    local_device,
    parameter_counts,
    rewards,
    unwrap,
    vision_facts,
    vocab_digest,
    weights_digest,
)
from stillhouse.models.packing import packs
from stillhouse.models.pruning.plan import with_tokens
from stillhouse.models.quantise import dense
from stillhouse.models.sharding import shard_for_inference
from stillhouse.objectives import Objective
from stillhouse.rollouts import ResponseGenerator, RolloutContext, TeacherHiddenCache
from stillhouse.rollouts.base import ModelPair
from stillhouse.rollouts.offline.filters.overlap import held_out_texts
from stillhouse.rollouts.offline.scoring import scorers
from stillhouse.runs.checks import context_length, longest_sequence
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.pruning import pruning_plan, told
from stillhouse.runs.servers import teacher_text_server
from stillhouse.runs.teacher_import import with_known_rows
from stillhouse.runs.tokenizers import Translation, format_notes, tokenizers
from stillhouse.teachers import AnyTeacher, TeacherConfig
from stillhouse.train.device import phase_clock
from stillhouse.train.metrics import MetricAccumulator
from stillhouse.train.parallelism import asked_for
from stillhouse.train.step import Method, Step, TrainingClock

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
            student["kept"] = told(self.pruning)
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


def shared_results(parts: Parts, **depends_on: Any) -> SharedResults | None:
    """What other runs have in common with this one; None unless `output.shared` names a folder.

    Args:
        parts: what `assemble` gave.
        **depends_on: what the results depend on besides models, tokenizer, template and engine, such as the
            sampling, which is not always the engine's.
    """
    config = parts.config
    if config.output.shared is None:
        return None
    teacher = None if config.teacher is None else config.teacher.model_that_reads()
    template: Template = config.data.template
    common = {
        "engine": config.engine.model_dump(mode="json", exclude={"sampling"}),
        "template": template.model_dump(mode="json"),
        "tokenizer": vocab_digest(parts.tokenizer.get_vocab()),
        "teacher": None if teacher is None else teacher.model_dump(mode="json", exclude={"kind"}),
        "precision": config.train.precision,
    }
    return SharedResults(config.output.shared, config.name, {**common, **depends_on})


def make_context(
    parts: Parts,
    folder: RunFolder,
    version: Callable[[], int | None] = lambda: None,
    on_tokens: Callable[[int], None] | None = None,
    world: World | None = None,
) -> RolloutContext:
    """What the run's response policy may use.

    Args:
        parts: what `assemble` gave.
        folder: where rounds of responses are kept.
        version: the optimiser step whose weights the student has now.
        on_tokens: called with the number of tokens whenever a model has written.
        world: the processes that train together; default: those that the launcher names.
    """
    student = ResponseGenerator(
        parts.engine(parts.student),
        "student",
        parts.sampling,
        version,
        partial(fingerprint, parts.student),
        on_tokens=on_tokens,
    )
    models = None
    if parts.teacher is not None:
        models = ModelPair(parts.student, parts.teacher, parts.facts, parts.vocab)
    return RolloutContext(
        parts.data.train,
        student,
        _teacher_generator(parts, folder, on_tokens),
        folder.responses,
        parts.config.train.seed,
        models=models,
        world=world or Ranks(*rank_and_size()),
        decode=parts.decode,
        scorers=scorers(
            {"student": parts.student, "teacher": parts.comparable},
            parts.facts.pad_id,
            parts.vocab,
            parts.config.evaluate.batch_size,
        ),
        rewards=_rewards(parts),
        held_out=cache(partial(held_out_texts, parts.config.evaluation_sets())),
        shared=shared_results(parts),
        external_responses=parts.config.responses.external_responses(
            parts.config.data, Encoder(parts.config.data.template, parts.tokenizer)
        ),
    )


def _rewards(parts: Parts) -> Callable[[Sequence[Response]], list[float]] | None:
    """What the run's reward model gives responses; None without one."""
    path = parts.config.responses.reward_model_path()
    if path is None:
        return None
    model = load_reward_model(path, parts.tokenizer).to(local_device())
    size = parts.config.evaluate.batch_size

    def read(responses: Sequence[Response]) -> list[float]:
        if shown := next((one.prompt.id for one in responses if one.prompt.images), None):
            raise ModelError(
                f"responses.reward_model: {path} reads text alone, and {shown} has images. Leave it out, or "
                "take rows without images."
            )
        return rewards(model, [(*one.prompt.token_ids, *one.token_ids) for one in responses], size)

    return read


def _teacher_generator(
    parts: Parts, folder: RunFolder, on_tokens: Callable[[int], None] | None
) -> ResponseGenerator | None:
    """What generates as the main teacher, if the response policy asks for that."""
    engine = parts.teacher_engine if parts.config.responses.requirements().asks(MAIN, "text") else None
    if engine is None:
        return None
    digest = partial(fingerprint, parts.teacher) if parts.teacher is not None else lambda: "unknown"
    if isinstance(engine, ServerEngine):
        engine.use_journal(folder.responses / "answers.jsonl")
    return ResponseGenerator(
        engine,
        "teacher",
        parts.sampling,
        lambda: None,
        engine.fingerprint if isinstance(engine, ServerEngine) else cache(digest),
        on_tokens=on_tokens,
        translator=parts.translator,
        end_id=parts.data.end_id if parts.translator is None else None,
        vocab=parts.vocab if parts.translator is None else None,
    )


def make_step(parts: Parts, folder: RunFolder, world: World | None = None) -> Step:
    """The step of the configured method over loaded parts.

    Args:
        parts: what `assemble` gave.
        folder: where rounds of responses are kept.
        world: the other processes; None: there are none.
    """
    config, clock, metrics = parts.config, TrainingClock(), MetricAccumulator(phase_clock(local_device()))
    world = world or SingleProcess()
    context = make_context(
        parts, folder, lambda: clock.step, lambda tokens: metrics.add("tokens/generate", tokens), world
    )
    teachers = _running_teachers(parts)
    kept = config.teacher is None or (config.teacher.keeps_signal and not config.teacher.caches)
    return Step(
        Method(config.responses, config.objective, config.train.normalise),
        config.responses.build(context),
        teachers,
        pad_id=parts.facts.pad_id,
        vocab=parts.vocab,
        translator=parts.translator if MAIN in teachers else None,
        world=world,
        text=_text(parts.data.text, config.train.seed, world) if parts.data.text else None,
        hidden_cache=context.hidden_cache if kept else TeacherHiddenCache(),
        metrics=metrics,
        clock=clock,
        fused=config.train.fused,
        head_dtype=head_dtype(config.train.precision, local_device()),
        micro_batch_tokens=config.train.micro_batch_tokens,
        packed=_trains_packed(parts),
    )


def head_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What the head's products are computed in; None: the precision of its weights.

    In mixed precision a GPU multiplies in bfloat16 and keeps the logits in fp32. A CPU would round them, so
    there the head stays in the precision of its weights.
    """
    return torch.bfloat16 if precision == "bfloat16" and device.type == "cuda" else None


def _trains_packed(parts: Parts) -> bool:
    """Whether the student reads packed sequences as it is trained."""
    training = parts.student.training
    parts.student.train()  # with dropout attention may have no kernel
    found = packs(unwrap(parts.student))
    parts.student.train(training)
    return found


def _running_teachers(parts: Parts) -> dict[str, AnyTeacher]:
    """The teachers that the objective asks for log-probabilities or layers, by name.

    Teachers that are made of the student alike are one, which then has one copy of the weights.
    """
    asked = parts.config.objective.requirements().model_names
    vocab = {MAIN: parts.vocab if parts.translator is None else len(parts.translator.teacher)}
    found: dict[str, AnyTeacher] = {}
    made: dict[TeacherConfig, AnyTeacher] = {}
    for name, teacher in parts.config.all_teachers.items():
        if name not in asked:
            continue
        if not teacher.of_student:
            found[name] = teacher.build(parts.teachers[name], vocab.get(name, parts.vocab))
            continue
        if teacher not in made:
            made[teacher] = teacher.build(parts.student, parts.vocab)
        found[name] = made[teacher]
    return found


def _text(blocks: tuple[Response, ...], seed: int, world: World) -> Callable[[int, int], list[Response]]:
    def draw(step: int, count: int) -> list[Response]:
        # the 0 was a rank once: numbers of runs stay as they are
        picks = [derived_seed(seed, "text", step, 0, place) % len(blocks) for place in world.places(count)]
        return [blocks[pick] for pick in picks]

    return draw
