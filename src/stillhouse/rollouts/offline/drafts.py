"""Prompts that ask for one answer out of several drafts (aggregation fine-tuning)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.core.types import question_of
from stillhouse.errors import DataError
from stillhouse.rollouts.offline.samples import Sample, samples_digest
from stillhouse.rollouts.offline.stage_files import StageFile, stage_header, write_rows
from stillhouse.rollouts.offline.stored_samples import samples_by_prompt

WORDING = "Here are drafts of an answer. Some may be wrong.\n\n{drafts}\n\nWrite the one best answer."
"""Follows the question. The paper has the task, not these words."""


@dataclass(frozen=True, slots=True)
class DraftsResult:
    """How many prompts got drafts, and why others did not.

    Example: `DraftsResult(rows=30, answered=30, left_out=Counter({"fewer than 5 drafts": 2}), cached=False)`
    """

    rows: int
    answered: int
    """Rows with the data set's response to the question, which answers this one too."""
    left_out: Counter[str]
    """Prompts by reason."""
    cached: bool
    """Whether the output was there already, from the same drafts."""


def aggregate_drafts(paths: Sequence[Path], count: int, output: Path) -> DraftsResult:
    """Write a row for each prompt that asks for the best answer, given `count` drafts of it.

    Method: aggregation fine-tuning (arXiv 2501.11877). Where the drafts are the student's own it is the
    paper's on-policy form. The response of a row is the prompt's first reference; where there is none,
    `stillhouse generate` has a teacher write it.

    Args:
        paths: stage files of `generate -n`, JSONL with responses, or run folders.
        count: drafts in each row, the first ones that are finished and not blank.
        output: a stage file, which is a data set too.

    Raises:
        StageMismatch: `output` comes from other drafts.
        DataError: a file cannot be read, or no prompt has so many drafts.
    """
    samples, groups = samples_by_prompt(paths)
    header = stage_header("drafts", drafts=count, of=samples_digest(samples), wording=WORDING)
    left_out: Counter[str] = Counter()
    rows = list(_rows(groups, count, left_out))
    if not rows:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in left_out.items())
        raise DataError(f"{', '.join(map(str, paths))}: no prompt has {count} drafts ({reasons}).")
    done = StageFile(output, header).rows()
    if done is None:
        write_rows(output, header, rows)
    return DraftsResult(len(rows), sum("response" in row for row in rows), left_out, done is not None)


def _rows(groups: Sequence[Sequence[Sample]], count: int, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    number = 0
    for samples in groups:
        drafts = [one.text.strip() for one in samples if one.response.finished and one.text.strip()]
        if len(drafts) < count:
            left_out[f"fewer than {count} finished drafts"] += 1
            continue
        prompt = samples[0].response.prompt
        told = "\n\n".join(f"Draft {place}:\n{text}" for place, text in enumerate(drafts[:count], start=1))
        references = list(prompt.references)
        yield {
            "number": number,
            "id": prompt.id,
            **_with_text_after(prompt.fields, WORDING.format(drafts=told)),
            **({"response": references[0], "references": references} if references else {}),
            **({"facts": dict(prompt.facts)} if prompt.facts else {}),
            "question": question_of(prompt.fields),
            "drafts": drafts[:count],
        }
        number += 1


def _with_text_after(fields: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The fields of a prompt with a text after its question."""
    place = "input" if fields.get("input") else "prompt"
    asked = fields[place]
    if isinstance(asked, str):
        return {**fields, place: f"{asked}\n\n{text}"}
    *before, last = asked
    return {**fields, place: [*before, {**last, "content": f"{last['content']}\n\n{text}"}]}
