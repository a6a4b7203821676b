"""Whole rounds of responses: written once for all prompts, bit by bit, and kept as stage files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.core.distributed import wait
from stillhouse.core.types import Prompt, Response, Source
from stillhouse.engines.base import Sampling
from stillhouse.errors import DataError
from stillhouse.files import drop_unfinished
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.offline.samples import Sample, absent, digest_of, digest_of_prompts
from stillhouse.rollouts.offline.stages import Stage, header

logger = logging.getLogger("stillhouse")

CHUNK = 512
"""Responses that are written before they are saved, unless a policy says otherwise."""

Score = Mapping[str, Callable[[Sequence[Response]], list[float]]]


@dataclass(frozen=True)
class Setting:
    """What every round of a run has in common."""

    rank: int = 0
    ranks: int = 1
    decode: Callable[[Sequence[int]], str] | None = None
    score: Score = field(default_factory=dict)
    """Who says how likely each response is; what they say is kept beside it."""
    chunk: int = CHUNK
    """Responses that one process writes before it saves them. A chunk is always written as a whole, so that
    even rounding is the same after an interruption and for any number of processes."""
    join: bool = True
    """Wait for the other processes; without, each leaves its part and the last one joins them."""


@dataclass(frozen=True)
class Order:
    """What is asked for: who writes which responses, and how."""

    prompts: Sequence[Prompt]
    source: Source
    """On whose side they stand."""
    writer: ResponseGenerator | None
    """Who writes what is not given; without one such places stay empty."""
    seed: int
    sampling: Sampling | None = None
    given: Sequence[Sample | None] = ()
    """Responses that are there already, by place."""
    numbers: Sequence[int] | None = None
    """What tells prompts apart, as in `Engine.generate`; by default their places."""
    samples: int = 1
    """Responses for each prompt."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the header says, such as the round."""

    def header(self, model: str, version: int | None, scores: Sequence[str]) -> dict[str, Any]:
        """The header of the file; `model` is a digest of the weights that write."""
        there = [sample for sample in self.given if sample is not None]
        writing = self.writer is not None and len(there) < len(self.prompts)
        sampling = (
            self.writer.resolve_sampling(self.sampling) if writing and self.writer is not None else None
        )
        return header(
            "responses",
            source=self.source,
            **self.facts,
            seed=self.seed,
            prompts={"count": len(self.prompts), "digest": digest_of_prompts(self.prompts)},
            samples=self.samples,
            sampling=None if sampling is None else sampling.model_dump(mode="json"),
            model=model if writing else None,
            student_version=version if writing else None,
            given=digest_of(there) if there else None,
            scores=sorted(scores),
        )


def make(path: Path, order: Order, setting: Setting, head: dict[str, Any], title: str) -> list[Sample] | None:
    """The responses of an order in the order of its prompts, from the file at `path` or written now.

    What an interrupted process left is used as far as it goes. With several processes each writes every
    `ranks`-th chunk.

    Returns:
        The samples; None if other processes have not written their parts yet and nobody waits for them.

    Raises:
        Stale: there is a file that was made in another way.
    """
    stage = Stage(path, head, setting.rank, setting.ranks)
    rows = stage.rows()
    if rows is None:
        _Writing(order, setting, stage, title).run()
        if setting.join:
            wait(setting.ranks)
            if setting.rank == 0 and not stage.finish(len(order.prompts) * order.samples):
                raise DataError(
                    f"{path}: some of its parts are missing; all processes must see the same folder."
                )
            wait(setting.ranks)
        else:
            stage.finish(len(order.prompts) * order.samples)
        rows = stage.rows()
    if rows is None:
        return None
    return _samples(path, rows, order)


def _samples(path: Path, rows: Sequence[Mapping[str, Any]], order: Order) -> list[Sample]:
    wanted = len(order.prompts) * order.samples
    numbers = [row.get("number") for row in rows]
    if numbers != list(range(wanted)):
        raise DataError(
            f"{path}: has {len(rows)} responses, not one for each of {wanted} places in their order. "
            "Delete the file to write it again."
        )
    return [Sample.of(row, order.prompts[number % len(order.prompts)]) for number, row in enumerate(rows)]


