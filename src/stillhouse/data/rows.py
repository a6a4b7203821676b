"""One parsed row of a dataset: the prompt, the response and references, whatever shape its file has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from stillhouse.config import StrictConfig
from stillhouse.core.images import ImageRef

Message = dict[str, Any]
"""One turn of a conversation: `role` and `content` (text), and where the row has them `reasoning_content`,
`tool_calls`, `tool_call_id`, `name` and, for a turn of the assistant, `weight` (0 or 1)."""


class Fields(StrictConfig):
    """Which field of a row holds what, for rows in none of the known formats. The others are detected."""

    prompt: str | None = None
    """The field with the question or instruction: a text, or a list of turns."""
    input: str | None = None
    """The field with the text that the instruction is about."""
    system: str | None = None
    """The field with the system message."""
    history: str | None = None
    """The field with the earlier turns: pairs of question and answer, or a list of turns."""
    tools: str | None = None
    """The field with the tools that the assistant may call: a list of JSON schemas, or that as JSON text."""
    reasoning: str | None = None
    """The field with the reasoning before the response."""
    response: str | None = None
    """The field with the response: a text, a list of texts (references), or a list of turns."""
    rejected: str | None = None
    """The field with the rejected response of a preference pair, whose chosen one is under `response`: a text
    or a list of turns."""
    messages: str | None = None
    """The field with a conversation: a list of turns, each `{role, content}` or `{from, value}`."""
    text: str | None = None
    """The field with plain text."""
    images: str | None = None
    """The field with the images: one, or a list."""

    @cached_property
    def named(self) -> dict[str, str]:
        """The fields that are named, by role."""
        return {role: name for role, name in self if name is not None}


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed row: either `messages` or `instruction` holds the prompt; `text` is for plain text only.

    Example: `Row("train.jsonl:1", instruction="Name a fruit.", response="Fig", references=("Fig", "Pear"))`
    """

    location: str
    """File and line, for error messages."""
    instruction: str = ""
    input: str = ""
    """The text that the instruction is about."""
    messages: tuple[Message, ...] = ()
    """The conversation up to and including the last turn before the response."""
    response: str | None = None
    """The response to train on: the first reference. Of a conversation, the content of its last turn."""
    completion: tuple[Message, ...] = ()
    """The turns after `messages` where they are more than one assistant turn of plain text: with reasoning,
    with tool calls, or several with tool results between. The last one is the assistant's."""
    rejected: str | None = None
    """The rejected response of a preference pair, whose chosen one is `response`; as that, of several turns
    the content of the last."""
    rejected_completion: tuple[Message, ...] = ()
    """The turns of the rejected response, where `completion` would have them."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools that the row offers, as JSON schemas, for the chat template."""
    references: tuple[str, ...] = ()
    text: str | None = None
    """Plain text for the language-model loss; of templated text also beside the turns that it holds."""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The fields that the format does not use."""
    finished: bool = True
    """False if the response was cut where it stands, so that it must not teach to end there."""
    rejected_finished: bool = True
    """False if the rejected response was cut."""
    format: str = field(default="", compare=False)
    """The name of the format that the row was read as."""
    unlabelled: bool = field(default=False, compare=False)
    """Whether its response was taken away, because it is beyond `labelled`."""
    image_values: tuple[Any, ...] = ()
    """What the file has for each image: a path, bytes, a URL. They stand where the texts of the prompt and
    of the turns have `core.images.IMAGE`, in that order."""
    folder: str = field(default="", compare=False)
    """Where the paths of its images begin."""
    images: tuple[ImageRef, ...] = ()
    """Its images, once they were opened."""
    source: int = field(default=0, compare=False)
    """Which of several mixed datasets it is from."""

    def prompt_fields(self) -> dict[str, Any]:
        """The prompt as the fields of a row, which `read_row` parses to the same prompt."""
        if self.messages:
            tools = {"tools": list(self.tools)} if self.tools else {}
            return {"prompt": list(self.messages), **tools}
        given = {"input": self.input} if self.input else {}
        return {"prompt": self.instruction, **given}

    @property
    def has_prompt(self) -> bool:
        """Whether it is more than plain text."""
        return self.text is None or bool(self.messages or self.instruction)

    @property
    def has_response(self) -> bool:
        """Whether there is something to train on."""
        return self.response is not None or bool(self.completion)

    @property
    def is_pair(self) -> bool:
        """Whether it has a chosen and a rejected response."""
        return self.rejected is not None or bool(self.rejected_completion)

    def rejected_row(self) -> Row:
        """The same prompt with the rejected response as the response."""
        return replace(
            self,
            response=self.rejected,
            completion=self.rejected_completion,
            finished=self.rejected_finished,
            references=(),
            rejected=None,
            rejected_completion=(),
        )

    @property
    def user_text(self) -> str:
        """The part of the prompt that may be truncated: the last message, the input, or the instruction."""
        if self.messages:
            return str(self.messages[-1]["content"])
        return self.input or self.instruction

    @property
    def asks_nothing(self) -> bool:
        """Whether the prompt is blank: its last turn has neither text nor tool calls, nor is a tool's."""
        if self.messages and (self.messages[-1].get("tool_calls") or self.messages[-1]["role"] == "tool"):
            return False
        return not self.user_text.strip()

    def with_user_text(self, text: str) -> Row:
        """The same row with another `user_text`."""
        if self.messages:
            last = {**self.messages[-1], "content": text}
            return replace(self, messages=(*self.messages[:-1], last))
        return replace(self, input=text) if self.input else replace(self, instruction=text)

    def without_response(self) -> Row:
        """The same prompt without a response and without facts that tell it."""
        facts = {name: self.extra[name] for name in ("teacher",) if name in self.extra}
        return replace(
            self,
            response=None,
            completion=(),
            references=(),
            rejected=None,
            rejected_completion=(),
            finished=True,
            rejected_finished=True,
            extra=facts,
            unlabelled=True,
        )

    def per_reference(self) -> Iterator[Row]:
        """One row for each reference, with that as its response; the row itself if it has at most one."""
        if len(self.references) < 2:
            yield self
            return
        for reference in self.references:
            yield replace(self, response=reference)
