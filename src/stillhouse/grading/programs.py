"""Python programs in a model's text."""

from __future__ import annotations

import ast
import re

_FENCE = re.compile(r"```[ \t]*([A-Za-z0-9_+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_END = re.compile(r"^(?:class |def |#|if |print\(|assert |@|```|\[/?[A-Z]+\])", re.MULTILINE)


def fenced(text: str, name: str | None = None) -> str | None:
    """The fenced block that defines `name`, else the first Python block, else the first; None without one."""
    blocks = [(language.lower(), body) for language, body in _FENCE.findall(text)]
    if not blocks:
        return None
    python = [body for language, body in blocks if language in ("python", "python3", "py", "")]
    candidates = python or [body for _, body in blocks]
    defining = [body for body in candidates if name and re.search(rf"^(?:def|class) {name}\b", body, re.M)]
    return (defining or candidates)[0]


def continued(prompt: str, text: str) -> str:
    """A prompt that ends within a function, and the text that goes on with it.

    The text counts up to the next line that begins something else at the left margin, as HumanEval's own
    stop words do.
    """
    found = _END.search(text)
    return prompt + (text[: found.start()] if found else text)


def program(prompt: str, text: str, entry_point: str) -> str:
    """The program that an answer to a HumanEval prompt stands for.

    A fenced block, or a text that defines the function itself, counts as the whole program (after the
    prompt's imports and helpers); anything else as the function's body.
    """
    block = fenced(text, entry_point)
    whole = text if block is None else block
    if re.search(rf"^def {re.escape(entry_point)}\b", whole, re.M):
        return f"{_without(prompt, entry_point)}\n{whole}"
    return continued(prompt, whole)


def marked(text: str) -> str:
    """The program in a text: between [BEGIN] and [DONE] (as MBPP's authors mark it), in a fence, or all."""
    text = text.split("[DONE]", 1)[0].split("[BEGIN]", 1)[-1]
    block = fenced(text)
    return text if block is None else block


def definitions(source: str) -> tuple[str, ...]:
    """Names that a program defines at its top level; none if it is no Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return ()
    return tuple(node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))


def _without(prompt: str, entry_point: str) -> str:
    """The prompt up to the function that is asked for."""
    found = re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.M)
    return prompt[: found.start()] if found else prompt
