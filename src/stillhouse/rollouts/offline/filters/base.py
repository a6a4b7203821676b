"""The interface of every filter."""

from __future__ import annotations

import functools
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, SerializeAsAny

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.requirements import MAIN, Requirements
from stillhouse.rollouts.offline.samples import Sample, SampleKey


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a response is dropped.

    Example: `Drop("repeats itself", "0.83 of its 4-grams")`
    """

    reason: str
    """The same words for the same fault, because reasons are counted."""
    detail: str = ""
    """What was found in this response."""
    filter: str = ""
    """The kind of the filter; `apply_filters` fills it in."""


@dataclass(frozen=True)
class FilterContext:
    """What filters may know beyond the responses that they judge."""

    held_out: Callable[[], Sequence[str]] = tuple
    """Prompts and references of every set that the run evaluates on."""
    partners: Mapping[SampleKey, Sample] = field(default_factory=dict)
    """The other response of each pair; empty without pairs."""


class Filter(StrictConfig):
    """One reason to drop a response.

    A filter sees all responses of one source together, in the order of the prompts, without those that
    earlier filters have dropped.
    """

    kind: str
    source: Literal["all", "teacher", "student"] = "all"
    """Which responses of a pair it applies to."""

    def requirements(self) -> Requirements:
        """What it needs beside the responses; nothing by default."""
        return Requirements()

    @abstractmethod
    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """For each sample why it is dropped, or None if it is kept."""


TEACHER_LOGPROB = replace(Requirements.of(MAIN, "distribution"), same_tokenizer=frozenset({MAIN}))
"""Of filters and scores that ask for the likelihood of a response under the teacher."""

REGISTRY: Registry[Filter] = Registry("filter", Filter)  # type: ignore[type-abstract]
FilterField = Annotated[SerializeAsAny[Filter], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a filter."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Letters of scripts without spaces between words."""


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    # Vowel signs and accents of their own are no \w; they belong to the letter before them.
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.category(chr(code))[0] == "M")
    unspaced = f"(?![{marks}])[{_UNSPACED}][{marks}]*"
    return (
        re.compile(f"{unspaced}|(?:(?![{_UNSPACED}])[\\w{marks}])+"),
        re.compile(f"{unspaced}|(?:(?![{_UNSPACED}])\\S)+"),
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    Where a script has no spaces between words (Chinese, Japanese, Thai, ...), each letter with its signs is
    one. Ways to write the same letters (full width, accents apart) make no difference.
    """
    return [
        word for word in _patterns()[0].findall(_plain(text).lower()) if word[0].isalnum() or word[0] == "_"
    ]


def pieces(text: str) -> list[str]:
    """What stands between spaces, punctuation and case included; letters where a script has no spaces."""
    return _patterns()[1].findall(_plain(text))


def _plain(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def grams(items: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All n-grams in order; none where there are fewer items than `size`."""
    return [tuple(items[start : start + size]) for start in range(len(items) - size + 1)]
