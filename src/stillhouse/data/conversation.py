"""What templates expect of the turns of a conversation: roles, tool calls, reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from stillhouse.data.rendering import inline_reasoning
from stillhouse.data.rows import Message, Row

SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "function", "ipython")


def weight_of(turn: Message) -> bool:
    """Whether a turn of the assistant is to be trained on: OpenAI's `weight`, 1 where it has none."""
    return bool(turn.get("weight", 1))


def with_system_merged(turns: Sequence[Message]) -> list[Message]:
    """The conversation with each system turn put before the user's turn that follows it."""
    merged: list[Message] = []
    waiting: list[str] = []
    for turn in turns:
        if turn["role"] in SYSTEM_ROLES:
            waiting.append(turn["content"])
        elif waiting and turn["role"] == "user":
            merged.append({**turn, "content": "\n\n".join([*waiting, turn["content"]])})
            waiting = []
        else:
            merged.append(turn)
    return [*merged, *({"role": "user", "content": text} for text in waiting)]


def with_equal_merged(turns: Sequence[Message]) -> list[Message]:
    """The conversation with neighbouring turns of the same person as one; results of tools stay apart."""
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1] if merged else None
        plain = turn["role"] not in TOOL_ROLES and not turn.get("tool_calls")
        if plain and last is not None and last["role"] == turn["role"] and not last.get("tool_calls"):
            merged[-1] = {**last, "content": f"{last['content']}\n\n{turn['content']}"}
        else:
            merged.append(turn)
    return merged


def reasoning_of(turn: Message) -> tuple[str, str]:
    """The reasoning of a turn, from its field or inline, and its answer."""
    content = turn.get("content") or ""
    if turn.get("reasoning_content"):
        return turn["reasoning_content"], content
    inline = inline_reasoning(content)
    return ("", content) if inline is None else (inline.text, inline.rest)


def with_reasoning(turn: Message, how: Literal["inline", "drop"]) -> Message:
    """A turn of the assistant with its reasoning inside of `<think>` at the start of its text, or without."""
    reasoning, answer = reasoning_of(turn)
    if not reasoning:
        return turn
    content = f"{inlined(reasoning)}{answer.lstrip()}" if how == "inline" else answer.lstrip()
    return {**{name: turn[name] for name in turn if name != "reasoning_content"}, "content": content}


def without_chain(row: Row) -> Row | None:
    """The row with the answer alone as its response; None if the response is not one turn with reasoning
    before its answer."""
    if row.response is None or len(row.completion) > 1:
        return None
    turn = row.completion[0] if row.completion else {"role": "assistant", "content": row.response}
    reasoning, answer = reasoning_of(turn)
    if not reasoning.strip() or not answer.strip() or turn.get("tool_calls"):
        return None
    return replace(row, response=answer.strip(), completion=())


def inlined(reasoning: str, opening: str = "<think>", closing: str = "</think>") -> str:
    """Reasoning as most models write it before an answer."""
    stripped = reasoning.strip("\n")
    return f"{opening}\n{stripped}\n{closing}\n\n"


def parsed_arguments(turn: Message) -> Message:
    """A turn with the arguments of its calls as mappings, as most templates take them."""
    return _with_arguments(turn, _parsed)


def written_arguments(turn: Message) -> Message:
    """A turn with the arguments of its calls as JSON text, as OpenAI's format has them."""
    return _with_arguments(
        turn, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or of a call: under `function`, or the mapping itself."""
    inner = call.get("function")
    return inner if isinstance(inner, Mapping) else call


def shows_python(text: str, calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a template wrote the arguments of a call as Python writes a mapping, which is no JSON."""
    for call in calls:
        arguments = _parsed(function_of(call).get("arguments"))
        if isinstance(arguments, Mapping) and arguments:
            written = {json.dumps(arguments, ensure_ascii=ascii) for ascii in (True, False)}
            if str(arguments) not in written and str(arguments) in text:
                return True
    return False


def _with_arguments(turn: Message, change: Callable[[Any], Any]) -> Message:
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = function_of(call)
        changed = {**function, "arguments": change(function.get("arguments", {}))}
        calls.append({**call, "function": changed} if function is not call else changed)
    return {**turn, "tool_calls": calls}


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except json.JSONDecodeError:
        return arguments
