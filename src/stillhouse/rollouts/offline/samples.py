"""A response with all that filters, files and people want to know of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stillhouse.core.types import Prompt, Response


@dataclass(frozen=True, slots=True)
class Sample:
    """A response as text and as tokens, with who wrote it and how likely it is.

    Example: `Sample(0, response, text="Fig.", by="teacher", scores={"teacher": -0.31})`
    """

    number: int
    """Its place in the stage."""
    response: Response
    text: str
    by: str
    """Who wrote it: "teacher", "student", "fixed" (the data set), or the name of another generator.

    `response.source` says whose place it takes in the training: text of another generator may stand in the
    teacher's.
    """
    scores: Mapping[str, float] = field(default_factory=dict)
    """Mean log-probability in nats per token under "teacher" and "student", as far as measured."""
    index: int = 0
    """Which of several responses to the same prompt it is."""

    @property
    def missing(self) -> bool:
        """Whether nobody has written it."""
        return self.by == NOBODY

    def row(self) -> dict[str, Any]:
        """As a row of a stage file. It is a row of data too: `prompt`, `response` and `references` are."""
        response, prompt, version = self.response, self.response.prompt, self.response.student_version
        optional = {
            "sample": self.index,
            "logprobs": response.logprobs,
            "scores": dict(self.scores),
            "references": list(prompt.references),
            "facts": dict(prompt.facts),
        }
        return {
            "number": self.number,
            "id": prompt.id,
            "source": response.source,
            "by": self.by,
            **({} if version is None else {"student_version": version}),
            **(dict(prompt.asked) or {"prompt": prompt.text}),
            "response": self.text,
            "finished": response.finished,
            "prompt_ids": list(prompt.token_ids),
            "token_ids": list(response.token_ids),
            **{name: value for name, value in optional.items() if value},
        }

    @classmethod
    def of(cls, row: Mapping[str, Any], prompt: Prompt | None = None) -> Sample:
        """From a row of a stage file, or of any data with `prompt` and `response`.

        Args:
            row: the row.
            prompt: the very prompt, where it is at hand.
        """
        asked = {name: row[name] for name in ("prompt", "input") if row.get(name)}
        prompt = prompt or Prompt(
            str(row.get("id", row.get("number", ""))),
            tuple(row.get("prompt_ids", ())),
            "",
            references=tuple(row.get("references", ())),
            asked=asked,
            facts=row.get("facts", {}),
        )
        logprobs = row.get("logprobs")
        response = Response(
            prompt,
            tuple(row.get("token_ids", ())),
            row.get("source", "fixed"),
            row.get("finished", True),
            row.get("student_version"),
            tuple(logprobs) if logprobs else None,
        )
        return cls(
            row.get("number", 0),
            response,
            row["response"],
            row.get("by", "unknown"),
            row.get("scores", {}),
            row.get("sample", 0),
        )


NOBODY = "nobody"


def absent(number: int, prompt: Prompt, source: Any) -> Sample:
    """Stands where nobody has a response to the prompt."""
    return Sample(number, Response(prompt, (), source), "", NOBODY)


def digest_of(samples: Sequence[Sample]) -> str:
    """A digest of who wrote which tokens for which prompt."""
    facts = [[s.by, s.response.prompt.id, s.text, s.response.token_ids] for s in samples]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """A digest of ids and tokens of prompts, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id} {prompt.token_ids}\n".encode())
    return digest.hexdigest()[:32]
