"""The interface of every filter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

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
    """In the same words for every response with this fault, because reasons are counted."""
    detail: str = ""
    """What was found in this response."""
    filter: str = ""
    """The kind of the filter; `apply_filters` fills it in."""


@dataclass(frozen=True)
class FilterContext:
    """What filters may use besides the responses of one source."""

    held_out: Callable[[], Sequence[str]] = tuple
    """Prompts and references of every set that the run evaluates on."""
    partners: Mapping[SampleKey, Sample] = field(default_factory=dict)
    """The other response of each pair; empty without pairs."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """What a filter keeps from one call of `apply` to the next, by its kind and options."""


class Filter(StrictConfig):
    """One reason to drop a response.

    A filter implements `check`, or `apply` where it looks at many responses at a time; then
    `compares_responses` says whether its verdicts depend on which.
    """

    kind: str
    source: Literal["all", "teacher", "student"] = "all"
    """Which responses of a pair it applies to."""

    def requirements(self) -> Requirements:
        """What it needs besides the responses; nothing by default."""
        return Requirements()

    def compares_responses(self) -> bool:
        """Whether a verdict depends on the other responses of the source, all of which `apply` then gets at
        once; by default where `apply` is the filter's own."""
        return type(self).apply is not Filter.apply

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """For each sample why it is dropped, or None if it is kept; by default `check` of each.

        Args:
            samples: responses of one source that earlier filters have kept, in the order of the prompts; all
                of them where it compares responses.
            context: what else it may use.
        """
        return [self.check(sample, context) for sample in samples]

    def check(self, sample: Sample, context: FilterContext) -> Drop | None:
        """Why a sample is dropped, or None if it is kept."""
        raise NotImplementedError(f"{type(self).__name__} implements neither check nor apply")


TEACHER_LOGPROB = replace(Requirements.of(MAIN, "distribution"), same_tokenizer=frozenset({MAIN}))
"""The requirements of filters and scores that ask for the likelihood of a response under the teacher."""

REGISTRY = Registry("filter", Filter)
FilterField = Annotated[SerializeAsAny[Filter], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a filter."""
