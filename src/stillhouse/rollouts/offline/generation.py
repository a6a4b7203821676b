"""Whole rounds of responses, generated for all prompts at once and kept as stage files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from stillhouse import console
from stillhouse.core.distributed import barrier
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Progress, Prompt, Response, Source
from stillhouse.engines.base import Sampling
from stillhouse.errors import DataError
from stillhouse.files import drop_unfinished
from stillhouse.rollouts.base import RolloutContext
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.offline.samples import Sample, missing_sample, prompts_digest, samples_digest
from stillhouse.rollouts.offline.shards import blocks
from stillhouse.rollouts.offline.stage_files import Row, StageFile, read_rows, stage_header

logger = logging.getLogger("stillhouse")

CHUNK_SIZE = 512
"""The default number of responses that are generated between two saves."""

Refresh = Literal["never", "epoch", "step"]
Scorer = Callable[[Sequence[Response]], list[float]]


@dataclass(frozen=True)
class GenerationOptions:
    """How stage files are generated, the same for all of a run."""

    rank: int = 0
    world_size: int = 1
    decode: Callable[[Sequence[int]], str] | None = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """The models whose mean log-probability of each response is stored with it."""
    chunk_size: int = CHUNK_SIZE
    """Responses that a process generates before it saves them. A chunk is always generated as a whole, so
    that even rounding does not depend on interruptions or on the number of processes."""
    wait_for_others: bool = True
    """Wait for the other processes; otherwise each leaves its shard and the last one merges them."""


@dataclass(frozen=True)
class GenerationRequest:
    """Which responses a stage file holds."""

    prompts: Sequence[Prompt]
    source: Source
    """The role of the responses in training."""
    generator: ResponseGenerator | None
    """Generates what is not given; without one those responses are missing."""
    seed: int
    sampling: Sampling | None = None
    given: Sequence[Sample | None] = ()
    """Responses that exist already, one place for each prompt."""
    sample_ids: Sequence[int] | None = None
    """See `ResponseGenerator.generate`; by default the places of the prompts."""
    samples_per_prompt: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the header, such as the round."""

    @property
    def total(self) -> int:
        """The number of responses."""
        return len(self.prompts) * self.samples_per_prompt

    def header(self, model: str, version: int | None, scores: Sequence[str]) -> dict[str, Any]:
        """The header of the stage file.

        Args:
            model: a digest of the generator's weights.
            version: the optimiser step of these weights.
            scores: the names of the models that score the responses.
        """
        given = [sample for sample in self.given if sample is not None]
        generator = self.generator if len(given) < len(self.prompts) else None
        sampling = None if generator is None else generator.resolve_sampling(self.sampling)
        return stage_header(
            "responses",
            source=self.source,
            **self.facts,
            seed=self.seed,
            prompts={"count": len(self.prompts), "digest": prompts_digest(self.prompts)},
            samples=self.samples_per_prompt,
            sampling=None if sampling is None else sampling.model_dump(mode="json"),
            model=None if generator is None else model,
            student_version=None if generator is None else version,
            given=samples_digest(given) if given else None,
            scores=sorted(scores),
        )


def generate_stage(
    path: Path, request: GenerationRequest, options: GenerationOptions, header: Mapping[str, Any], title: str
) -> list[Sample] | None:
    """The requested responses in the order of the prompts, from the file at `path` or generated now.

    Returns:
        The samples; None if shards of other processes are still missing and `wait_for_others` is off.

    Raises:
        StageMismatch: the file was made in another way.
    """
    stage = StageFile(path, header, options.rank, options.world_size)
    written = write_generated(stage, request, options, title)
    return _samples(path, list(read_rows(path)), request) if written else None


def write_generated(
    stage: StageFile, request: GenerationRequest, options: GenerationOptions, title: str
) -> bool:
    """Generate what a stage file lacks; whether it is finished.

    Whatever an interrupted process has saved is kept. With several processes each generates every
    `world_size`-th chunk. Shards of others may be missing if `wait_for_others` is off.

    Raises:
        StageMismatch: the file was made in another way.
    """
    if not stage.is_finished():
        _ShardGeneration(request, options, stage, title).run()
        if not options.wait_for_others:
            return stage.merge(request.total)
        barrier(options.world_size)
        if options.rank == 0 and not stage.merge(request.total):
            raise DataError(f"{stage.path}: shards are missing; all processes must see the same folder.")
        barrier(options.world_size)
    elif options.rank == 0:
        stage.remove_shards()
    return True


def _samples(path: Path, rows: Sequence[Row], request: GenerationRequest) -> list[Sample]:
    if [row.get("number") for row in rows] != list(range(request.total)):
        raise DataError(
            f"{path}: has {len(rows)} responses, not one for each of {request.total} places in their order. "
            "Delete the file to generate it again."
        )
    return [
        Sample.from_row(row, request.prompts[number % len(request.prompts)])
        for number, row in enumerate(rows)
    ]


