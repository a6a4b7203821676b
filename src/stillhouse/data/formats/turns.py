"""Readers of conversations: lists of turns in the keys of OpenAI's format or ShareGPT's, tools, history."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stillhouse.config import nearest
from stillhouse.core.images import IMAGE
from stillhouse.data.formats.images import IMAGE_PARTS, image_of_part, read_turn_images
from stillhouse.data.formats.values import as_list, is_blank, parsed_text, read_string, shortened, wrong_type
from stillhouse.data.rows import Message
from stillhouse.errors import RowError

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bard", "bing", "chatbot"),
    "tool": ("tool", "observation", "function_response", "tool_response", "function", "ipython"),
    "call": ("function_call", "tool_call"),
}
"""What the speakers are called in files. A turn of a "call" is the assistant's, and its text is the call."""

_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_KEYS = ("weight", "train", "loss")
_UNREADABLE_KEYS = ("audio", "videos", "video", "tools", "functions", "documents")
_TEXT_PARTS = {"text", "input_text", "output_text"}
_REASONING_PARTS = {"thinking", "reasoning"}


def holds_turns(value: Any) -> bool:
    """Whether a value is a list of turns (or a text that may be one), so that a format should read it."""
    if isinstance(value, str):
        return value.lstrip().startswith("[")
    return isinstance(as_list(value), list)


def is_turn(value: Any) -> bool:
    """Whether a value is one turn."""
    return isinstance(value, Mapping) and any(key in value for key in _ROLE_KEYS)


def read_messages(value: Any, name: str, location: str) -> tuple[Message, ...]:
    """The turns of a conversation.

    Raises:
        RowError: it is no list of turns; the turn is named, counted from 1.
    """
    turns = as_list(value)
    if not isinstance(turns, list):
        raise wrong_type(value, name, location, "a list of turns, each {role, content} or {from, value}")
    return tuple(
        _read_turn(turn, f"turn {number} of {name!r}", location) for number, turn in enumerate(turns, start=1)
    )


def _read_turn(turn: Any, where: str, location: str) -> Message:
    if not isinstance(turn, Mapping) or not any(isinstance(turn.get(key), str) for key in _ROLE_KEYS):
        raise RowError(
            location,
            f"{where} should be an object with role and content (or from and value), got {shortened(turn)}",
            "turn without a role",
        )
    called = next(turn[key] for key in _ROLE_KEYS if isinstance(turn.get(key), str))
    role = _ROLE_OF.get(called.strip().lower())
    if role is None:
        raise RowError(
            location,
            f"{where} has the role {called!r}{nearest(called.lower(), list(_ROLE_OF))}; "
            f"understood are {', '.join(_ROLE_OF)}",
            "unknown role",
        )
    _refuse_unreadable(turn, where, location)
    key = next((key for key in _CONTENT_KEYS if turn.get(key) is not None), "content")
    images: list[Any] = []
    content, thought = _read_content(turn.get(key), role, f"{key} of {where}", location, images)
    if content is None and not is_blank(turn.get("refusal")):
        content = read_string(turn["refusal"], f"refusal of {where}", location)
    calls = _read_calls(turn, where, location)
    if role == "call":
        calls, content = _calls_of_text(content, where, location), None
    if content is None and role == "user" and is_blank(turn.get("images")):
        raise RowError(location, f"{key} of {where} is null, and should be text", "null where text should be")
    text, beside = read_turn_images(turn, content or "", location)
    message: Message = {"role": "assistant" if role == "call" else role, "content": text}
    if images or beside:
        message["images"] = [*beside, *images]
    reasoning = next((turn[key] for key in _REASONING_KEYS if not is_blank(turn.get(key))), thought)
    if not is_blank(reasoning):
        message["reasoning_content"] = read_string(reasoning, f"reasoning of {where}", location)
    if calls:
        message["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if not is_blank(turn.get(key)):
            message[key] = read_string(turn[key], f"{key} of {where}", location)
    if message["role"] == "assistant" and not _is_trained(turn, where, location):
        message["weight"] = 0
    return message


def _refuse_unreadable(turn: Mapping[str, Any], where: str, location: str) -> None:
    found = next((key for key in _UNREADABLE_KEYS if not is_blank(turn.get(key))), None)
    if found is not None:
        hint = "; tools belong to the row: {tools: [...]}" if found in ("tools", "functions") else ""
        raise RowError(
            location, f"{where} has {found}, and text and images are read{hint}", "content that is not text"
        )


def _read_content(
    value: Any, role: str, name: str, location: str, images: list[Any]
) -> tuple[str | None, str | None]:
    """The text of a turn, and reasoning that is among its parts; both None where there is nothing.

    What its image parts hold is added to `images`.
    """
    if value is None:
        return None, None
    if role == "tool" and (isinstance(value, Mapping) or (isinstance(value, list) and not _are_parts(value))):
        return json.dumps(value, ensure_ascii=False), None
    if not isinstance(value, list):
        return read_string(value, name, location), None
    texts: dict[bool, list[str]] = {False: [], True: []}
    for number, part in enumerate(value, start=1):
        where = f"part {number} of {name}"
        if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
            images.append(image_of_part(part, where, location))
            texts[False].append(IMAGE)
            continue
        is_reasoning, text = _read_part(part, where, location)
        texts[is_reasoning].append(text)
    joined = "\n".join(texts[False])
    if images:  # lines between texts only
        joined = joined.replace(f"\n{IMAGE}", IMAGE).replace(f"{IMAGE}\n", IMAGE)
    return joined, "\n".join(texts[True]) or None


def _are_parts(value: Sequence[Any]) -> bool:
    return all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in value)


