"""Answers that can be checked, and are wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from stillhouse.config import nearest
from stillhouse.curate.filters.base import REGISTRY, Around, Drop, Filter
from stillhouse.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stillhouse.curate.samples import Sample

Verify = Callable[[Mapping[str, Any], str], bool]
"""(facts of the question, response) -> whether the response answers it rightly.

The facts are the row's own fields, and "references": its reference responses.
"""

VERIFIERS: dict[str, Verify] = {}
"""Who can check answers, by name."""


@REGISTRY.register
class Verified(Filter):
    """Drops responses whose answer is wrong: a number or formula for maths, failing tests for code.

    Example: `{kind: verified, by: maths}`
    """

    kind: Literal["verified"] = "verified"
    by: str = "maths"
    """Who checks."""

    def judge(self, samples: Sequence[Sample], around: Around) -> list[Drop | None]:
        """By asking the verifier about each response.

        Raises:
            ConfigError: there is no such verifier.
        """
        verify = VERIFIERS.get(self.by)
        if verify is None:
            raise ConfigError(
                Fault(
                    "filters.verified.by",
                    f"nobody called {self.by!r} can check answers{nearest(self.by, VERIFIERS)}",
                    allowed=", ".join(VERIFIERS) or "nobody",
                )
            )
        return [
            None if verify(facts_of(sample), sample.text) else Drop("wrong answer", sample.text[-60:])
            for sample in samples
        ]


def facts_of(sample: Sample) -> dict[str, Any]:
    """What a verifier is told about the question."""
    prompt = sample.response.prompt
    return {**prompt.facts, "question": prompt.question, "references": list(prompt.references)}
