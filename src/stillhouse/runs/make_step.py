"""The step of a run and what its response policy may use, made of the parts of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from stillhouse.core.distributed import Ranks, SingleProcess, World, rank_and_size
from stillhouse.core.requirements import MAIN
from stillhouse.core.seeds import derived_seed
from stillhouse.core.shared import SharedResults
from stillhouse.core.types import Response
from stillhouse.data.templates import Template
from stillhouse.data.tokenise import Encoder
from stillhouse.engines import ServerEngine
from stillhouse.errors import ModelError
from stillhouse.models import (
    fingerprint,
    load_reward_model,
    local_device,
    rewards,
    unwrap,
    vocab_digest,
)
from stillhouse.models.packing import packs
from stillhouse.rollouts import ResponseGenerator, RolloutContext, TeacherHiddenCache
from stillhouse.rollouts.base import ModelPair
from stillhouse.rollouts.offline.filters.overlap import held_out_texts
from stillhouse.rollouts.offline.scoring import scorers
from stillhouse.runs.build import Parts
from stillhouse.runs.folder import RunFolder
from stillhouse.teachers import AnyTeacher, TeacherConfig
from stillhouse.train.device import phase_clock
from stillhouse.train.metrics import MetricAccumulator
from stillhouse.train.step import Method, Step, TrainingClock


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
        engine.use_journal(folder.responses / "answers.jsonl", rank_and_size()[0])
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
        picks = [
            derived_seed(seed, "text", step, 0, place) % len(blocks) for place in world.local_indices(count)
        ]
        return [blocks[pick] for pick in picks]

    return draw
