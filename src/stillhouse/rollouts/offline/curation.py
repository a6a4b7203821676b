"""Curation: filters over the responses of all sources, and rounds that pass them before training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.core.distributed import broadcast_from_first
from stillhouse.core.requirements import Requirements
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Response
from stillhouse.errors import DataError
from stillhouse.files import STAGE, drop_unfinished, read_object, write_json, write_jsonl
from stillhouse.rollouts.base import RolloutContext
from stillhouse.rollouts.offline.filters import Drop, Filter, FilterContext
from stillhouse.rollouts.offline.generation import RoundGenerator
from stillhouse.rollouts.offline.samples import Sample, samples_digest
from stillhouse.rollouts.offline.stage_files import Row, StageFile, stage_header

logger = logging.getLogger("stillhouse")

NO_RESPONSE = Drop("no response", filter="missing")
"""Counts prompts without a response among what filters drop."""
_SUMMARY = "curation.json"
_SUMMARY_FORMAT = 2
_MAX_EXAMPLES = 3
"""Dropped responses that the summary shows for each source and filter."""
_MAX_EXAMPLE_CHARACTERS = 400
_LOW_SHARE = 0.5
"""Shares of kept prompts below this are warned about."""

Drops = dict[str, dict[int, Drop]]
"""source -> place of the sample -> why it is dropped."""


def apply_filters(
    by_source: Mapping[str, Sequence[Sample]],
    filters: Sequence[Filter],
    held_out: Callable[[], Sequence[str]] = tuple,
    *,
    any_source: bool = False,
) -> Drops:
    """Pass the samples of each source through filters in their order.

    A sample that one filter drops is not shown to those after it.

    Args:
        by_source: all samples of each source.
        filters: in order.
        held_out: the texts that the run evaluates on.
        any_source: apply filters that are for one source to all of them.
    """
    drops: Drops = {}
    for source, samples in by_source.items():
        partners = {s.key: s for name, others in by_source.items() if name != source for s in others}
        context = FilterContext(held_out, partners)
        dropped = {place: NO_RESPONSE for place, sample in enumerate(samples) if sample.missing}
        for one in filters:
            if not any_source and one.source not in ("all", source):
                continue
            places = [place for place in range(len(samples)) if place not in dropped]
            verdicts = one.apply([samples[place] for place in places], context)
            for place, drop in zip(places, verdicts, strict=True):
                if drop is not None:
                    dropped[place] = replace(drop, filter=one.kind)
        drops[source] = dropped
    return drops


def count_reasons(drops: Iterable[Drop]) -> dict[str, dict[str, int]]:
    """filter -> reason -> how many."""
    counts: dict[str, Counter[str]] = {}
    for drop in drops:
        counts.setdefault(drop.filter, Counter())[drop.reason] += 1
    return {name: dict(reasons) for name, reasons in counts.items()}


def requirements_of(filters: Sequence[Filter]) -> Requirements:
    """All that these filters need."""
    return Requirements.union(one.requirements() for one in filters)


def curation_totals(folder: Path) -> list[dict[str, Any]]:
    """The counts of every curated round in a folder of responses, without the examples."""
    path = folder / _SUMMARY
    names = ("round", "prompts", "kept", "sources")
    return [{name: one[name] for name in names} for one in _rounds(path).values()]


def _rounds(path: Path) -> dict[str, Row]:
    """The counts of each round by its number, from a summary that may be damaged."""
    rounds = read_object(path, "what its filters dropped is not known any more").get("rounds")
    if not isinstance(rounds, dict):
        return {}
    return {
        number: one
        for number, one in rounds.items()
        if number.isdecimal()
        and isinstance(one, dict)
        and {"round", "prompts", "kept", "sources"} <= one.keys()
    }


@dataclass(frozen=True)
class CuratedRound:
    """What is trained on in a round.

    Example: `CuratedRound(1, {"train:1": [response, other_response]}, ("train:1",), {"curation/kept": 0.5})`
    """

    number: int
    groups: Mapping[str, list[Response]]
    """The responses of all sources, by the id of each prompt that was kept."""
    kept: tuple[str, ...]
    """The ids of the kept prompts, in order."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def group(self, id: str, taken: set[str], seed: int) -> list[Response]:
        """The responses to a prompt; if it was dropped, those to a kept one that is not `taken` yet.

        So a batch keeps its size whatever is dropped. Which prompt stands in depends on the seed, the round
        and the dropped prompt; when all are taken, one comes twice.
        """
        if id in self.groups:
            return self.groups[id]
        start = derived_seed(seed, "instead", self.number, id) % len(self.kept)
        order = (*self.kept[start:], *self.kept[:start])
        chosen = next((name for name in order if name not in taken), order[0])
        taken.add(chosen)
        return self.groups[chosen]


