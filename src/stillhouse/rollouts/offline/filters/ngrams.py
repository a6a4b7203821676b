"""Words and n-grams of texts in any script, for filters that compare texts."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Letters of scripts without spaces between words."""


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    In scripts without spaces between words (Chinese, Japanese, Thai, ...) each letter with its marks is a
    word. The text is normalised first (NFKC), so full-width letters and separate accents make no difference.
    """
    return [
        word
        for word in _patterns()[0].findall(_normalised(text).lower())
        if word[0].isalnum() or word[0] == "_"
    ]


def raw_words(text: str) -> list[str]:
    """What stands between spaces, with case and punctuation; single letters in scripts without spaces."""
    return _patterns()[1].findall(_normalised(text))


def ngrams(items: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All n-grams in order; none if there are fewer items than `size`."""
    return [tuple(items[start : start + size]) for start in range(len(items) - size + 1)]


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The patterns of `words` and of `raw_words`."""
    # \w does not match combining vowel signs and accents; they belong to the letter before them.
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.category(chr(code))[0] == "M")
    unspaced = f"(?![{marks}])[{_UNSPACED}][{marks}]*"
    return (
        re.compile(f"{unspaced}|(?:(?![{_UNSPACED}])[\\w{marks}])+"),
        re.compile(f"{unspaced}|(?:(?![{_UNSPACED}])\\S)+"),
    )


def _normalised(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFKC", text)
