"""Grades mathematics: which part of a response is its final answer, and which answers are equal."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from stillhouse.grading.expressions import MAX_CHARACTERS, equal_expressions

TOLERANCE = 5e-7
"""Numbers that are equal when rounded to six decimals are equal, as for math-verify."""

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+(?:\.\d+)?)?%?")
_SPACED = re.compile(r"^[-+]?\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)")
_MIXED = re.compile(r"^([-+]?)(\d+)\s+(\d+)\s*/\s*(\d+)$")
_PERCENT = re.compile(r"%[\s}$*.]*$")
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\s*\b({'|'.join(_SCALES)})\b", re.IGNORECASE)
_SCALE_IN_MARKUP = re.compile(rf"\\(?:text|mbox|mathrm)\{{({_SCALE.pattern}[^{{}}]*)\}}", re.IGNORECASE)
_AFTER_MARK = re.compile(r"####[ \t]*([^\n]*)")
_FRACTION = re.compile(r"^([-+]?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_MARKUP = re.compile(r"\\(?:text|mbox|mathrm)\{[^{}]*\}|\^\{?\\circ\}?|\\[,;!% ]|\\\$|[$€£¥₹°{}]")
# A letter directly after a number is a variable (2x), and so is the name of a constant or function; other
# words after a space are a unit. Chinese, Japanese and Korean units need no space.
_UNIT = re.compile(
    r"\s+(?!(?:pi|sqrt|sin|cos|tan|log|ln|exp|mod|\w+(?:redths?|sandths?|enths?))\b)[^\W\d_]{2}[^\\]*|"
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

    `$1,234.50` is 1234.5, `3/4` and `\\frac{3}{4}` are 0.75, `1 1/2` is 1.5, `20%` is 20, `18 dollars` is 18,
    `2 thousand` is 2000; None for anything but a single number, such as `2x`, `12\\pi` or `3 or 4`.
    """
    found = _number_and_unit(text)
    return None if found is None else found[0]


def _number_and_unit(text: str) -> tuple[Fraction, str] | None:
    """The number, and the words that follow it."""
    if len(text) > MAX_CHARACTERS:
        return None
    plain = text.replace("\u2212", "-").strip().strip("*_`").strip()
    plain = _SCALE_IN_MARKUP.sub(r" \1", _FRACTION.sub(r"\1\2/\3", plain))
    plain = _MARKUP.sub("", plain).strip().rstrip(".,;:").strip()
    plain = _SPACED.sub(lambda match: re.sub(r"\s", "", match[0]), plain)
    mixed = _MIXED.match(plain)
    if mixed:
        sign, whole, numerator, denominator = mixed.groups()
        value = _fraction(f"{int(whole) * int(denominator) + int(numerator)}/{denominator}")
        return None if value is None else (-value if sign == "-" else value, "")
    match = _NUMBER.match(plain)
    if not match:
        return None
    value, rest = _fraction(match.group()), plain[match.end() :]
    while value is not None and (scale := _SCALE.match(rest)):
        value, rest = value * _SCALES[scale[1].lower()], rest[scale.end() :]
    if value is None or re.search(r"\d", rest) or (rest and not _UNIT.fullmatch(rest)):
        return None
    return value, rest


def _fraction(text: str) -> Fraction | None:
    numerator, _, denominator = text.rstrip("%").replace(",", "").replace(" ", "").partition("/")
    try:
        return Fraction(Decimal(numerator)) / (Fraction(Decimal(denominator)) if denominator else 1)
    except (InvalidOperation, ZeroDivisionError):
        return None


def equal_numbers(answer: str | None, reference: str, tolerance: float = TOLERANCE) -> bool:
    """Whether both are numbers, and no further apart than the tolerance.

    |answer - reference| <= min(tolerance, max(tolerance, 0.001) |reference|): relative for small references,
    so that 0.0001 does not equal 0.0000672. Where one of the two has a percent sign, it may also mean
    hundredths: 20% is 20 and 0.2.
    """
    answer = answer or ""
    given, expected = parse_number(answer), parse_number(reference)
    if given is None or expected is None:
        return False
    pairs = [(given, expected)]
    if _PERCENT.search(answer) and not _PERCENT.search(reference):
        pairs.append((given / 100, expected))
    elif _PERCENT.search(reference) and not _PERCENT.search(answer):
        pairs.append((given, expected / 100))
    bound = Fraction(str(tolerance))
    return any(abs(a - b) <= min(bound, max(bound, Fraction(1, 1000)) * abs(b)) for a, b in pairs)


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether a response is correct. Example: `Grade("18", strict=True, flexible=True)`"""

    answer: str | None
    """The extracted final answer: after `####` or in the box, else the last number."""
    strict: bool
    """Correct, and marked as the final answer by `####` or a box."""
    flexible: bool
    """Correct, marked or not."""


def final_answer(text: str) -> str | None:
    """What a response marks as its final answer, by `####` or a box; None if it marks none.

    A number alone after `####`, else the last box (`#### 3 Steps` is a heading in Markdown), else whatever
    stands after `####`.
    """
    lines = (line.strip() for line in _AFTER_MARK.findall(text))
    alone = (line for line in lines if (found := _number_and_unit(line)) is not None and not found[1])
    return next(alone, None) or boxed_answer(text) or gsm8k_answer(text)


def grade(response: str, reference: str, tolerance: float = TOLERANCE) -> Grade:
    """Compare the final answer of a response with the correct one; any thread may.

    Numbers are compared within a tolerance, everything else as expressions.

    Args:
        response: what the model generated.
        reference: the correct final answer, a number or an expression in LaTeX.
        tolerance: see `equal_numbers`.
    """
    marked = final_answer(response)
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
