"""What a row of a data set means: who is asked what, and what a good answer is.

Shapes understood without being told, the first that fits:

- `{messages: [{role, content}, ...]}`; the last assistant turn is the response
- `{instruction, input, output}` or `{instruction, input, outputs: [...]}`
- `{prompt, response}` or `{prompt, completion}`; both may be lists of messages
- `{question, answer}`
- `{text}`, for plain text
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stillhouse.config import StrictConfig, nearest
from stillhouse.errors import DataError

Message = dict[str, str]

_PROMPTS = ("instruction", "prompt", "question")
_INPUTS = ("input",)
_RESPONSES = ("outputs", "output", "response", "completion", "answer")


class Fields(StrictConfig):
    """Which field of a row holds what, for rows of another shape. Those not named are looked for."""

    prompt: str | None = None
    """The field with the question or instruction."""
    input: str | None = None
    """The field with what the instruction is about."""
    response: str | None = None
    """The field with the answer: a text, or a list of texts."""
    messages: str | None = None
    """The field with a conversation: a list of `{role, content}`."""
    text: str | None = None
    """The field with plain text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, understood. Either `messages` or `instruction` is filled; `text` only in plain text.

    Example: `Row("train.jsonl:1", instruction="Name a fruit.", response="Fig", references=("Fig", "Pear"))`
    """

    where: str
    """File and line, for messages to people."""
    instruction: str = ""
    input: str = ""
    messages: tuple[Message, ...] = ()
    """A conversation up to and with the last turn before the response."""
    response: str | None = None
    references: tuple[str, ...] = ()
    text: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The fields that are none of these."""

    def question(self) -> dict[str, Any]:
        """What is asked, in the fields of a row that `understand` reads back the same."""
        if self.messages:
            return {"prompt": list(self.messages)}
        given = {"input": self.input} if self.input else {}
        return {"prompt": self.instruction, **given}

    def asked(self) -> str:
        """The part of the prompt that may be cut: the input, the last message, or the instruction."""
        if self.messages:
            return self.messages[-1]["content"]
        return self.input or self.instruction

    def asking(self, words: str) -> Row:
        """The same row with `asked` replaced."""
        if self.messages:
            last = {**self.messages[-1], "content": words}
            return replace(self, messages=(*self.messages[:-1], last))
        return replace(self, input=words) if self.input else replace(self, instruction=words)

    def each(self) -> Iterator[Row]:
        """One row for every reference; the row itself where there is at most one."""
        for reference in self.references if len(self.references) > 1 else (self.response,):
            yield replace(self, response=reference)


def understand(raw: Mapping[str, Any], fields: Fields, where: str) -> Row:
    """Read one row.

    Raises:
        DataError: none of the shapes fits, a named field is missing, or a value has the wrong type.
    """
    for role, name in fields.model_dump(exclude_none=True).items():
        if name not in raw and role != "response":
            raise DataError(
                f"{where}: has no field {name!r} (fields.{role}){nearest(name, list(raw))}; "
                f"its fields: {', '.join(raw)}"
            )
    named = fields.messages or ("messages" if not fields.prompt and not fields.text else None)
    if named and isinstance(raw.get(named), list):
        return _conversation(raw, fields, named, where)
    if fields.messages:
        raise DataError(
            f"{where}: field {named!r} (fields.messages) should be a list of {{role, content}}, "
            f"got {type(raw[fields.messages]).__name__} {raw[fields.messages]!r:.80}"
        )
    prompt = fields.prompt or _first(raw, _PROMPTS)
    if prompt and not fields.text:
        return _asked(raw, fields, prompt, where)
    text = fields.text or "text"
    if text in raw:
        return Row(where, text=_text(raw[text], text, where))
    raise DataError(
        f"{where}: no prompt found in the fields {', '.join(raw) or '(none)'}; understood are messages, "
        "instruction/input/output, prompt/response, question/answer and text. Name the fields: "
        "fields: {prompt: ..., response: ...}"
    )


def _asked(raw: Mapping[str, Any], fields: Fields, prompt: str, where: str) -> Row:
    responses = _responses(raw, fields, where)
    first = responses[0] if responses else None
    if isinstance(raw[prompt], list):
        return Row(
            where,
            messages=_messages(raw[prompt], prompt, where),
            response=first,
            references=responses,
            facts=_others(raw, prompt, _response_field(raw, fields)),
        )
    given = fields.input or _first(raw, _INPUTS)
    return Row(
        where,
        instruction=_text(raw[prompt], prompt, where),
        input=_text(raw[given], given, where) if given and raw[given] is not None else "",
        response=first,
        references=responses,
        facts=_others(raw, prompt, given, _response_field(raw, fields)),
    )


def _conversation(raw: Mapping[str, Any], fields: Fields, name: str, where: str) -> Row:
    messages = _messages(raw[name], name, where)
    answers = _responses(raw, fields, where) if fields.response else ()
    if messages and messages[-1]["role"] == "assistant":
        answers = answers or tuple(m["content"] for m in messages[-1:] if m["content"])
        messages = messages[:-1]
    if not messages:
        raise DataError(f"{where}: the conversation in {name!r} has no turn before the response")
    return Row(
        where,
        messages=messages,
        response=answers[0] if answers else None,
        references=answers,
        facts=_others(raw, name, fields.response),
    )


def _messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise DataError(
                f"{where}: turn {number} of {name!r} should be {{role, content}}, got {turn!r:.80}"
            )
        content = _text(turn.get("content"), f"{name}[{number}].content", where)
        messages.append({"role": turn["role"], "content": content})
    return tuple(messages)


def _responses(raw: Mapping[str, Any], fields: Fields, where: str) -> tuple[str, ...]:
    """All responses of a row; empty ones count as none."""
    name = _response_field(raw, fields)
    if name is None or raw.get(name) is None:
        return ()
    value = raw[name]
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(item, Mapping) for item in values):
        values = [_messages(values, name, where)[-1]["content"]]
    texts = (_text(item, name, where) for item in values)
    return tuple(text for text in texts if text.strip())


def _response_field(raw: Mapping[str, Any], fields: Fields) -> str | None:
    return fields.response or _first(raw, _RESPONSES)


def _others(raw: Mapping[str, Any], *understood: str | None) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in understood}


def _first(raw: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in raw), None)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} should be text, got {type(value).__name__} {value!r:.80}")
    return value