class _ShardGeneration:
    """This process's share of generating a stage file."""

    def __init__(
        self, request: GenerationRequest, options: GenerationOptions, stage: StageFile, title: str
    ) -> None:
        self._request = request
        self._options = options
        self._stage = stage
        self._title = title

    def run(self) -> None:
        """Generate every chunk of this rank that is not complete yet."""
        options = self._options
        chunks = blocks(self._request.total, options.chunk_size, options.rank, options.world_size)
        share = sum(map(len, chunks))
        saved = self._stage.partial_rows()
        done = sum(number in saved for chunk in chunks for number in chunk)
        if not chunks:
            self._stage.append([], share)
        with self._progress_bar(share, done) as advance:
            for chunk in chunks:
                unsaved = [number for number in chunk if number not in saved]
                if unsaved:
                    rows = self._rows(chunk, advance, len(chunk) - len(unsaved))
                    self._stage.append([rows[number] for number in unsaved], share)

    @contextlib.contextmanager
    def _progress_bar(self, total: int, done: int) -> Iterator[Callable[[int], None]]:
        if self._options.rank != 0 or total == done:
            yield lambda count: None
            return
        with console.progress(self._title, total=total, done=done) as bar:
            yield bar.advance

    def _rows(self, chunk: range, advance: Callable[[int], None], already_shown: int) -> dict[int, Row]:
        """The rows of a chunk by number, from given responses and newly generated ones."""
        found = {number: self._given(number) for number in chunk}
        to_generate = [number for number, sample in found.items() if sample is None]
        shown = already_shown

        def progress(finished: int, _total: int) -> None:
            nonlocal shown
            position = len(chunk) - len(to_generate) + finished
            if position > shown:
                advance(position - shown)
                shown = position

        progress(0, 0)
        for sample in self._generated(to_generate, progress):
            found[sample.number] = sample
        samples = [sample for sample in found.values() if sample is not None]
        return {sample.number: sample.to_row() for sample in self._scored(samples)}

    def _given(self, number: int) -> Sample | None:
        request = self._request
        index, place = divmod(number, len(request.prompts))
        given = request.given[place] if request.given else None
        if given is not None:
            return replace(given, number=number, index=index)
        if request.generator is None:
            return missing_sample(number, request.prompts[place], request.source)
        return None

    def _generated(self, numbers: Sequence[int], progress: Callable[[int, int], None]) -> list[Sample]:
        request, count = self._request, len(self._request.prompts)
        generator = request.generator
        if generator is None or not numbers:
            return []
        places = [number % count for number in numbers]
        responses = generator.generate(
            [request.prompts[place] for place in places],
            request.seed,
            request.sampling,
            sample_ids=numbers
            if request.sample_ids is None
            else [request.sample_ids[place] for place in places],
            progress=progress,
            counted=False,
        )
        decode = self._options.decode or (lambda ids: "")
        return [
            Sample(
                number,
                replace(response, source=request.source),
                decode(response.token_ids),
                generator.name,
                index=number // count,
            )
            for number, response in zip(numbers, responses, strict=True)
        ]

    def _scored(self, samples: Sequence[Sample]) -> list[Sample]:
        responses = [sample.response for sample in samples if not sample.missing]
        if not responses or not self._options.scorers:
            return list(samples)
        scores = {name: iter(score(responses)) for name, score in self._options.scorers.items()}
        return [
            sample
            if sample.missing
            else replace(sample, scores={name: next(values) for name, values in scores.items()})
            for sample in samples
        ]


