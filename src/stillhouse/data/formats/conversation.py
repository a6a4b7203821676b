"""From turns to a row: what is the prompt, what the completion, and what the system message goes before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.core.types import turn_text
from stillhouse.data.rows import Message, Row
from stillhouse.errors import RowError


@dataclass(frozen=True, slots=True)
class Answers:
    """The response of a row: either texts, of which the first is the response, or turns.

    Example: `Answers(texts=("Fig", "Pear"))`
    """

    texts: tuple[str, ...] = ()
    turns: tuple[Message, ...] = ()
    fields: tuple[str, ...] = ()
    """The names of the fields that they were read from."""

    def of(self) -> dict[str, Any]:
        """As the fields `response`, `completion` and `references` of a row."""
        if not self.turns:
            return {"response": self.texts[0] if self.texts else None, "references": self.texts}
        last = self.turns[-1]
        plain = len(self.turns) == 1 and last.keys() <= {"role", "content"}
        if plain and not last["content"].strip():
            return {}
        text = turn_text(last)
        return {
            "response": last["content"],
            "completion": () if plain else self.turns,
            "references": (text,) if text.strip() else (),
        }


def split_conversation(turns: Sequence[Message]) -> tuple[tuple[Message, ...], Answers]:
    """The turns before the response, and the response: a last turn of the assistant."""
    if turns and turns[-1]["role"] == "assistant":
        return tuple(turns[:-1]), Answers(turns=(turns[-1],))
    return tuple(turns), Answers()


def up_to_last_answer(row: Row) -> Row:
    """The row without the turns that follow its last answer, which becomes the response; the row itself if it
    has a response, or no answer behind a prompt."""
    answers = [at for at, turn in enumerate(row.messages) if at and turn["role"] == "assistant"]
    if row.has_response or not answers:
        return row
    turns, answer = split_conversation(row.messages[: answers[-1] + 1])
    return replace(row, messages=turns, **answer.of())


def check_completion(turns: Sequence[Message], name: str, location: str) -> None:
    """Refuse a completion of several turns that does not end with the assistant."""
    if not turns or turns[-1]["role"] != "assistant":
        found = turns[-1]["role"] if turns else "nothing"
        raise RowError(
            location,
            f"field {name!r} should end with a turn of the assistant, and ends with {found}",
            "completion that is not the assistant's",
        )


def with_system(turns: Sequence[Message], system: str, name: str, location: str) -> tuple[Message, ...]:
    """The turns after a system message from a field of the row.

    Raises:
        RowError: the turns begin with another one.
    """
    if not turns or turns[0]["role"] != "system":
        return ({"role": "system", "content": system}, *turns)
    if turns[0]["content"].strip() == system.strip():
        return tuple(turns)
    raise RowError(
        location,
        f"has a system message in field {name!r} and another one in the conversation; "
        f"leave one out, or set data.ignore: [{name}]",
        "two system messages",
    )


def conversation_row(
    location: str,
    context: Sequence[Message],
    answers: Answers,
    tools: tuple[Mapping[str, Any], ...],
    extra: Mapping[str, Any],
) -> Row:
    """A row of turns.

    Raises:
        RowError: there is no turn before the response.
    """
    if not context:
        raise RowError(location, "the conversation has no turn before the response", "no prompt")
    return Row(location, messages=tuple(context), tools=tools, extra=extra, **answers.of())