class RoundCurator:
    """Makes rounds from one source or two and filters them; only the newest is held in memory.

    A prompt is dropped if the response of any source is. With `resample`, a dropped response is first
    generated again with fresh seeds, up to so many times, if it was generated at all.
    """

    def __init__(
        self,
        context: RolloutContext,
        generators: Mapping[str, RoundGenerator],
        filters: Sequence[Filter] = (),
        resample: int = 0,
    ) -> None:
        self._context = context
        self._generators = generators
        self._filters = filters
        self._resample = resample
        self._newest: CuratedRound | None = None

    def round(self, number: int) -> CuratedRound:
        """Round `number`, from its files or made now.

        Raises:
            DataError: the filters dropped all prompts.
        """
        if self._newest is None or self._newest.number != number:
            self._newest = self._curated(number)
        return self._newest

    def _curated(self, number: int) -> CuratedRound:
        samples = {source: generator.samples(number) for source, generator in self._generators.items()}
        if not self._filters and not any(s.missing for found in samples.values() for s in found):
            return self._kept_round(number, samples, set(), {})
        total = len(self._context.prompts)
        log = _CurationLog(self._context, number, self._header(number, samples), total)
        attempts: list[Drops] = []
        resampled: Counter[str] = Counter()
        for attempt in range(self._resample + 1):
            verdicts = partial(log.drops, attempt, samples, self._filters)
            drops = broadcast_from_first(self._context.world.rank, self._context.world.size, verdicts)
            attempts.append(drops)
            retries = self._retries(drops) if attempt < self._resample else {}
            if not retries:
                break
            for source, places in retries.items():
                again = self._generators[source].resample(number, attempt + 1, places)
                for place, sample in again.items():
                    samples[source][place] = sample
                resampled[source] += len(places)
        lost = {place for places in attempts[-1].values() for place in places}
        if self._context.world.rank == 0:
            log.write(samples, attempts, resampled, lost)
        self._check_enough_left(number, lost, attempts[-1], log.summary)
        metrics = {
            "curation/kept": 1 - len(lost) / total,
            "curation/resampled": float(resampled.total()),
        }
        return self._kept_round(number, samples, lost, metrics)

    def _check_enough_left(self, number: int, lost: set[int], drops: Drops, summary: Path) -> None:
        total = len(self._context.prompts)
        if len(lost) == total:
            raise DataError(
                f"round {number + 1}: the filters of responses.filters dropped all {total} prompts: "
                f"{_described(drops)}. Loosen them; examples are in {summary}."
            )
        if 1 - len(lost) / total < _LOW_SHARE and self._context.world.rank == 0:
            logger.warning(
                "round %d: filters dropped %d of %d prompts, so batches repeat the others: %s",
                number + 1,
                len(lost),
                total,
                _described(drops),
            )

    def _kept_round(
        self, number: int, samples: Mapping[str, list[Sample]], lost: set[int], metrics: dict[str, float]
    ) -> CuratedRound:
        groups = {
            prompt.id: [found[place].response for found in samples.values()]
            for place, prompt in enumerate(self._context.prompts)
            if place not in lost
        }
        return CuratedRound(number, groups, tuple(groups), metrics)

    def _retries(self, drops: Drops) -> dict[str, list[int]]:
        """The places of each source to resample: those whose prompt can still be saved by it."""
        hopeless = {
            place
            for source, places in drops.items()
            for place in places
            if not self._generators[source].can_regenerate(place)
        }
        chosen = {source: sorted(set(places) - hopeless) for source, places in drops.items()}
        return {source: places for source, places in chosen.items() if places}

    def _header(self, number: int, samples: Mapping[str, list[Sample]]) -> dict[str, Any]:
        needs_held_out = "evaluation_texts" in requirements_of(self._filters).data
        held_out = sorted(self._context.held_out()) if needs_held_out else []
        return stage_header(
            "curation",
            round=number,
            filters=[one.model_dump(mode="json") for one in self._filters],
            resample=self._resample,
            held_out=derived_seed(0, *held_out),
            sources={source: samples_digest(found) for source, found in samples.items()},
        )


