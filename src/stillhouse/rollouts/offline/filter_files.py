"""Filters over files of responses, outside any training: `stillhouse curate`.

Each shard checks blocks of prompts with the filters that look at one response (or pair) at a time, and saves
what it has checked. When all shards are there, filters that compare responses see those of all of them, and
what is kept and dropped is written (`filtered_rows.py`). One process is the only shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse import console
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Response
from stillhouse.errors import ConfigError, DataError, Fault, ModelError
from stillhouse.models import TeacherModel, fingerprint_of_files, load_teacher, load_tokenizer
from stillhouse.rollouts.offline.curation import NO_RESPONSE, requirements_of
from stillhouse.rollouts.offline.filtered_rows import (
    Checked,
    Count,
    Prompts,
    applies,
    counts_of,
    reasons_of,
    write_filtered,
    written_counts,
)
from stillhouse.rollouts.offline.filters import Drop, Filter, FilterContext
from stillhouse.rollouts.offline.generation import Scorer
from stillhouse.rollouts.offline.samples import Sample
from stillhouse.rollouts.offline.scoring import mean_logprobs
from stillhouse.rollouts.offline.shards import blocks
from stillhouse.rollouts.offline.stage_files import StageFile, stage_header
from stillhouse.rollouts.offline.stored_samples import StoredSamples, read_samples

BLOCK = 64
"""Prompts that are checked together, and whose responses are scored in one call."""
_SAVED_BLOCKS = 16
"""Blocks between two saves where no teacher scores."""


@dataclass(frozen=True)
class FilterResult:
    """How many prompts were kept, and why responses were dropped.

    Example: `FilterResult(prompts=9, kept=7, counts=[("teacher", "empty", "empty", 2)], cached=False)`
    """

    prompts: int
    """Pairs, where there are two sources; those of the shard, while others are not finished."""
    kept: int
    counts: list[Count]
    cached: bool
    """Whether the output was there already, from the same rows and filters."""
    finished: bool = True
    """Whether all shards are, so that the output is written."""
    pending: tuple[str, ...] = ()
    """Filters that compare responses, and so wait for all shards."""


def filter_files(
    paths: Sequence[Path],
    filters: Sequence[Filter],
    output: Path,
    *,
    held_out: Sequence[str] = (),
    teacher: TeacherModel | None = None,
    shard: tuple[int, int] = (0, 1),
) -> FilterResult:
    """Pass the rows of stage files through filters, into `output` and, with reasons, OUTPUT.dropped.jsonl.

    A teacher's and a student's response to the same prompt are a pair: both are dropped if one of them is.

    Args:
        paths: stage files, JSONL with responses, or run folders (of which the newest round counts).
        filters: in order.
        output: the rows that are kept.
        held_out: texts that filters against contamination compare with.
        teacher: scores responses that have no likelihood yet.
        shard: which of how many shards to check; the last one that finishes writes the output.

    Raises:
        StageMismatch: `output` or a shard comes from other rows or filters.
        DataError: a file cannot be read.
        ConfigError: a filter needs something that was not given.
    """
    by_source = read_samples(paths)
    scored, unscored = check_filters(by_source, filters, held_out, teacher)
    scorer = _fingerprint(teacher) if teacher is not None and unscored else None
    header = stage_header(
        "curated",
        filters=[one.model_dump(mode="json") for one in filters],
        held_out=derived_seed(0, *sorted(held_out)) if held_out else None,
        sources={name: samples.digest for name, samples in by_source.items()},
        teacher=scorer,
    )
    stage = StageFile(output, header, *shard)
    keys = np.concatenate([samples.keys_hashed for samples in by_source.values()])
    prompts = Prompts(keys)
    if stage.is_finished():
        stage.remove_shards()
        return FilterResult(len(prompts), *written_counts(output, len(prompts)), True)
    score = _scorer(teacher, scored.values()) if teacher is not None and unscored else None
    check = _Check(by_source, filters, held_out, tuple(scored), score)
    own = blocks(len(prompts), BLOCK, *shard)
    _check_shard(prompts, own, check, stage)
    sources, count, total = list(by_source), len(prompts), len(prompts.of_row)
    del by_source, scored, check, prompts  # what is joined is indexed anew, and either takes its memory
    written: list[tuple[int, list[Count]]] = []
    if stage.merge(total, lambda rows: written.append(write_filtered(output, header, rows))):
        result = written[0] if written else written_counts(output, count)
        return FilterResult(count, *result, False)
    here, prompts = stage.partial_rows(), Prompts(keys)
    units = [prompts.rows_of(prompt) for block in own for prompt in block]
    reasons = (reasons_of((Checked.of_row(here[n]) for n in rows), sources) for rows in units)
    pending = tuple(one.kind for one in filters if one.compares_responses())
    return FilterResult(len(units), *counts_of(reasons, sources), False, False, pending)


def check_filters(
    by_source: Mapping[str, StoredSamples],
    filters: Sequence[Filter],
    held_out: Sequence[str],
    teacher: TeacherModel | None,
) -> tuple[dict[str, StoredSamples], int]:
    """Make sure that the filters are given what they need.

    Returns:
        The sources whose likelihood under the teacher they need, and how many responses have none yet.

    Raises:
        ConfigError: a filter needs something that was not given.
        DataError: a response has no token ids to score.
    """
    _check_held_out(filters, held_out)
    scored = _scored_sources(by_source, filters)
    return scored, _check_unscored(scored.values(), teacher)


class _Check:
    """What the filters that look at one response, or one pair, say of some prompts."""

    def __init__(
        self,
        by_source: Mapping[str, StoredSamples],
        filters: Sequence[Filter],
        held_out: Sequence[str],
        scored: Sequence[str],
        score: Scorer | None,
    ) -> None:
        self._by_source = by_source
        self._filters = filters
        self._scored = scored
        self._score = score
        self.scores = score is not None
        """Whether a teacher scores responses."""
        self._contexts = {name: FilterContext(lambda: held_out) for name in by_source}
        self._starts = np.cumsum([0, *map(len, by_source.values())])

    def rows(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The rows of the shard for these rows of the sources, which are whole prompts."""
        found: dict[str, dict[int, Sample]] = {name: {} for name in self._by_source}
        for number in sorted(numbers):
            source = int(np.searchsorted(self._starts, number, side="right")) - 1
            name = list(self._by_source)[source]
            found[name][number] = self._by_source[name][number - int(self._starts[source])]
        for name in self._scored:
            self._add_scores(found[name])
        rows: dict[int, dict[str, Any]] = {}
        for name, samples in found.items():
            partners = {s.key: s for other, held in found.items() if other != name for s in held.values()}
            drops = self._drops(name, samples, replace(self._contexts[name], partners=partners))
            for number, sample in samples.items():
                checked = Checked(name, *drops.get(number, (len(self._filters), None)))
                rows[number] = {"number": number, "checked": checked.as_json(), "row": sample.to_row()}
        return rows

    def _add_scores(self, samples: dict[int, Sample]) -> None:
        left = [n for n, one in samples.items() if "teacher" not in one.scores and not one.missing]
        if left and self._score is not None:
            for number, score in zip(left, self._score([samples[n].response for n in left]), strict=True):
                one = samples[number]
                samples[number] = replace(one, scores={**one.scores, "teacher": score})

    def _drops(
        self, source: str, samples: Mapping[int, Sample], context: FilterContext
    ) -> dict[int, tuple[int, Drop]]:
        """By row the place of the filter that drops it, and why."""
        dropped = {number: (-1, NO_RESPONSE) for number, one in samples.items() if one.missing}
        for place, one in enumerate(self._filters):
            if one.compares_responses() or not applies(one, source, len(self._by_source)):
                continue
            left = [number for number in samples if number not in dropped]
            verdicts = one.apply([samples[number] for number in left], context)
            for number, drop in zip(left, verdicts, strict=True):
                if drop is not None:
                    dropped[number] = place, replace(drop, filter=one.kind)
        return dropped


