"""A response with everything that filters, stage files and readers want to know about it."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from stillhouse.core.types import Prompt, Response, Source

SampleKey = tuple[str, int]
"""The id of the prompt, and which of several responses to it this is."""
MISSING = "missing"
"""The origin of a placeholder for a response that does not exist."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A response as text and as tokens, with its origin and its scores.

    Example: `Sample(0, response, text="Fig.", by="teacher", scores={"teacher": -0.31})`
    """

    number: int
    """Its row in the stage file."""
    response: Response
    text: str
    by: str
    """Its origin: "teacher", "student", "fixed" (the data set), or the name of another generator.

    This is not always `response.source`, the role it has in training: another generator's response may stand
    in for the teacher's.
    """
    scores: Mapping[str, float] = field(default_factory=dict)
    """Mean log-probability in nats per token under "teacher" and "student", where measured."""
    index: int = 0
    """Which of several responses to the same prompt it is."""

    @property
    def key(self) -> SampleKey:
        """The prompt's id and the index: what the two responses of a pair have in common."""
        return self.response.prompt.id, self.index

    @property
    def missing(self) -> bool:
        """Whether there is no response."""
        return self.by == MISSING

    def to_row(self) -> dict[str, Any]:
        """As a row of a stage file, which can be read as training data too."""
        response, prompt, version = self.response, self.response.prompt, self.response.student_version
        optional = {
            "sample": self.index,
            "logprobs": response.logprobs,
            "trained": response.trained,
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
            **prompt.as_fields(),
            "response": self.text,
            "finished": response.finished,
            "prompt_ids": list(prompt.token_ids),
            "token_ids": list(response.token_ids),
            **{name: value for name, value in optional.items() if value},
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], prompt: Prompt | None = None) -> Sample:
        """From a row of a stage file, or of any data with `prompt` and `response`.

        Args:
            row: the row.
            prompt: the prompt it responds to, if it is at hand; else one is made from the row.
        """
        fields = {name: row[name] for name in ("prompt", "input", "tools", "images") if row.get(name)}
        prompt = prompt or Prompt(
            str(row.get("id", row.get("number", ""))),
            tuple(row.get("prompt_ids", ())),
            "",
            references=tuple(row.get("references", ())),
            fields=fields,
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
            tuple(row["trained"]) if row.get("trained") else None,
        )
        return cls(
            row.get("number", 0),
            response,
            row["response"],
            row.get("by", "unknown"),
            row.get("scores", {}),
            row.get("sample", 0),
        )


class SamplesOnDisk(Sequence[Sample]):
    """Samples that are read when they are asked for."""

    @abstractmethod
    def read(self, place: int) -> Sample:
        """The sample at a place, from 0."""

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self.read(one) for one in range(*place.indices(len(self)))]
        return self.read(place)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.read, range(len(self)))


def missing_sample(number: int, prompt: Prompt, source: Source) -> Sample:
    """The placeholder for a prompt without a response."""
    return Sample(number, Response(prompt, (), source), "", MISSING)


class SamplesDigest:
    """A digest of origins, prompts, texts and tokens, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"[")
        self._separator = b""

    def add(self, sample: Sample) -> None:
        """Add the next sample."""
        facts = [sample.by, sample.response.prompt.id, sample.text, sample.response.token_ids]
        self._digest.update(self._separator + json.dumps(facts).encode())
        self._separator = b", "

    def hexdigest(self) -> str:
        """The digest of all that were added."""
        digest = self._digest.copy()
        digest.update(b"]")
        return digest.hexdigest()[:32]


def samples_digest(samples: Iterable[Sample]) -> str:
    """A digest of origins, prompts, texts and tokens, in order."""
    digest = SamplesDigest()
    for sample in samples:
        digest.add(sample)
    return digest.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """A digest of ids, tokens and images of prompts, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(" ".join([prompt.id, str(prompt.token_ids), *prompt.image_digests]).encode() + b"\n")
    return digest.hexdigest()[:32]