def _read_part(part: Any, name: str, location: str) -> tuple[bool, str]:
    """Whether a part of a content is reasoning, and its text."""
    if isinstance(part, str):
        return False, part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS:
        return False, read_string(part.get("text"), name, location)
    if kind in _REASONING_PARTS:
        text = next((part[key] for key in ("thinking", "reasoning", "text") if part.get(key)), "")
        return True, read_string(text, name, location)
    if kind == "refusal":
        return False, read_string(part.get("refusal"), name, location)
    raise RowError(
        location,
        f"{name} is {kind or shortened(part)!s}, and text and images are read",
        "content that is not text",
    )


def _is_trained(turn: Mapping[str, Any], where: str, location: str) -> bool:
    for key in _WEIGHT_KEYS:
        weight = turn.get(key)
        if weight is None:
            continue
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise RowError(
                location, f"{key} of {where} should be 0 or 1, got {shortened(weight)}", "weight not 0 or 1"
            )
        return bool(weight)
    return True


def _read_calls(turn: Mapping[str, Any], where: str, location: str) -> list[dict[str, Any]]:
    """`tool_calls`, or the older `function_call`, with arguments as objects."""
    if not is_blank(turn.get("tool_calls")):
        calls = parsed_text(turn["tool_calls"])
        if not isinstance(calls, list):
            raise wrong_type(calls, f"tool_calls of {where}", location, "a list of calls")
        return [_read_call(call, f"a tool call of {where}", location) for call in calls]
    if not is_blank(turn.get("function_call")):
        return [_read_call(parsed_text(turn["function_call"]), f"function_call of {where}", location)]
    return []


def _read_call(call: Any, name: str, location: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(
            location, f"{name} should be {{name, arguments}}, got {shortened(call)}", "broken tool call"
        )
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RowError(
                location,
                f"the arguments of {name} ({function['name']}) are not JSON ({error})",
                "broken tool call",
            ) from error
    read = {"name": function["name"], "arguments": {} if is_blank(arguments) else arguments}
    number = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**number, "type": "function", "function": read}


def _calls_of_text(text: str | None, where: str, location: str) -> list[dict[str, Any]]:
    found = parsed_text(text)
    if not isinstance(found, dict | list):
        raise RowError(
            location,
            f"{where} should be a call as JSON, {{name, arguments}}, got {shortened(text)}",
            "broken tool call",
        )
    calls = found if isinstance(found, list) else [found]
    return [_read_call(call, f"the call in {where}", location) for call in calls]


def read_tools(value: Any, name: str, location: str) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row, each as `{type: function, function: {name, ...}}`.

    Raises:
        RowError: it is no list of tools.
    """
    tools = parsed_text(value)
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list):
        raise wrong_type(value, name, location, "a list of tools, or that as JSON text")
    return tuple(_read_tool(parsed_text(tool), name, location) for tool in tools)


def _read_tool(tool: Any, name: str, location: str) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        if isinstance(tool.get("function"), Mapping) and tool["function"].get("name"):
            return {"type": "function", **tool}
        if isinstance(tool.get("name"), str):
            function = {key: value for key, value in tool.items() if key != "type"}
            return {"type": "function", "function": function}
    raise RowError(
        location,
        f"a tool in {name!r} should be an object with a name, or with a function that has one; "
        f"got {shortened(tool)}",
        "broken tool",
    )


def read_history(value: Any, name: str, location: str) -> tuple[Message, ...]:
    """Earlier turns: a list of `[question, answer]`, or a list of turns.

    Raises:
        RowError: it is neither.
    """
    history = as_list(value)
    if not isinstance(history, list):
        raise wrong_type(value, name, location, "a list of [question, answer]")
    if history and all(map(is_turn, history)):
        return read_messages(history, name, location)
    return tuple(_history_turns(history, name, location))


def _history_turns(history: Sequence[Any], name: str, location: str) -> Iterator[Message]:
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(
                location,
                f"item {number} of {name!r} should be [question, answer], got {shortened(pair)}",
                "broken history",
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield {"role": role, "content": read_string(text, f"{name}, item {number}", location)}
