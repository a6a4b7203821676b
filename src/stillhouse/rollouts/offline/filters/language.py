"""Text in an unwanted language."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stillhouse.config import ListOf
from stillhouse.errors import EnvironmentFault
from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class Language(Filter):
    """Drops responses in an unwanted language, detected by py3langid (97 languages); needs the extra
    `curate`.

    Only a confident detection drops: another language must have a probability of at least `min_probability`,
    and short texts are kept, because their language cannot be told.

    Example: `{kind: language, allowed: [en, de]}`
    """

    kind: Literal["language"] = "language"
    allowed: ListOf[str] = Field(("en",), min_length=1)
    """ISO 639-1 codes of the wanted languages."""
    min_words: Annotated[int, Field(ge=1)] = 6
    """Shorter texts are kept (in scripts without spaces, those of fewer than three times as many letters)."""
    min_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """The probability of another language from which a response is dropped."""

    @field_validator("allowed")
    @classmethod
    def _two_letters(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for code in value:
            if len(code) != 2 or not code.isalpha() or not code.islower():
                raise ValueError(f"{code!r} is no code of two letters, such as en")
        return value

    def check(self, sample: Sample, context: FilterContext) -> Drop | None:
        """Detects the language.

        Raises:
            EnvironmentFault: py3langid is not installed.
        """
        text, identifier = sample.text, _identifier()
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