def _check_shard(prompts: Prompts, own: Sequence[range], check: _Check, stage: StageFile) -> None:
    """Check the blocks of prompts of a shard that are not saved yet."""
    share = sum(map(prompts.count, own))
    saved = stage.partial_rows()
    done = sum(number in saved for block in own for number in prompts.rows_in(block)) if saved else 0
    if done == share:
        if not own:
            stage.append([], share)
        return

    def unsaved() -> Iterator[tuple[list[int], list[int]]]:
        for block in own:
            numbers = prompts.rows_in(block)
            if wanted := [number for number in numbers if number not in saved]:
                yield numbers, wanted

    left = unsaved()
    title, group = ("Scoring responses", 1) if check.scores else ("Filtering responses", _SAVED_BLOCKS)
    with console.progress(title, total=share, done=done) as bar:
        while some := list(islice(left, group)):
            rows = []
            for numbers, wanted in some:  # a block as a whole, so that rounding stays the same
                found = check.rows(numbers)
                rows += [found[number] for number in wanted]
            stage.append(rows, share)
            bar.advance(len(rows))


def _check_held_out(filters: Sequence[Filter], held_out: Sequence[str]) -> None:
    for one in filters:
        needed = "evaluation_texts" in one.requirements().data
        if needed and not held_out and getattr(one, "against", None) is None:
            raise ConfigError(
                Fault(
                    f"--filter {one.kind}",
                    "has nothing to compare with",
                    hint="Name the evaluation sets: --held-out FILE, or --like RUN.YAML.",
                )
            )