class RoundGenerator:
    """The responses of one source, round after round, each round a stage file `SOURCE-ROUND.jsonl`.

    The header of a file has the digest of the weights that generated it, so responses of another run, other
    settings or another model are never used: such a file is renamed, with a warning.
    """

    def __init__(
        self,
        context: RolloutContext,
        source: Literal["teacher", "student"],
        generator: ResponseGenerator | None,
        refresh: Refresh,
        sampling: Sampling | None,
        options: GenerationOptions,
        given: Sequence[Sample | None] = (),
    ) -> None:
        """The rounds of one source of a run.

        Args:
            context: prompts, folder and seed of the run.
            source: the role of the responses in training.
            generator: generates what is not given; None if nothing does.
            refresh: when new responses are generated.
            sampling: how they are sampled, instead of the generator's default.
            options: what all stage files of the run have in common.
            given: responses that exist already, one place for each prompt.
        """
        self.source = source
        self._context = context
        self._generator = generator
        self._refresh = refresh
        self._sampling = sampling
        self._options = options
        self._given = given
        self._weights: dict[str, Any] = {}
        """Round, digest and version of the weights that generate the newest round."""
        self._resumed = False
        self._counted: set[str] = set()

    @property
    def every_step(self) -> bool:
        """Whether there are no rounds, because new responses are generated at each step."""
        return self._refresh == "step"

    @property
    def written_once(self) -> bool:
        """Whether its first round is its only one."""
        return self._refresh == "never"

    def can_regenerate(self, place: int) -> bool:
        """Whether the response at a place can be generated again."""
        return self._generator is not None and not (self._given and self._given[place] is not None)

    def samples(self, number: int) -> list[Sample]:
        """One sample for each prompt in round `number`, from its file or generated now."""
        number = self._round(number)
        request = GenerationRequest(
            self._context.prompts,
            self.source,
            self._generator,
            derived_seed(self._context.seed, self.source, number),
            self._sampling,
            self._given,
            facts={"round": number, "run_seed": self._context.seed},
        )
        title = f"{self.source.capitalize()} generates round {number + 1}"
        return self._generate(f"{self.source}-{number}.jsonl", request, number, title)

    def resample(self, number: int, attempt: int, places: Sequence[int]) -> dict[int, Sample]:
        """New samples for some prompts of a round, generated with fresh seeds, by place."""
        number = self._round(number)
        request = GenerationRequest(
            [self._context.prompts[place] for place in places],
            self.source,
            self._generator,
            derived_seed(self._context.seed, self.source, number, "again", attempt),
            self._sampling,
            sample_ids=places,
            facts={"round": number, "attempt": attempt, "run_seed": self._context.seed},
        )
        title = f"{self.source.capitalize()} resamples round {number + 1}"
        name = f"{self.source}-{number}.resample-{attempt}.jsonl"
        return dict(zip(places, self._generate(name, request, number, title), strict=True))

    def generate_step(self, prompts: Sequence[Prompt], progress: Progress) -> list[Response]:
        """Responses to the prompts of one step, generated with the current weights; no file is kept."""
        assert self._generator is not None
        purpose = (self.source, "step", progress.step)
        return self._context.write(self._generator, prompts, self._sampling, *purpose)

    def state_dict(self) -> dict[str, Any]:
        """Which weights generated the newest round; training overwrites them, so a checkpoint must know."""
        return dict(self._weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._weights, self._resumed = dict(state), bool(state)

    def _round(self, number: int) -> int:
        return number if self._refresh == "epoch" else 0

    def _generate(self, name: str, request: GenerationRequest, number: int, title: str) -> list[Sample]:
        path = self._context.folder / name
        header = self._header(request, number)
        _rename_stale(path, header, self._options)
        interrupted = self._resumed and self._weights.get("round") == number
        if interrupted and self._generator is not None and not path.exists():
            logger.warning(
                "%s is gone or was made in another way, and so are the weights that generated it: generated "
                "again with the current ones, so the run does not end as one that was never interrupted",
                path,
            )
            self._weights = {}
            header = self._header(request, number)
        with self._once(path, header):
            samples = generate_stage(path, request, self._options, header, title)
        assert samples is not None
        if not interrupted and name not in self._counted:
            self._counted.add(name)
            self._count(samples)
        return samples

    @contextlib.contextmanager
    def _once(self, path: Path, header: Mapping[str, Any]) -> Iterator[None]:
        """Take the teacher's round from another run that has the same, or leave it for others."""
        shared = self._context.shared
        of_teacher = self._generator is not None and self.source == "teacher"
        if (
            shared is None
            or not of_teacher
            or "student" in self._options.scorers
            or self._options.world_size > 1
            or path.exists()
        ):
            yield
            return
        key = {name: value for name, value in header.items() if name != "versions"}
        with shared.once(path.stem, key, [path]):
            yield

    def _count(self, samples: Sequence[Sample]) -> None:
        """Tell how many tokens a round has that no checkpoint has counted yet.

        They are counted when the round is first used and not when they are generated, so that the log of a
        run does not depend on interruptions.
        """
        generator = self._generator
        if generator is None or generator.on_tokens is None or self._options.rank != 0:
            return
        places = len(self._given) or 1
        generator.on_tokens(
            sum(
                len(sample.response.token_ids)
                for sample in samples
                if not (self._given and self._given[sample.number % places] is not None)
            )
        )

    def _header(self, request: GenerationRequest, number: int) -> dict[str, Any]:
        scores = tuple(self._options.scorers)
        if self._generator is None:
            return request.header("", None, scores)
        if self._weights.get("round") != number:
            version = self._generator.version()
            self._weights = {"round": number, "model": self._generator.fingerprint(), "version": version}
            self._resumed = False
        return request.header(self._weights["model"], self._weights["version"], scores)


def _rename_stale(path: Path, header: Mapping[str, Any], options: GenerationOptions) -> None:
    """Rename files with another header, with a warning that says what differs; all ranks wait for it."""
    if options.rank == 0:
        drop_unfinished(path)
        for renamed, found in StageFile(path, header).rename_stale():
            logger.warning(
                "%s was made in another way (%s): kept as %s, and generated again",
                path,
                "; ".join(found),
                renamed.name,
            )
    barrier(options.world_size)
