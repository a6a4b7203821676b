"""The interface of every ranker."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from stillhouse.config import Registry, StrictConfig
from stillhouse.rollouts.offline.samples import Sample


@dataclass(frozen=True, slots=True)
class RankingPlace:
    """Where a ranker may keep what an interruption should not lose.

    Example: `RankingPlace(Path("pairs.jsonl"))`
    """

    output: Path
    """The file that the ranking is for."""

    def beside(self, name: str) -> Path:
        """A file next to it: `NAME.OUTPUT` in a hidden folder."""
        return self.output.parent / f".{name}" / self.output.name


class Ranker(StrictConfig):
    """Scores several responses to the same prompt. The docstring of a subclass is its row in the docs."""

    kind: str

    @abstractmethod
    def scores(self, groups: Sequence[Sequence[Sample]], place: RankingPlace) -> list[list[float | None]]:
        """For each response its score, higher is better; None where it cannot be answered.

        Args:
            groups: the responses to one prompt each, at least two.
            place: where it may keep intermediate results.

        Raises:
            StillhouseError: something that it needs is not there.
        """

    def depends_on(self) -> str | None:
        """A digest of what its scores depend on beyond its options, such as weights; None: nothing."""
        return None


REGISTRY: Registry[Ranker] = Registry("ranker", Ranker, "rouge_l")  # type: ignore[type-abstract]
RankerField = Annotated[SerializeAsAny[Ranker], BeforeValidator(REGISTRY.parse)]
"""The annotation of a field that holds a ranker."""