def _scored_sources(
    by_source: Mapping[str, StoredSamples], filters: Sequence[Filter]
) -> dict[str, StoredSamples]:
    """The sources whose likelihood under the teacher a filter needs."""
    return {
        name: samples
        for name, samples in by_source.items()
        if requirements_of([one for one in filters if applies(one, name, len(by_source))]).models
    }


def _check_unscored(scored: Iterable[StoredSamples], teacher: TeacherModel | None) -> int:
    """How many responses have no likelihood under the teacher, which must be able to score them."""
    unscored = sum(samples.unscored for samples in scored)
    if unscored and teacher is None:
        raise ConfigError(
            Fault(
                "--teacher",
                f"{unscored} responses have no likelihood under the teacher, which a filter needs",
                hint="Name the teacher, or write the file with --score.",
            )
        )
    without = next((samples.without_tokens for samples in scored if samples.without_tokens), None)
    if without is not None:
        raise DataError(f"{without}: has no token ids to score; files of `stillhouse generate` have them.")
    return unscored


def _fingerprint(teacher: TeacherModel) -> str:
    """A digest of the teacher's files; a hub name that is not cached yet is downloaded first."""
    try:
        return fingerprint_of_files(teacher)
    except ModelError:
        load_teacher(teacher)
        return fingerprint_of_files(teacher)


def _scorer(teacher: TeacherModel, scored: Iterable[StoredSamples]) -> Scorer:
    """What gives the teacher's likelihood; it is loaded when it is first asked.

    Raises:
        DataError: token ids are not the teacher's.
    """
    vocab = len(load_tokenizer(teacher))
    for samples in scored:
        token, prompt = samples.largest_token
        if token >= vocab:
            raise DataError(
                f"{prompt}: has token ids that the tokenizer of {teacher.path} does not know. Name a teacher "
                "(--teacher) with the tokenizer of the model that generated the file."
            )
    loaded: list[Any] = []

    def score(responses: Sequence[Response]) -> list[float]:
        loaded[:] = loaded or [load_teacher(teacher)]
        return mean_logprobs(loaded[0], responses, pad_id=0, vocab=vocab)

    return score
