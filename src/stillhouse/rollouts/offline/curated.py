"""Rounds that pass through filters before anybody trains on them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from stillhouse.core.distributed import from_first
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Prompt, Response
from stillhouse.errors import DataError
from stillhouse.files import STAGE, drop_unfinished, write_json, write_jsonl
from stillhouse.rollouts.base import RolloutContext
from stillhouse.rollouts.offline.apply_filters import counted, judge, requirements_of
from stillhouse.rollouts.offline.filters.base import Around, Drop, Filter
from stillhouse.rollouts.offline.samples import Sample, digest_of
from stillhouse.rollouts.offline.side import Side
from stillhouse.rollouts.offline.stages import Row, Stage, header

logger = logging.getLogger("stillhouse")

SUMMARY = "curation.json"
_EXAMPLES = 3
"""Dropped responses that the summary shows for each side and filter."""
_FEW = 0.5
"""Shares of kept prompts below this are warned about."""
_SHOWN = 400
"""Characters of a text that the summary shows."""

Dropped = dict[str, dict[int, tuple[str, Drop]]]
"""Side -> place -> the filter, and why."""


@dataclass(frozen=True)
class Round:
    """What is trained on in a round.

    Example: `Round(1, {"train:1": [response, other_response]}, ("train:1",), {"curation/kept": 0.5})`
    """

    number: int
    groups: Mapping[str, list[Response]]
    """The responses on all sides, by the id of each prompt that was kept."""
    kept: tuple[str, ...]
    """The ids of the kept prompts, in order."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """For the metrics."""

    def group(self, prompt: Prompt, taken: set[str], seed: int) -> list[Response]:
        """The responses to a prompt; if it was dropped, those to a kept one that is not `taken` yet.

        So an optimiser step keeps its size whatever is dropped. Which one takes the place depends on the
        seed, the round and the prompt; where all are taken, one comes twice.
        """
        if prompt.id in self.groups:
            return self.groups[prompt.id]
        start = derived_seed(seed, "instead", self.number, prompt.id) % len(self.kept)
        order = (*self.kept[start:], *self.kept[:start])
        chosen = next((name for name in order if name not in taken), order[0])
        taken.add(chosen)
        return self.groups[chosen]


class Curated:
    """The rounds of one side or of two, filtered. Only the newest is held in memory.

    A prompt is dropped if one of its sides is. With `resample`, a dropped response is written again with a
    fresh seed, at most so often, as far as somebody writes it.
    """

    def __init__(
        self,
        context: RolloutContext,
        sides: Mapping[str, Side],
        filters: Sequence[Filter] = (),
        resample: int = 0,
    ) -> None:
        self._context = context
        self._sides = sides
        self._filters = filters
        self._resample = resample
        self._round: Round | None = None

    def round(self, number: int) -> Round:
        """Round `number`, from its files or made now.

        Raises:
            DataError: nothing is left of it.
        """
        if self._round is None or self._round.number != number:
            self._round = self._made(number)
        return self._round

    def _made(self, number: int) -> Round:
        samples = {name: side.samples(number) for name, side in self._sides.items()}
        missing = any(sample.missing for side in samples.values() for sample in side)
        if not self._filters and not missing:
            return self._left(number, samples, set(), {})
        total = len(self._context.prompts)
        record = _Record(self._context, number, self._head(number, samples), total)
        attempts: list[Dropped] = []
        rewritten: Counter[str] = Counter()
        for attempt in range(self._resample + 1):
            judged = partial(record.judged, attempt, self._judge, samples)
            dropped = from_first(self._context.rank, self._context.world_size, judged)
            attempts.append(dropped)
            again = self._again(dropped) if attempt < self._resample else {}
            if not again:
                break
            for name, places in again.items():
                for place, sample in self._sides[name].again(number, attempt + 1, places).items():
                    samples[name][place] = sample
                rewritten[name] += len(places)
        lost = {place for side in attempts[-1].values() for place in side}
        if self._context.rank == 0:
            record.write(samples, attempts, rewritten, lost)
        if len(lost) == total:
            raise DataError(
                f"round {number + 1}: the filters of responses.filters dropped all {total} prompts: "
                f"{_told(attempts[-1])}. Loosen them; examples are in {record.summary}."
            )
        kept = 1 - len(lost) / total
        if kept < _FEW and self._context.rank == 0:
            logger.warning(
                "round %d: filters dropped %d of %d prompts, so batches repeat the others: %s",
                number + 1,
                len(lost),
                total,
                _told(attempts[-1]),
            )
        facts = {"curation/kept": kept, "curation/rewritten": float(rewritten.total())}
        return self._left(number, samples, lost, facts)

    def _left(
        self, number: int, samples: Mapping[str, list[Sample]], lost: set[int], facts: dict[str, float]
    ) -> Round:
        groups = {
            prompt.id: [side[place].response for side in samples.values()]
            for place, prompt in enumerate(self._context.prompts)
            if place not in lost
        }
        return Round(number, groups, tuple(groups), facts)

    def _judge(self, samples: Mapping[str, list[Sample]]) -> Dropped:
        found: Dropped = {}
        for name, side in samples.items():
            beside = next((other for key, other in samples.items() if key != name), [])
            around = Around(self._context.held_out, dict(enumerate(beside)))
            numbered = [_at(place, sample) for place, sample in enumerate(side)]
            found[name] = dict(judge(numbered, self._filters, around, name).dropped)
        return found

    def _again(self, dropped: Dropped) -> dict[str, list[int]]:
        """The places on each side that are worth another try: nothing else has lost them for good."""
        hopeless = {
            place
            for name, places in dropped.items()
            for place in places
            if not self._sides[name].writes(place)
        }
        chosen = {name: sorted(set(places) - hopeless) for name, places in dropped.items()}
        return {name: places for name, places in chosen.items() if places}

    def _head(self, number: int, samples: Mapping[str, list[Sample]]) -> dict[str, Any]:
        held_out = (
            sorted(self._context.held_out())
            if "evaluation_texts" in requirements_of(self._filters).data
            else []
        )
        return header(
            "curation",
            round=number,
            filters=[one.model_dump(mode="json") for one in self._filters],
            resample=self._resample,
            held_out=derived_seed(0, *held_out),
            sides={name: digest_of(side) for name, side in samples.items()},
        )


class _Record:
    """What the filters said in a round: a stage file of all drops, and the summary for people and reports."""

    def __init__(self, context: RolloutContext, number: int, head: dict[str, Any], prompts: int) -> None:
        self.path = context.folder / f"curation-{number}.jsonl"
        self.summary = context.folder / SUMMARY
        self.number = number
        self.prompts = prompts
        self._head = head
        self._known: list[Row] | None = None

    def judged(self, attempt: int, judged: Any, samples: Mapping[str, list[Sample]]) -> Dropped:
        """The verdicts of an attempt: those on disk, where there are any, so that they stay the same."""
        if attempt == 0:
            drop_unfinished(self.path)
            stage = Stage(self.path, self._head)
            stage.set_aside()
            self._known = stage.rows()
        if self._known is None:
            found: Dropped = judged(samples)
            return found
        read: Dropped = {name: {} for name in samples}
        for row in self._known:
            if row["attempt"] == attempt:
                drop = Drop(row["reason"], row["detail"])
                read[row["side"]][row["number"]] = (row["filter"], drop)
        return read

    def write(
        self,
        samples: Mapping[str, list[Sample]],
        attempts: Sequence[Dropped],
        rewritten: Mapping[str, int],
        lost: set[int],
    ) -> None:
        """Keep the drops of all attempts, and put the round into the summary."""
        rows = [
            {
                "number": place,
                "id": samples[side][place].response.prompt.id,
                "side": side,
                "attempt": attempt,
                "filter": name,
                "reason": drop.reason,
                "detail": drop.detail,
            }
            for attempt, dropped in enumerate(attempts)
            for side, places in dropped.items()
            for place, (name, drop) in sorted(places.items())
        ]
        if self._known is None:
            write_jsonl(self.path, [{STAGE: self._head}, *rows])
        last = attempts[-1]
        told = {
            "round": self.number,
            "prompts": self.prompts,
            "kept": self.prompts - len(lost),
            "filters": self._head["filters"],
            "sides": {
                name: {
                    "by": dict(Counter(sample.by for sample in side)),
                    "dropped": counted(last[name].values()),
                    "dropped_at_first": counted(attempts[0][name].values()),
                    "rewritten": rewritten.get(name, 0),
                }
                for name, side in samples.items()
            },
            "examples": list(_examples(samples, last)),
        }
        before = json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.exists() else {}
        rounds = {**before.get("rounds", {}), str(self.number): told}
        write_json(
            self.summary, {"format": 1, "rounds": {key: rounds[key] for key in sorted(rounds, key=int)}}
        )


def _examples(samples: Mapping[str, list[Sample]], dropped: Dropped) -> list[dict[str, Any]]:
    """A few dropped responses of each side and filter."""
    shown: Counter[tuple[str, str]] = Counter()
    found = []
    for side, places in dropped.items():
        for place, (name, drop) in sorted(places.items()):
            if shown[side, name] == _EXAMPLES:
                continue
            shown[side, name] += 1
            sample = samples[side][place]
            found.append(
                {
                    "id": sample.response.prompt.id,
                    "side": side,
                    "by": sample.by,
                    "filter": name,
                    "reason": drop.reason,
                    "detail": drop.detail,
                    "prompt": sample.response.prompt.question[:_SHOWN],
                    "response": sample.text[:_SHOWN],
                }
            )
    return found


def _told(dropped: Dropped) -> str:
    return ", ".join(
        f"{count} x {name} ({side}: {reason})"
        for side, places in dropped.items()
        for name, reasons in counted(places.values()).items()
        for reason, count in reasons.items()
    )


def _at(place: int, sample: Sample) -> Sample:
    """The sample under its place in the round; one that was written again has another number in its file."""
    return sample if sample.number == place else replace(sample, number=place)
