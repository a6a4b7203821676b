"""What a template makes of a row, and the row's texts marked so that none of them becomes a control token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.data.rows import Message, Row
from stillhouse.data.text_tokens import TextTokenizer

REASONING_MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
"""What encloses reasoning at the start of an assistant's turn, as datasets with reasoning write it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a response as text.

    Example: `Part("It is Fig.", trained=True)`
    """

    text: str
    trained: bool = True
    """False for what stands between the answers of a conversation: context, tool results."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as the text of its prompt and of its response.

    Example: `Rendered("A fruit?\\n", (Part("Fig"),))`
    """

    prompt: str
    """Up to where the response begins."""
    response: tuple[Part, ...] | None = None
    """Without the token that ends it; None for a row without a response."""
    trained_turns: int = 1
    """Turns of the assistant that are trained on."""
    context_turns: int = 0
    """Turns of the assistant that the model only reads."""
    answer: str | None = None
    """The text of the first turn that is trained on, where others follow it; None: the row's own response."""
    shown: str | None = None
    """The prompt with one token for each image, where it has images."""
    prompt_images: int = 0
    """How many of the row's images, from the first, are in the prompt."""


def guarded(row: Row, texts: TextTokenizer) -> Row:
    """The row with the spelled control tokens of its texts marked; the row itself if it has none.

    Reasoning that an assistant's turn begins with keeps its markers, which are the model's own tokens.

    Raises:
        UnspellableText: a text cannot be marked.
    """
    if not texts.spells_control("\0".join(_strings(row))):
        return row

    def answer(text: str) -> str:
        found = inline_reasoning(text)
        if found is None:
            return texts.guard(text)
        return f"{found.opening}{texts.guard(found.text)}{found.closing}{texts.guard(found.rest)}"

    def turn(message: Message) -> Message:
        marked: Message = mapped(message, texts.guard)
        if message["role"] == "assistant" and message.get("content"):
            marked["content"] = answer(message["content"])
        return marked

    return replace(
        row,
        instruction=texts.guard(row.instruction),
        input=texts.guard(row.input),
        messages=tuple(map(turn, row.messages)),
        response=None if row.response is None else answer(row.response),
        completion=tuple(map(turn, row.completion)),
        tools=mapped(row.tools, texts.guard),
        text=None if row.text is None else texts.guard(row.text),
    )


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Reasoning at the start of an assistant's turn.

    Example: `Reasoning("<think>", "2 and 2", "</think>", "4")`
    """

    opening: str
    """The marker, with the spaces before it."""
    text: str
    closing: str
    """Empty where the reasoning never ends, as where a limit cut it."""
    rest: str
    """The turn after the reasoning."""


def inline_reasoning(text: str) -> Reasoning | None:
    """The reasoning that a turn begins with; None where it begins with no marker of `REASONING_MARKERS`."""
    start = len(text) - len(text.lstrip())
    for opening, closing in REASONING_MARKERS:
        if text.startswith(opening, start):
            body = start + len(opening)
            return Reasoning(text[:body], *text[body:].partition(closing))
    return None


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its strings changed, names of fields included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): mapped(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(one, change) for one in value)
    return value


def _strings(row: Row) -> list[str]:
    """Every text of a row that a template may render."""
    found = [row.instruction, row.input, row.response or "", row.text or ""]

    def add(text: str) -> str:
        found.append(text)
        return text

    mapped([*row.messages, *row.completion, *row.tools], add)
    return found
