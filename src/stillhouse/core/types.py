"""What flows between the parts: prompts, responses, progress. Frozen and small."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from stillhouse.core.images import ImageRef, without_images
from stillhouse.core.requirements import MAIN

Source = Literal["fixed", "teacher", "student", "text", "chosen", "rejected", "direct"]
"""Who wrote a response: the data set, the teacher, the student, or nobody (plain text). Of a preference pair
of the data set: the chosen response or the rejected one. Of a response of the data set with a chain of
thought: the answer alone."""

SOURCES: tuple[Source, ...] = get_args(Source)


def turn_text(turn: Mapping[str, Any]) -> str:
    """The text of a turn of a conversation; its tool calls as lines of JSON."""
    calls = turn.get("tool_calls") or ()
    lines = [json.dumps(call.get("function", call), ensure_ascii=False) for call in calls]
    return "\n".join(filter(None, (without_images(turn["content"]), *lines)))


def question_of(row: Mapping[str, Any]) -> str:
    """The prompt of a row as one text: its `prompt` (a text or turns) and its `input`."""
    prompt = row["prompt"]
    prompt = without_images(prompt) if isinstance(prompt, str) else "\n".join(map(turn_text, prompt))
    return f"{prompt}\n{row['input']}" if row.get("input") else prompt


PromptContent = tuple[tuple[int, ...], tuple[str, ...]]
"""The token ids of a prompt and the digests of its images."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids, with the reference response where the data set has one.

    Example:
        `Prompt("train:17", token_ids=(5, 9), text="A fruit?", response_ids=(41, 0), references=("Fig",))`
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    response_ids: tuple[int, ...] | None = None
    """The reference response, end-of-sequence token included; None where the row has no response."""
    response_finished: bool = True
    """False if the reference was cut at the length limit, so that it does not teach where to stop."""
    response_trained: tuple[int, ...] | None = None
    """1 for each token of the reference that is trained on, 0 for context between the answers of a
    conversation; None: all are."""
    references: tuple[str, ...] = ()
    """Reference texts for evaluation; may be several."""
    teacher_ids: tuple[int, ...] | None = None
    """The main teacher's prompt: the same in its template and token ids, or with more to read; None where
    the student's is the teacher's."""
    context_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The prompts of further teachers that have more to read than the student, by the teacher's name."""
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The prompt without the template, as the fields of a row: `prompt` (text or turns) and `input`."""
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The row's other fields, such as the tests of a programming task."""
    rejected_ids: tuple[int, ...] | None = None
    """The rejected response of a preference pair, whose chosen one is `response_ids`; None where the row is
    no pair, or nothing asks for it."""
    rejected_finished: bool = True
    """False if the rejected response was cut."""
    rejected_trained: tuple[int, ...] | None = None
    """As `response_trained`, for the rejected response."""
    direct_ids: tuple[int, ...] | None = None
    """The response without its chain of thought, where it has one and something asks for this."""
    images: tuple[ImageRef, ...] = ()
    """The images that the prompt shows, in the order of their tokens in `token_ids` and `teacher_ids`."""
    response_images: tuple[ImageRef, ...] = ()
    """The images that the reference shows between the answers of a conversation."""

    def as_fields(self) -> dict[str, Any]:
        """The prompt as the fields of a row that is read to the same prompt, its images included."""
        shown = {"images": [image.source.as_json() for image in self.images]} if self.images else {}
        return {**(dict(self.fields) or {"prompt": self.text}), **shown}

    def read_by(self, teacher: str) -> tuple[int, ...] | None:
        """The prompt of the teacher of this name, where that is not the student's."""
        return self.teacher_ids if teacher == MAIN else self.context_ids.get(teacher)

    @property
    def image_digests(self) -> tuple[str, ...]:
        """The digests of its images."""
        return tuple(image.digest for image in self.images)

    @property
    def content(self) -> PromptContent:
        """What a model reads: token ids and images. The same question about two images is two prompts."""
        return self.token_ids, self.image_digests

    @property
    def question(self) -> str:
        """The prompt as one text without the template; `text` where `fields` is empty."""
        return question_of(self.fields) if self.fields else self.text

    @property
    def num_trained(self) -> int:
        """How many tokens of the reference are trained on; 0 without one."""
        return len(self.response_ids or ()) if self.response_trained is None else sum(self.response_trained)

    def reference_response(self, source: Source = "fixed") -> Response | None:
        """The reference as a response in the role of `source`; None where the data set has none."""
        if self.response_ids is None:
            return None
        finished, trained = self.response_finished, self.response_trained
        return Response(
            self, self.response_ids, source, finished, trained=trained, images=self.response_images
        )

    def chain_and_answer(self) -> tuple[Response, Response] | None:
        """The response with its chain of thought, and the answer alone, beside which the teacher reads the
        chain; None where the row has no chain."""
        chain = self.reference_response()
        if chain is None or self.direct_ids is None:
            return None
        finished, instead = self.response_finished, chain.token_ids
        return chain, Response(self, self.direct_ids, "direct", finished, teacher_reads_instead=instead)

    def preference_pair(self) -> tuple[Response, Response] | None:
        """The chosen and the rejected response; None where the row is no pair."""
        chosen = self.reference_response("chosen")
        if chosen is None or self.rejected_ids is None:
            return None
        finished, trained = self.rejected_finished, self.rejected_trained
        return chosen, Response(self, self.rejected_ids, "rejected", finished, trained=trained)

    def swapped(self) -> Prompt:
        """The same with the chosen and the rejected response exchanged."""
        return replace(
            self,
            response_ids=self.rejected_ids,
            response_finished=self.rejected_finished,
            response_trained=self.rejected_trained,
            rejected_ids=self.response_ids,
            rejected_finished=self.response_finished,
            rejected_trained=self.response_trained,
        )


