"""Grades mathematics: which part of a response is its final answer, and which answers are equal."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from stillhouse.errors import EnvironmentFault

MAX_CHARACTERS = 2000
"""Characters at the end of a response that are searched for an expression; a longer text is no number."""
TIMEOUT = 5
"""Seconds for parsing, and for comparing, one expression; ordinary ones take a tenth of a second."""

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+(?:\.\d+)?)?%?")
_AFTER_MARK = re.compile(r"####[ \t]*([^\n]*)")
_FRACTION = re.compile(r"^([-+]?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_MARKUP = re.compile(r"\\(?:text|mbox|mathrm)\{[^{}]*\}|\^\{?\\circ\}?|\\[,;!% ]|\\\$|[$€£¥₹°{}]")
# A letter directly after a number is a variable (2x), and so is the name of a constant or function; other
# words after a space are a unit. Chinese, Japanese and Korean units need no space.
_UNIT = re.compile(
    r"\s+(?!(?:pi|sqrt|sin|cos|tan|log|ln|exp|mod)\b)[^\W\d_]{2}[^\\]*|"
    r"\s*[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af][^\\]*"
)


def gsm8k_answer(text: str) -> str | None:
    """What follows `####` on its line, as GSM8K marks the final answer; None if there is none.

    Of several, the first that is a number (a model that continues with another problem writes more of them,
    and in Markdown `####` begins a heading), else the first.
    """
    candidates = [line.strip() for line in _AFTER_MARK.findall(text) if line.strip()]
    numbers = (line for line in candidates if parse_number(line) is not None)
    return next(numbers, candidates[0] if candidates else None)


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\\boxed{...}`, braces balanced; None if there is none."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number in a text, as written; None if there is none."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return found[-1] if found else None


def parse_number(text: str) -> Fraction | None:
    r"""The number that a text denotes; commas, currency, percent signs, units and fractions are understood.

    `$1,234.50` is 1234.5, `3/4` and `\\frac{3}{4}` are 0.75, `20%` is 20, `18 dollars` is 18; None for
    anything but a single number, such as `2x`, `12\\pi` or `3 or 4`.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    plain = text.replace("\u2212", "-").strip().strip("*_`").strip()
    plain = _MARKUP.sub("", _FRACTION.sub(r"\1\2/\3", plain)).strip().rstrip(".,;:").strip()
    match = _NUMBER.match(plain)
    if not match:
        return None
    rest = plain[match.end() :]
    if re.search(r"\d", rest) or (rest and not _UNIT.fullmatch(rest)):
        return None
    numerator, _, denominator = match.group().rstrip("%").replace(",", "").replace(" ", "").partition("/")
    try:
        return Fraction(Decimal(numerator)) / (Fraction(Decimal(denominator)) if denominator else 1)
    except (InvalidOperation, ZeroDivisionError):
        return None


def equal_numbers(answer: str | None, reference: str, tolerance: float) -> bool:
    """Whether both are numbers with |answer - reference| <= tolerance * min(1, |reference|).

    Relative below 1, so that 0.0001 does not equal 0.0000672.
    """
    given, expected = parse_number(answer or ""), parse_number(reference)
    if given is None or expected is None:
        return False
    return abs(given - expected) <= Fraction(tolerance) * min(Fraction(1), abs(expected))


def equal_expressions(answer: str, reference: str) -> bool:
    r"""Whether two expressions in LaTeX or plain notation are equivalent, by the library math-verify.

    Args:
        answer: a whole response, or an expression; a `\\boxed{...}` in it is preferred.
        reference: the correct expression.

    Raises:
        EnvironmentFault: math-verify is not installed.
    """
    try:
        import math_verify
    except ImportError as error:
        raise EnvironmentFault(
            "comparing expressions needs the package math-verify: pip install 'stillhouse[eval]'"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs everything that it cannot parse
    expected = math_verify.parse(f"${reference}$", parsing_timeout=TIMEOUT)
    given = math_verify.parse(answer[-MAX_CHARACTERS:], parsing_timeout=TIMEOUT)
    return bool(math_verify.verify(expected, given, timeout_seconds=TIMEOUT))


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether a response is correct. Example: `Grade("18", strict=True, flexible=True)`"""

    answer: str | None
    """The extracted final answer: after `####` or in the box, else the last number."""
    strict: bool
    """Correct, and marked as the final answer by `####` or a box."""
    flexible: bool
    """Correct, marked or not."""


def grade(response: str, reference: str, tolerance: float = 1e-3) -> Grade:
    """Compare the final answer of a response with the correct one.

    Numbers are compared within a tolerance, everything else as expressions.

    Args:
        response: what the model generated.
        reference: the correct final answer, a number or an expression in LaTeX.
        tolerance: see `equal_numbers`.
    """
    marked = gsm8k_answer(response)
    if marked is None or parse_number(marked) is None:  # a heading, while the answer is in a box
        marked = boxed_answer(response) or marked
    reference_is_number = parse_number(reference) is not None
    if marked is not None:
        correct = equal_numbers(marked, reference, tolerance) or (
            not (reference_is_number and parse_number(marked) is not None)
            and equal_expressions(f"${marked}$", reference)
        )
        return Grade(marked, correct, correct)
    answer = last_number(response)
    if reference_is_number:
        return Grade(answer, False, equal_numbers(answer, reference, tolerance))
    return Grade(answer, False, equal_expressions(response, reference))
