"""Whether an answer to a problem of mathematics is right: what counts as the answer, and what equals what."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

LONGEST = 2000
"""Characters of an answer that are looked at, from its end; a final answer is not longer."""
SECONDS = 5
"""Time that reading, and comparing, one expression may take; ordinary ones take a tenth of a second."""

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+(?:\.\d+)?)?%?")
_AFTER_MARK = re.compile(r"####[ \t]*([^\n]*)")
_FRACTION = re.compile(r"^([-+]?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_SIGNS = re.compile(r"\\(?:text|mbox|mathrm)\{[^{}]*\}|\^\{?\\circ\}?|\\[,;!% ]|\\\$|[$€£¥₹°{}]")
# A letter right behind a number is a variable (2x), and so may be a word that names a constant or function;
# words behind a space are a unit. Chinese, Japanese and Korean need no space.
_UNIT = re.compile(
    r"\s+(?!(?:pi|sqrt|sin|cos|tan|log|ln|exp|mod)\b)[^\W\d_]{2}[^\\]*|"
    r"\s*[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af][^\\]*"
)


def after_mark(text: str) -> str | None:
    """What follows `####` on its line, the way GSM8K closes an answer; None if there is none.

    Of several the first one that is a number counts (a model that goes on with another problem writes more
    of them, and in Markdown `####` begins a heading), else the first.
    """
    found = [line.strip() for line in _AFTER_MARK.findall(text) if line.strip()]
    return next((line for line in found if number(line) is not None), found[0] if found else None)


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
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return found[-1] if found else None


def number(text: str) -> Fraction | None:
    r"""The number that a text is: commas, currency, percent signs, units after it and fractions understood.

    `$1,234.50` is 1234.5, `3/4` and `\\frac{3}{4}` are 0.75, `20%` is 20, `18 dollars` is 18; None if it is
    no single number, such as `2x`, `12\\pi` or `3 or 4`.
    """
    if len(text) > LONGEST:
        return None
    plain = text.replace("\u2212", "-").strip().strip("*_`").strip()
    plain = _SIGNS.sub("", _FRACTION.sub(r"\1\2/\3", plain)).strip().rstrip(".,;:").strip()
    found = _NUMBER.match(plain)
    if not found:
        return None
    rest = plain[found.end() :]
    if re.search(r"\d", rest) or (rest and not _UNIT.fullmatch(rest)):
        return None
    over, _, under = found.group().rstrip("%").replace(",", "").replace(" ", "").partition("/")
    try:
        value = Fraction(Decimal(over)) / (Fraction(Decimal(under)) if under else 1)
    except (InvalidOperation, ZeroDivisionError):
        return None
    return value


def equal_numbers(answer: str | None, reference: str, tolerance: float) -> bool:
    """Whether both are numbers and no further apart than `tolerance`, of the reference where that is below 1
    (0.0001 is not 0.0000672)."""
    ours, theirs = number(answer or ""), number(reference)
    if ours is None or theirs is None:
        return False
    return abs(ours - theirs) <= Fraction(tolerance) * min(Fraction(1), abs(theirs))


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
        tolerance: see `equal_numbers`.
    """
    marked = after_mark(text)
    if marked is None or number(marked) is None:  # a heading, where the answer is in a box
        marked = boxed(text) or marked
    answer = marked if marked is not None else last_number(text)
    numeric = number(reference) is not None
    if marked is not None:
        right = equal_numbers(marked, reference, tolerance) or (
            not (numeric and number(marked) is not None) and equivalent(f"${marked}$", reference)
        )
        return Graded(answer, right, right)
    right = equal_numbers(answer, reference, tolerance) if numeric else equivalent(text, reference)
    return Graded(answer, False, right)
