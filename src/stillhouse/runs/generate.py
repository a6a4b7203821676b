"""Generates responses outside any training: a teacher or a student, into a stage file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stillhouse.core.seeds import derived_seed
from stillhouse.data import Data, load_data
from stillhouse.data.text_tokens import response_text
from stillhouse.data.translate import Translator
from stillhouse.engines import Engine, Sampling, ServerConfig, TokenizerInfo
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.models import TeacherModel, fingerprint, load_student, load_teacher, local_device
from stillhouse.models.pruning.plan import with_tokens
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.offline.generation import (
    CHUNK_SIZE,
    GenerationOptions,
    GenerationRequest,
    write_generated,
)
from stillhouse.rollouts.offline.scoring import mean_logprobs
from stillhouse.rollouts.offline.shards import blocks
from stillhouse.rollouts.offline.stage_files import StageFile, read_rows
from stillhouse.runs.config import RunConfig
from stillhouse.runs.pruning import pruning_plan
from stillhouse.runs.servers import teacher_text_server
from stillhouse.runs.tokenizers import Tokenizers, Translation, tokenizers
from stillhouse.urls import is_remote


@dataclass(frozen=True)
class GenerateArguments:
    """What to generate, and this process's share of it.

    Example: `GenerateArguments(Path("teacher.jsonl"), by="teacher", samples=4)`
    """

    output: Path
    by: Literal["teacher", "student"] = "teacher"
    """Which model of the run generates."""
    label: str | None = None
    """Name of the generator in the rows; default: `by`."""
    samples: int = 1
    """Responses for each prompt."""
    seed: int | None = None
    """Default: train.seed."""
    limit: int | None = None
    """At most this many prompts."""
    shard: int = 0
    """Which share of the responses this process generates, from 0."""
    shards: int = 1
    chunk: int = CHUNK_SIZE
    """Responses to generate between two saves."""
    score: bool = False
    """Also score each response with the model that generated it, at temperature 1."""


@dataclass(frozen=True)
class GenerateResult:
    """The responses, and how many of them are done.

    Example: `GenerateResult(100, 100, finished=100, resumed=0, complete=True, tokens=2400, truncated=3)`
    """

    total: int
    share: int
    """Responses of this shard."""
    finished: int
    """Responses on disk, of all shards."""
    resumed: int
    """Of these, responses that were there at the start."""
    complete: bool
    """Whether all shards are finished, so that the file is written."""
    tokens: int = 0
    """Of all responses, when it is."""
    truncated: int = 0
    """Responses that were cut at the length limit."""


def generate(config: RunConfig, arguments: GenerateArguments) -> GenerateResult:
    """Generate responses to the training prompts of a run; an interrupted file is resumed.

    Raises:
        StageMismatch: the file comes from other models, data or settings.
        StillhouseError: a model, the data or the machine cannot be used.
    """
    request, header, options = _request(config, arguments)
    total = request.total
    stage = StageFile(arguments.output, header, arguments.shard, arguments.shards)
    resumed = total if stage.is_finished() else len(stage.partial_rows())
    complete = write_generated(stage, request, options, f"Generating {arguments.output.name}")
    finished = total if complete else len(stage.partial_rows())
    own = blocks(total, arguments.chunk, arguments.shard, arguments.shards)
    if not complete:
        return GenerateResult(total, sum(map(len, own)), finished, resumed, complete)
    return replace(written_result(arguments.output, total, resumed), share=sum(map(len, own)))


def written_result(output: Path, total: int, resumed: int) -> GenerateResult:
    """The result of a file that is complete.

    Raises:
        DataError: it is not: rows are missing.
    """
    rows = tokens = truncated = 0
    for row in read_rows(output):
        rows += 1
        tokens += len(row["token_ids"])
        truncated += not row["finished"]
    if rows != total:
        raise DataError(
            f"{output}: has {rows:,} responses in place of {total:,}: it was cut off, or rows were taken "
            "out. Delete the file to generate it again, or choose another one."
        )
    return GenerateResult(total, total, total, resumed, True, tokens, truncated)


def _request(
    config: RunConfig, arguments: GenerateArguments
) -> tuple[GenerationRequest, dict[str, Any], GenerationOptions]:
    """What to generate, the header of its file, and how this process does its share."""
    found = tokenizers(config)
    tokenizer = found.student
    data = load_data(config.data, tokenizer, teacher=found.reads)
    by_teacher = arguments.by == "teacher"
    server = teacher_text_server(config) if by_teacher else None
    translation = Translation.of(found, data, None) if by_teacher else None
    translator = None if translation is None else translation.translator
    converted = by_teacher and translator is None
    if arguments.score:
        _check_score(server, translator)
    assert data.encoder is not None
    info = found.student_facts(data.encoder) if translation is None else translation.facts
    model: Any = None if server is not None else _model(config, arguments.by, found, data)
    engine, weights = _engine(config, server, model, info, arguments.output, arguments.shard)
    generator = ResponseGenerator(
        engine,
        arguments.by,
        config.engine.sampling,
        lambda: None,
        weights,
        arguments.label,
        translator=translator,
        end_id=data.end_id if converted else None,
        vocab=found.ids if converted else None,
    )
    seed = config.train.seed if arguments.seed is None else arguments.seed
    request = GenerationRequest(
        data.train[: arguments.limit],
        arguments.by,
        generator,
        derived_seed(seed, arguments.by, 0),
        _sampling(config, arguments.by),
        samples_per_prompt=arguments.samples,
        facts={"by": generator.name, "run_seed": seed},
    )
    score = partial(mean_logprobs, model, pad_id=info.pad_id, vocab=found.ids, as_teacher=by_teacher)
    options = GenerationOptions(
        arguments.shard,
        arguments.shards,
        partial(response_text, tokenizer),
        {arguments.by: score} if arguments.score else {},
        arguments.chunk,
        wait_for_others=False,
    )
    return request, request.header(generator.fingerprint(), None, tuple(options.scorers)), options


def _check_score(server: ServerConfig | None, translator: Translator | None) -> None:
    if server is not None:
        raise ConfigError(
            Fault("--score", "needs the model's weights in this process", got="a teacher on a server")
        )
    if translator is not None:
        raise ConfigError(
            Fault("--score", "a teacher with another tokenizer cannot score the student's tokens")
        )


def _engine(
    config: RunConfig, server: ServerConfig | None, model: Any, info: TokenizerInfo, output: Path, shard: int
) -> tuple[Engine, Callable[[], str]]:
    """The engine, and what gives the fingerprint of its model."""
    if server is None:
        return config.engine.for_student().build(model, info), partial(fingerprint, model)
    engine = server.build(None, info)
    if not is_remote(output):  # a store cannot append an answer to a file
        engine.use_journal(output.with_suffix(".answers.jsonl"), shard)
    return engine, engine.fingerprint


def _sampling(config: RunConfig, by: str) -> Sampling | None:
    """The sampling of the run for this model."""
    found: Sampling = config.responses.sampling_of(by) or config.engine.sampling
    if "max_tokens" in found.model_fields_set:
        return found
    return found.model_copy(update={"max_tokens": config.data.max_response})


def _model(config: RunConfig, by: str, found: Tokenizers, data: Data) -> Any:
    """The model that generates; the other one is not loaded."""
    teacher = config.teacher.model_to_load() if config.teacher is not None else None
    if by == "teacher":
        if teacher is None:
            raise ConfigError(
                Fault("--by", "there is no teacher", hint="Set teacher, or choose --by student.")
            )
        model = _teacher(teacher, found)
    else:
        from_teacher = config.student.from_teacher is not None and teacher is not None
        start = _teacher(teacher, found) if from_teacher and teacher else None
        plan = pruning_plan(config, start, data.train, found)
        kept = None if plan is None else plan.kept
        model = load_student(config.student, found.student, start, config.train.seed, kept)
    return model.to(local_device()).eval()


def _teacher(config: TeacherModel, found: Tokenizers) -> Any:
    """The teacher, with the tokens that are kept."""
    model = load_teacher(config)
    return model if found.kept is None else with_tokens(model, found.kept)
