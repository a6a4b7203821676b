"""The best of several responses to each prompt, by a ranker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError
from stillhouse.evaluate.rankers import Ranker, RankingPlace
from stillhouse.files import write_jsonl
from stillhouse.rollouts.offline.samples import Sample, samples_digest
from stillhouse.rollouts.offline.stage_files import StageFile, stage_header, write_rows
from stillhouse.rollouts.offline.stored_samples import samples_by_prompt


@dataclass(frozen=True, slots=True)
class BestResult:
    """What was kept of several responses.

    Example: `BestResult(prompts=20, kept=18, left_out=Counter({"unanswerable": 2}), gain=0.8, cached=False)`
    """

    prompts: int
    kept: int
    left_out: Counter[str]
    """Prompts by reason."""
    gain: float | None
    """By how much the kept response is better than the mean of its prompt; None if it was there already."""
    cached: bool


def best_of_files(paths: Sequence[Path], ranker: Ranker, output: Path) -> BestResult:
    """Keep of all responses to a prompt the one with the highest score; OUTPUT.dropped.jsonl has the others.

    Args:
        paths: stage files of `generate -n`, JSONL with responses, or run folders.
        ranker: what makes one response better; of equal scores the first is kept.
        output: a stage file, which is a data set too.

    Raises:
        StageMismatch: `output` comes from other responses or another ranker.
        DataError: a file cannot be read, or no response has a score.
    """
    samples, groups = samples_by_prompt(paths)
    header = stage_header(
        "responses",
        best_by=ranker.model_dump(mode="json"),
        scored_with=ranker.depends_on(),
        of=samples_digest(samples),
    )
    done = StageFile(output, header).rows()
    if done is not None:
        left = Counter({"unanswerable: no score": len(groups) - len(done)})
        return BestResult(len(groups), len(done), +left, None, True)
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    gains = []
    for group, scores in zip(groups, ranker.scores(groups, RankingPlace(output)), strict=True):
        known = [(score, -place) for place, score in enumerate(scores) if score is not None]
        best = -max(known)[1] if known else None
        for place, (sample, score) in enumerate(zip(group, scores, strict=True)):
            if place == best:
                kept.append({**_row(sample, len(kept)), "score": score})
            else:
                reason = "no score" if score is None else "not the best"
                dropped.append({**sample.to_row(), "score": score, "reason": reason})
        if known:
            gains.append(max(known)[0] - sum(score for score, _ in known) / len(known))
    if not kept:
        raise DataError(f"{', '.join(map(str, paths))}: no response has a score by {ranker.kind}.")
    write_jsonl(output.with_name(f"{output.stem}.dropped.jsonl"), dropped)
    write_rows(output, header, kept)
    left_out = Counter({"unanswerable: no score": len(groups) - len(kept)})
    return BestResult(len(groups), len(kept), +left_out, sum(gains) / len(gains), False)


def _row(sample: Sample, number: int) -> dict[str, Any]:
    """A kept response as the only one to its prompt."""
    return replace(sample, number=number, index=0).to_row()