def images_of(prompts: Sequence[Prompt]) -> list[tuple[ImageRef, ...]]:
    """The images of each prompt; empty where none has any."""
    found = [prompt.images for prompt in prompts]
    return found if any(found) else []


@dataclass(frozen=True, slots=True)
class Response:
    """A response to one prompt, with who wrote it and, for the student, when.

    Example: `Response(prompt=p, token_ids=(41, 0), source="student", finished=True, student_version=120)`
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    """Ends with the end-of-sequence token if and only if `finished`."""
    source: Source
    finished: bool = True
    student_version: int | None = None
    """The optimiser step whose weights wrote it; None unless `source` is "student"."""
    logprobs: tuple[float, ...] | None = None
    """Log-probabilities (nats) under the distribution it was sampled from, where the engine gave them."""
    trained: tuple[int, ...] | None = None
    """1 for each token that is trained on, 0 for the others; None: all are."""
    reward: float | None = None
    """What a reward model gave it; None where none has read it."""
    teacher_reads_instead: tuple[int, ...] | None = None
    """Another response, in the student's ids, that the main teacher reads in its place: only whole texts can
    be compared then. None: the teacher reads this one."""
    images: tuple[ImageRef, ...] = ()
    """The images among its own tokens, which stand between the answers of a conversation."""
    repeated: bool = False
    """Whether it is a copy without weight in the loss, there to give all processes as many sequences."""

    @property
    def all_images(self) -> tuple[ImageRef, ...]:
        """Those of its prompt and its own."""
        return (*self.prompt.images, *self.images)


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one prompt.

    Example: `Completion(token_ids=(41, 0), finished=True)`
    """

    token_ids: tuple[int, ...]
    finished: bool
    """True if the end-of-sequence token was written; False if the length limit cut the text."""
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training has come; all that a schedule depends on.

    Example: `Progress(step=30, max_steps=120, epoch=0.75, epochs=3.0)`
    """

    step: int
    """Optimiser steps done."""
    max_steps: int
    epoch: float
    """Passes over the prompts done, with fraction."""
    epochs: float

    @property
    def fraction(self) -> float:
        """step / max_steps, between 0 and 1."""
        return min(1.0, self.step / max(1, self.max_steps))
