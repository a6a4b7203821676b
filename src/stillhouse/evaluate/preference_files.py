"""Preference pairs from several responses to each prompt: the best and the worst by a ranker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError
from stillhouse.evaluate.rankers import Ranker, RankingPlace
from stillhouse.rollouts.offline.samples import Sample, samples_digest
from stillhouse.rollouts.offline.stage_files import StageFile, stage_header, write_rows
from stillhouse.rollouts.offline.stored_samples import samples_by_prompt


@dataclass(frozen=True, slots=True)
class PairsResult:
    """How many prompts gave a pair, and why others did not.

    Example: `PairsResult(pairs=20, left_out=Counter({"tie": 3}), mean_margin=8.4, cached=False)`
    """

    pairs: int
    left_out: Counter[str]
    """Prompts by reason."""
    mean_margin: float
    """Of the pairs, in the ranker's unit."""
    cached: bool
    """Whether the output was there already, from the same responses and ranker."""


def pairs_of_files(
    paths: Sequence[Path], ranker: Ranker, output: Path, *, min_margin: float = 0.0
) -> PairsResult:
    """Rank the responses to each prompt; write the best and the worst as `chosen` and `rejected`.

    Responses of all files and sources to one prompt are ranked together: of a teacher, of a student, or of
    both.

    Args:
        paths: stage files of `generate -n`, JSONL with responses, or run folders.
        ranker: what makes one response better.
        output: a stage file, which is a data set too.
        min_margin: a pair needs a greater difference of scores.

    Raises:
        StageMismatch: `output` comes from other responses or another ranker.
        DataError: a file cannot be read, or no prompt gives a pair.
    """
    samples, groups = samples_by_prompt(paths)
    header = stage_header(
        "pairs",
        ranker=ranker.model_dump(mode="json"),
        scored_with=ranker.depends_on(),
        min_margin=min_margin,
        of=samples_digest(samples),
    )
    stage = StageFile(output, header)
    done = stage.rows()
    if done is not None:
        return PairsResult(len(done), _left_out(done, groups), _mean_margin(done), True)
    several = [group for group in groups if len({one.text.strip() for one in group}) > 1]
    left_out = Counter({"fewer than two different responses": len(groups) - len(several)})
    scores = ranker.scores(several, RankingPlace(output)) if several else []
    rows = list(_rows(several, scores, min_margin, left_out))
    left_out = +left_out
    if not rows:
        told = ", ".join(f"{count} x {reason}" for reason, count in left_out.items())
        raise DataError(f"{', '.join(map(str, paths))}: no prompt gives a pair ({told}).")
    write_rows(output, header, rows)
    return PairsResult(len(rows), left_out, _mean_margin(rows), False)


def _rows(
    groups: Sequence[Sequence[Sample]],
    scores: Sequence[Sequence[float | None]],
    min_margin: float,
    left_out: Counter[str],
) -> Iterator[dict[str, Any]]:
    number = 0
    for group, own in zip(groups, scores, strict=True):
        known = [
            (score, place)
            for place, score in enumerate(own)
            if score is not None and group[place].text.strip()
        ]
        if len(known) < 2:
            left_out["unanswerable: fewer than two scores"] += 1
            continue
        best = max(known, key=lambda one: (one[0], -one[1]))
        worst = min(known)
        if best[0] - worst[0] <= min_margin:
            left_out["tie" if best[0] == worst[0] else "margin too small"] += 1
            continue
        yield _row(number, group[best[1]], group[worst[1]], best[0] - worst[0], own)
        number += 1


def _row(
    number: int, chosen: Sample, rejected: Sample, margin: float, scores: Sequence[float | None]
) -> dict[str, Any]:
    prompt = chosen.response.prompt
    optional = {"references": list(prompt.references), "facts": dict(prompt.facts)}
    return {
        "number": number,
        "id": prompt.id,
        **prompt.as_fields(),
        "chosen": chosen.text,
        "rejected": rejected.text,
        "margin": margin,
        "scores": list(scores),
        "by": [chosen.by, rejected.by],
        **({} if chosen.response.finished else {"finished": False}),
        **({} if rejected.response.finished else {"rejected_finished": False}),
        **{name: value for name, value in optional.items() if value},
    }


def _mean_margin(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["margin"] for row in rows) / len(rows)


def _left_out(rows: Sequence[dict[str, Any]], groups: Sequence[Sequence[Sample]]) -> Counter[str]:
    return +Counter({"no pair, as counted when the file was written": len(groups) - len(rows)})
