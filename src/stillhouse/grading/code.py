"""Programs: how one is extracted from a model's response, and how it is run against tests."""

from __future__ import annotations

import ast
import re

from stillhouse import sandbox
from stillhouse.errors import EnvironmentFault
from stillhouse.sandbox import ExecutionResult, Limits, ProgramTests, SandboxUnavailable

_FENCE = re.compile(r"```[ \t]*([A-Za-z0-9_+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_STOP = re.compile(r"^(?:class |def |#|if |print\(|assert |@|```|\[/?[A-Z]+\])", re.MULTILINE)


def require_sandbox() -> None:
    """Check that programs can be run on this machine.

    Raises:
        EnvironmentFault: they cannot be confined, with what is missing.
    """
    try:
        sandbox.ensure_available()
    except SandboxUnavailable as error:
        raise EnvironmentFault(str(error)) from None


def run_program(program: str, tests: ProgramTests, limits: Limits | None = None) -> ExecutionResult:
    """Run tests against a program in the sandbox.

    Raises:
        EnvironmentFault: programs cannot be confined on this machine.
    """
    try:
        return sandbox.check_program(program, tests, limits)
    except SandboxUnavailable as error:
        raise EnvironmentFault(str(error)) from None


def code_block(text: str, name: str | None = None) -> str | None:
    """The fenced block that defines `name`, else the first Python block, else the first; None without one."""
    blocks = [(language.lower(), body) for language, body in _FENCE.findall(text)]
    if not blocks:
        return None
    python = [body for language, body in blocks if language in ("python", "python3", "py", "")]
    candidates = python or [body for _, body in blocks]
    defining = [body for body in candidates if name and re.search(rf"^(?:def|class) {name}\b", body, re.M)]
    return (defining or candidates)[0]


def completed_prompt(prompt: str, completion: str) -> str:
    """A prompt that ends within a function, followed by its completion.

    The completion is cut at the first line that starts something else at the left margin, as HumanEval's stop
    words do.
    """
    stop = _STOP.search(completion)
    return prompt + (completion[: stop.start()] if stop else completion)


def humaneval_program(prompt: str, response: str, entry_point: str) -> str:
    """The program in a response to a HumanEval prompt.

    A fenced block, or a response that defines the function itself, is a whole program (it follows the
    prompt's imports and helpers); anything else is the function's body.
    """
    block = code_block(response, entry_point)
    code = response if block is None else block
    definition = re.compile(rf"^def {re.escape(entry_point)}\b", re.M)
    if not definition.search(code):
        return completed_prompt(prompt, code)
    signature = definition.search(prompt)
    preamble = prompt[: signature.start()] if signature else prompt
    return f"{preamble}\n{code}"


def mbpp_program(response: str) -> str:
    """The program in a response: between MBPP's marks [BEGIN] and [DONE], in a fenced block, or all of it."""
    response = response.split("[DONE]", 1)[0].split("[BEGIN]", 1)[-1]
    block = code_block(response)
    return response if block is None else block


def top_level_names(source: str) -> tuple[str, ...]:
    """Functions and classes that a program defines at its top level; none if it is not valid Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return ()
    return tuple(node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
