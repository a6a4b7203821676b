"""Responses by themselves: a teacher or a student writes a stage file, outside any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stillhouse.core.seeds import derived_seed
from stillhouse.data import load_data
from stillhouse.engines import Engine, Sampling, TokenizerInfo
from stillhouse.errors import ConfigError, Fault
from stillhouse.models import fingerprint, load_student, load_teacher, local_device
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.offline.generation import (
    CHUNK_SIZE,
    GenerationOptions,
    GenerationRequest,
    generate_stage,
)
from stillhouse.rollouts.offline.samples import Sample
from stillhouse.rollouts.offline.scoring import mean_logprobs
from stillhouse.rollouts.offline.stage_files import StageFile
from stillhouse.runs.config import RunConfig
from stillhouse.runs.served import server_of
from stillhouse.runs.tokenizers import Translation, tokenizers

Side = Literal["teacher", "student"]


@dataclass(frozen=True)
class Wanted:
    """What `stillhouse generate` is asked for.

    Example: `Wanted(Path("teacher.jsonl"), by="teacher", samples=4)`
    """

    output: Path
    by: Side = "teacher"
    """Which model of the run writes, and on whose side its responses stand."""
    label: str | None = None
    """How the responses are labelled; default: the side."""
    samples: int = 1
    """Responses for each prompt."""
    seed: int | None = None
    """Default: train.seed."""
    limit: int | None = None
    """At most this many prompts."""
    rank: int = 0
    world: int = 1
    chunk: int = CHUNK_SIZE
    score: bool = False
    """Also measure how likely the writer itself finds what it wrote, at temperature 1."""


@dataclass(frozen=True)
class Written:
    """What came of it.

    Example: `Written(total=100, there=100, before=0, samples=[...])`
    """

    total: int
    there: int
    """Responses that are finished now."""
    before: int
    """Of these, what earlier processes had finished."""
    samples: list[Sample] | None
    """All of them; None while parts of other processes are missing."""


def generate(config: RunConfig, wanted: Wanted) -> Written:
    """Let one model of a run answer the training prompts into a stage file; go on where it was interrupted.

    Raises:
        StageMismatch: the file was made in another way.
        StillhouseError: model, data or machine are not as needed.
    """
    request, header, options = _request(config, wanted)
    total = request.total
    stage = StageFile(wanted.output, header, wanted.rank, wanted.world)
    before = total if stage.rows() is not None else len(stage.partial_rows())
    samples = generate_stage(wanted.output, request, options, header, f"Writing {wanted.output.name}")
    there = total if samples is not None else len(stage.partial_rows())
    return Written(total, there, before, samples)


def _request(
    config: RunConfig, wanted: Wanted
) -> tuple[GenerationRequest, dict[str, Any], GenerationOptions]:
    found = tokenizers(config)
    served = server_of(config) if wanted.by == "teacher" else None
    tokenizer = found.student
    if served is not None and wanted.score:
        raise ConfigError(Fault("--score", "needs the writer's weights here", got="a teacher on a server"))
    model: Any = None if served is not None else _model(config, wanted.by, tokenizer)
    data = load_data(config.data, tokenizer, teacher_tokenizer=found.teacher)
    prompts = data.train[: wanted.limit]
    facts = TokenizerInfo((data.end_id,), tokenizer.pad_token_id, tokenizer)
    translation = Translation.of(found, data, None) if wanted.by == "teacher" else None
    if translation is not None:
        facts = translation.facts
        if wanted.score:
            raise ConfigError(
                Fault("--score", "a teacher with another tokenizer cannot score tokens of the student's")
            )
    engine: Engine
    if served is not None:
        engine = served.build(None, facts)
        engine.use_journal(wanted.output.with_suffix(".answers.jsonl"))
        weights = engine.fingerprint
    else:
        engine, weights = config.engine.for_student().build(model, facts), partial(fingerprint, model)
    generator = ResponseGenerator(
        engine,
        wanted.by,
        config.engine.sampling,
        lambda: None,
        weights,
        wanted.label,
        translator=None if translation is None else translation.translator,
    )
    seed = config.train.seed if wanted.seed is None else wanted.seed
    request = GenerationRequest(
        prompts,
        wanted.by,
        generator,
        derived_seed(seed, wanted.by, 0),
        _sampling(config, wanted.by),
        samples_per_prompt=wanted.samples,
        facts={"by": generator.name, "run_seed": seed},
    )
    score = partial(mean_logprobs, model, pad_id=facts.pad_id, vocab=len(tokenizer))
    options = GenerationOptions(
        wanted.rank,
        wanted.world,
        partial(_decoded, tokenizer),
        {wanted.by: score} if wanted.score else {},
        wanted.chunk,
        wait_for_others=False,
    )
    return request, request.header(generator.fingerprint(), None, tuple(options.scorers)), options


def _sampling(config: RunConfig, by: Side) -> Sampling | None:
    """How the run lets this side write."""
    own = getattr(config.responses, f"{by}_sampling", None)
    if own is None and getattr(config.responses, "by", None) == by:
        own = getattr(config.responses, "sampling", None)
    found: Sampling = own or config.engine.sampling
    if "max_tokens" in found.model_fields_set:
        return found
    return found.model_copy(update={"max_tokens": config.data.max_response})


def _model(config: RunConfig, by: Side, tokenizer: Any) -> Any:
    """The one model that writes."""
    teacher = config.teacher.model_to_load() if config.teacher is not None else None
    if by == "teacher":
        if teacher is None:
            raise ConfigError(
                Fault("--by", "there is no teacher to write", hint="Set teacher, or choose --by student.")
            )
        model = load_teacher(teacher)
    else:
        grown = config.student.from_teacher is not None and teacher is not None
        model = load_student(
            config.student, tokenizer, load_teacher(teacher) if grown and teacher else None, config.train.seed
        )
    return model.to(local_device()).eval()


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()


def of_model(model: str, data: Path, template: str, sampling: dict[str, Any], max_prompt: int) -> RunConfig:
    """A configuration in which `model` is the one that writes, for use without a YAML file."""
    from stillhouse.runs.resolve import resolve

    tree: dict[str, Any] = {
        "student": {"path": model, "dtype": "auto"},
        "teacher": {"kind": "live", "path": model, "dtype": "auto"},
        "data": {
            "train": str(data),
            "template": template,
            "max_prompt": max_prompt,
            "max_response": sampling["max_tokens"],
        },
        "engine": {"kind": "transformers", "sampling": sampling},
        "objective": "cross_entropy",
    }
    return resolve(tree).config
