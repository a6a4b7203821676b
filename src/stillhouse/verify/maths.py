"""Whether an answer to a problem of mathematics is right: what counts as the answer, and what equals what."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

LONGEST = 2000
"""Characters of an answer that are looked at, from its end; a final answer is not longer."""
SECONDS = 2
"""Time that reading, and comparing, one expression may take."""

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?%?")
_AFTER_MARK = re.compile(r"####[ \t]*([^\n]*)")


def after_mark(text: str) -> str | None:
    """What follows the first `####` on its line, the way GSM8K closes an answer; None if there is none."""
    found = _AFTER_MARK.search(text)
    return found[1].strip() if found and found[1].strip() else None


def boxed(text: str) -> str | None:
    r"""The content of the last `\\boxed{...}`, braces balanced; None if there is none."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number in a text, as it is written; None if there is none."""
    found = [match.group() for match in _NUMBER.finditer(text) if any(c.isdigit() for c in match.group())]
    return found[-1] if found else None


def number(text: str) -> Fraction | None:
    r"""The number that a text is: commas, currency, percent signs, units after it and fractions understood.

    `$1,234.50` is 1234.5, `3/4` and `\\frac{3}{4}` are 0.75, `20%` is 20; None if it is no single number.
    """
    fractions = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
    plain = re.sub(r"\\(?:text|mathrm)\{[^}]*\}|\\[,;!% ]|\\\$|[$€£{}]", "", fractions.strip())
    plain = plain.strip().rstrip(".").strip()
    found = _NUMBER.match(plain)
    if not found or not found.group() or not any(c.isdigit() for c in found.group()):
        return None
    if re.search(r"\d", plain[found.end() :]):
        return None  # more than one number, such as "3 or 4"
    over, _, under = found.group().rstrip("%").replace(",", "").replace(" ", "").partition("/")
    try:
        value = Fraction(Decimal(over)) / (Fraction(Decimal(under)) if under else 1)
    except (InvalidOperation, ZeroDivisionError):
        return None
    return value


def equal_numbers(answer: str | None, reference: str, tolerance: float) -> bool:
    """Whether both are numbers and no further apart than `tolerance`."""
    ours, theirs = number(answer or ""), number(reference)
    return ours is not None and theirs is not None and abs(ours - theirs) <= Fraction(tolerance)


def equivalent(answer: str, reference: str) -> bool:
    r"""Whether two expressions in LaTeX or plain notation are the same, by the library math-verify.

    Args:
        answer: a model's whole text, or an expression; a `\\boxed{...}` in it is preferred.
        reference: the expression that is right.

    Raises:
        EnvironmentFault: math-verify is not installed.
    """
    try:
        import math_verify
    except ImportError as error:
        from stillhouse.errors import EnvironmentFault

        raise EnvironmentFault(
            "comparing expressions needs the package math-verify: pip install 'stillhouse[eval]'"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs the whole of what it cannot read
    truth = math_verify.parse(f"${reference}$", parsing_timeout=SECONDS)
    said = math_verify.parse(answer[-LONGEST:], parsing_timeout=SECONDS)
    return bool(math_verify.verify(truth, said, timeout_seconds=SECONDS))


@dataclass(frozen=True, slots=True)
class Graded:
    """Whether an answer is right. Example: `Graded("18", strict=True, flexible=True)`"""

    answer: str | None
    """What was taken as the final answer: after `####` or in the box, else the last number."""
    strict: bool
    """Right, and given in one of the two ways that a final answer is marked."""
    flexible: bool
    """Right, marked or not."""


def grade(text: str, reference: str, tolerance: float = 1e-3) -> Graded:
    """Compare the final answer of a text with the right one.

    Numbers are compared with a tolerance, everything else as expressions.

    Args:
        text: what the model wrote.
        reference: the right final answer, a number or an expression in LaTeX.
        tolerance: how far apart two numbers may be and still count as equal.
    """
    marked = after_mark(text) or boxed(text)
    answer = marked if marked is not None else last_number(text)
    numeric = number(reference) is not None
    if marked is not None:
        right = equal_numbers(marked, reference, tolerance) or (
            not (numeric and number(marked) is not None) and equivalent(f"${marked}$", reference)
        )
        return Graded(answer, right, right)
    right = equal_numbers(answer, reference, tolerance) if numeric else equivalent(text, reference)
    return Graded(answer, False, right)
