"""Text in another language than wanted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stillhouse.config import ListOf
from stillhouse.errors import EnvironmentFault
from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class Language(Filter):
    """Drops responses that py3langid (97 languages) takes for another language; needs the extra `curate`.

    Only a clear verdict drops: the most likely language must be another one with at least `min_probability`
    probability, and short texts are not judged, because nobody can tell their language.

    Example: `{kind: language, allowed: [en, de]}`
    """

    kind: Literal["language"] = "language"
    allowed: ListOf[str] = Field(("en",), min_length=1)
    """Codes of ISO 639-1."""
    min_words: Annotated[int, Field(ge=1)] = 6
    """Texts of fewer words are kept unjudged (of fewer than three times as many letters, without spaces)."""
    min_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """The least probability of another language that drops a response."""

    @field_validator("allowed")
    @classmethod
    def _two_letters(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for code in value:
            if len(code) != 2 or not code.isalpha() or not code.islower():
                raise ValueError(f"{code!r} is no code of two letters, such as en")
        return value

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """By py3langid's verdict on the response."""
        identifier = _identifier()
        return [self._check(identifier, sample.text) for sample in samples]

    def _check(self, identifier: Any, text: str) -> Drop | None:
        if len(text.split()) < self.min_words and len(text) < 3 * self.min_words:
            return None
        code, probability = identifier.classify(text)
        if code in self.allowed or probability < self.min_probability:
            return None
        return Drop("wrong language", f"{code}, probability {probability:.2f}")


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise EnvironmentFault(
            "the filter language needs py3langid. Install it with: pip install 'stillhouse[curate]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
