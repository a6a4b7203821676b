"""Programs: how one is found in a model's response, and how it is run against tests.

The rules are those of the public harnesses (stop words of Chen et al. 2021 and of bigcode's harness, marks of
Austin et al. 2021), and beyond them: what is around a right program does not make it wrong.
"""

from __future__ import annotations

import ast
import functools
import re
import textwrap

from stillhouse import console, sandbox
from stillhouse.errors import EnvironmentFault
from stillhouse.sandbox import ExecutionResult, Limits, ProgramTests, SandboxUnavailable

_FENCE = re.compile(r"^([ \t]*)```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_STOP = re.compile(r"^(?:class|def|#|if|print|assert|@|```|\[/?[A-Z]+\])", re.MULTILINE)
_MARGIN = re.compile(r"^(?=\S)", re.MULTILINE)
MAX_ENDS = 200
"""Places at which a text is tried as the end of its program."""


def require_sandbox() -> None:
    """Check that programs can be run on this machine, and say once what the kernel does not allow.

    Raises:
        EnvironmentFault: they cannot be confined, with what is missing.
    """
    try:
        sandbox.ensure_available()
    except SandboxUnavailable as error:
        raise EnvironmentFault(str(error)) from None
    _note_what_programs_see()


@functools.cache
def _note_what_programs_see() -> None:
    if not sandbox.hides_files():
        console.note(
            "sandbox: this kernel makes no namespaces for the user, so that programs can ask whether a file "
            "outside exists and how large it is; they can open none (docs/maths-and-code.md)"
        )


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
    """The fenced block that defines `name`, else the first Python block, else the first; None without one.

    Text that defines `name` before the first fence is a block, too: the prompt had opened it.
    """
    before = text.partition("```")[0]
    if name and defines(before, name) and before != text:
        return before
    blocks = [
        (language.lower(), re.sub(f"^{indent}", "", body, flags=re.MULTILINE) if indent else body)
        for indent, language, body in _FENCE.findall(text)
    ]
    if not blocks:
        return None
    python = [body for language, body in blocks if language in ("python", "python3", "py", "")]
    candidates = python or [body for _, body in blocks]
    return next((body for body in candidates if name and defines(body, name)), candidates[0])


def defines(text: str, name: str) -> bool:
    """Whether a line at the left margin begins the definition of a function or class."""
    return (
        re.search(rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b", text, re.MULTILINE) is not None
    )


def completed_prompt(prompt: str, completion: str) -> str:
    """A prompt that ends within a function, followed by its completion.

    The completion is cut where, at the left margin, something else begins, as by HumanEval's stop words.
    Empty lines and comments before the first line of code are kept.
    """
    stop = _STOP.search(completion, _first_code(completion) + 1)
    return prompt + (completion[: stop.start()] if stop else completion)


def humaneval_program(prompt: str, response: str, entry_point: str) -> str:
    """The program in a response to a HumanEval prompt.

    A response that begins with an indented line is the function's body, whatever follows it. Otherwise its
    fenced block counts, or all of it: a whole program (after the prompt's imports and helpers) where it
    defines the function, else the body.
    """
    block = None if _is_indented(response) else code_block(response, entry_point)
    code = response if block is None else block
    if defines(code, entry_point) and not _is_indented(code):
        program = f"{prompt_helpers(prompt, entry_point)}\n{code}"
    elif block is not None and not _is_indented(block):
        program = prompt + textwrap.indent(block, "    ")
    else:
        program = completed_prompt(prompt, code)
    return _without_prose(program)


def prompt_helpers(prompt: str, entry_point: str) -> str:
    """What a HumanEval prompt has before the function to complete: imports and helper functions.

    Empty for a prompt that is no program, but says in words what to write.
    """
    signature = re.search(rf"^(?:async[ \t]+)?def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    helpers = prompt[: signature.start()] if signature else prompt
    return helpers if _parsed(helpers) is not None else ""


def mbpp_program(response: str, name: str | None = None) -> str:
    """The program in a response: between MBPP's marks [BEGIN] and [DONE], in a fenced block, or all of it.

    Args:
        response: what the model wrote.
        name: the function that the tests call; the block that defines it is preferred.
    """
    response = response.split("[DONE]", 1)[0].split("[BEGIN]", 1)[-1]
    block = code_block(response, name)
    return _without_prose(response if block is None else block)


def top_level_names(source: str) -> tuple[str, ...]:
    """Functions and classes that a program defines at its top level; none if it is not valid Python."""
    tree = _parsed(source)
    body = [] if tree is None else tree.body
    return tuple(node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))


def _first_code(text: str) -> int:
    """Where the first line begins that is neither empty nor a comment at the margin; the end if none is."""
    position = 0
    for line in text.splitlines(keepends=True):
        if line.strip() and not line.startswith("#"):
            break
        position += len(line)
    return position


def _is_indented(text: str) -> bool:
    """Whether the first line of code is indented, and no fence."""
    rest = text[_first_code(text) :]
    return rest[:1] in (" ", "\t") and not rest.lstrip().startswith("```")


def _without_prose(program: str) -> str:
    """A valid program as it is; of another its longest beginning that is valid and ends with a definition.

    Text after a program is thus no syntax error. A program without such a beginning stays as it is.
    """
    if _parsed(program) is not None:
        return program
    ends = [match.start() for match in _MARGIN.finditer(program)][1:]
    for end in ends[-MAX_ENDS:][::-1]:
        tree = _parsed(program[:end])
        if tree is not None and tree.body and isinstance(tree.body[-1], ast.FunctionDef | ast.ClassDef):
            return program[:end]
    return program


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