class _CurationLog:
    """What the filters dropped in a round: a stage file of all drops, and a summary for people."""

    def __init__(self, context: RolloutContext, number: int, header: dict[str, Any], prompts: int) -> None:
        self.summary = context.folder / _SUMMARY
        self._path = context.folder / f"curation-{number}.jsonl"
        self._held_out = context.held_out
        self._number = number
        self._prompts = prompts
        self._header = header
        self._saved: list[Row] | None = None

    def drops(self, attempt: int, samples: Mapping[str, list[Sample]], filters: Sequence[Filter]) -> Drops:
        """What the filters drop in an attempt: as saved on disk, if it is, so that it stays the same."""
        if attempt == 0:
            drop_unfinished(self._path)
            stage = StageFile(self._path, self._header)
            stage.rename_stale()
            self._saved = stage.rows()
        if self._saved is None:
            return apply_filters(samples, filters, self._held_out)
        drops: Drops = {source: {} for source in samples}
        for row in self._saved:
            if row["attempt"] == attempt:
                drops[row["source"]][row["number"]] = Drop(row["reason"], row["detail"], row["filter"])
        return drops

    def write(
        self,
        samples: Mapping[str, list[Sample]],
        attempts: Sequence[Drops],
        resampled: Mapping[str, int],
        lost: set[int],
    ) -> None:
        """Save the drops of all attempts, and add the round to the summary."""
        if self._saved is None:
            write_jsonl(self._path, [{STAGE: self._header}, *_drop_rows(samples, attempts)])
        first, last = attempts[0], attempts[-1]
        summary = {
            "round": self._number,
            "prompts": self._prompts,
            "kept": self._prompts - len(lost),
            "filters": self._header["filters"],
            "sources": {
                source: {
                    "by": dict(Counter(sample.by for sample in found)),
                    "dropped": count_reasons(last[source].values()),
                    "dropped_at_first": count_reasons(first[source].values()),
                    "resampled": resampled.get(source, 0),
                }
                for source, found in samples.items()
            },
            "examples": list(_examples(samples, last)),
        }
        rounds = {**_rounds(self.summary), str(self._number): summary}
        ordered = {number: rounds[number] for number in sorted(rounds, key=int)}
        write_json(self.summary, {"format": _SUMMARY_FORMAT, "rounds": ordered})


def _drop_rows(samples: Mapping[str, list[Sample]], attempts: Sequence[Drops]) -> Iterator[Row]:
    for attempt, drops in enumerate(attempts):
        for source, places in drops.items():
            for place, drop in sorted(places.items()):
                yield {
                    "number": place,
                    "id": samples[source][place].response.prompt.id,
                    "source": source,
                    "attempt": attempt,
                    "filter": drop.filter,
                    "reason": drop.reason,
                    "detail": drop.detail,
                }


def _examples(samples: Mapping[str, list[Sample]], drops: Drops) -> Iterator[dict[str, Any]]:
    """A few dropped responses of each source and filter."""
    shown: Counter[tuple[str, str]] = Counter()
    for source, places in drops.items():
        for place, drop in sorted(places.items()):
            if shown[source, drop.filter] == _MAX_EXAMPLES:
                continue
            shown[source, drop.filter] += 1
            sample = samples[source][place]
            yield {
                "id": sample.response.prompt.id,
                "source": source,
                "by": sample.by,
                "filter": drop.filter,
                "reason": drop.reason,
                "detail": drop.detail,
                "prompt": sample.response.prompt.question[:_MAX_EXAMPLE_CHARACTERS],
                "response": sample.text[:_MAX_EXAMPLE_CHARACTERS],
            }


def _described(drops: Drops) -> str:
    return ", ".join(
        f"{count} x {name} ({source}: {reason})"
        for source, places in drops.items()
        for name, reasons in count_reasons(places.values()).items()
        for reason, count in reasons.items()
    )