class _Writing:
    """One process's part in the writing of a stage."""

    def __init__(self, order: Order, setting: Setting, stage: Stage, title: str) -> None:
        self.order = order
        self.setting = setting
        self.stage = stage
        self.title = title

    def run(self) -> None:
        """Write every chunk that is this process's and not whole yet."""
        total, size = len(self.order.prompts) * self.order.samples, self.setting.chunk
        starts = range(0, total, size)[self.setting.rank :: self.setting.ranks]
        chunks = [range(start, min(start + size, total)) for start in starts]
        begun = self.stage.begun()
        done = sum(number in begun for chunk in chunks for number in chunk)
        with self._progress(sum(map(len, chunks)), done) as advance:
            for chunk in chunks:
                missing = [number for number in chunk if number not in begun]
                if missing:
                    rows = self._rows(chunk, advance, len(chunk) - len(missing))
                    self.stage.append([rows[number] for number in missing])

    @contextlib.contextmanager
    def _progress(self, total: int, done: int) -> Iterator[Callable[[int], None]]:
        if self.setting.rank != 0 or total == done:
            yield lambda n: None
            return
        with console.progress(self.title, total=total, done=done) as bar:
            yield bar.advance

    def _rows(
        self, chunk: range, advance: Callable[[int], None], done_before: int
    ) -> dict[int, dict[str, Any]]:
        """The rows of a chunk by number, made from what is given and what is written now."""
        found = {number: self._given(number) for number in chunk}
        asked = [number for number, sample in found.items() if sample is None]
        shown = done_before

        def progress(finished: int, _total: int) -> None:
            nonlocal shown
            if finished + len(chunk) - len(asked) > shown:
                advance(finished + len(chunk) - len(asked) - shown)
                shown = finished + len(chunk) - len(asked)

        progress(0, 0)
        for sample in self._write(asked, progress):
            found[sample.number] = sample
        samples = [sample for sample in found.values() if sample is not None]
        return {sample.number: sample.row() for sample in self._scored(samples)}

    def _given(self, number: int) -> Sample | None:
        index, place = divmod(number, len(self.order.prompts))
        given = self.order.given[place] if self.order.given else None
        if given is not None:
            return replace(given, number=number, index=index)
        if self.order.writer is None:
            return absent(number, self.order.prompts[place], self.order.source)
        return None

    def _write(self, asked: Sequence[int], progress: Callable[[int, int], None]) -> list[Sample]:
        writer, count = self.order.writer, len(self.order.prompts)
        if writer is None or not asked:
            return []
        places = [number % count for number in asked]
        numbers = asked if self.order.numbers is None else [self.order.numbers[place] for place in places]
        prompts = [self.order.prompts[place] for place in places]
        responses = writer.generate(
            prompts, self.order.seed, self.order.sampling, sample_ids=numbers, progress=progress
        )
        decode = self.setting.decode or (lambda ids: "")
        return [
            Sample(
                number,
                replace(response, source=self.order.source),
                decode(response.token_ids),
                writer.name,
                index=number // count,
            )
            for number, response in zip(asked, responses, strict=True)
        ]

    def _scored(self, samples: Sequence[Sample]) -> list[Sample]:
        there = [sample.response for sample in samples if not sample.missing]
        if not there or not self.setting.score:
            return list(samples)
        scores = {name: iter(score(there)) for name, score in self.setting.score.items()}
        return [
            sample
            if sample.missing
            else replace(sample, scores={name: next(values) for name, values in scores.items()})
            for sample in samples
        ]


def place_aside(path: Path, head: Mapping[str, Any], setting: Setting) -> None:
    """Rename files of another making, with a warning that says what differs; all processes wait for it."""
    if setting.rank == 0:
        drop_unfinished(path)
        for place, differing in Stage(path, head).set_aside():
            logger.warning(
                "%s was made in another way (%s): kept as %s, and written anew",
                path,
                "; ".join(differing),
                place.name,
            )
    wait(setting.ranks)
