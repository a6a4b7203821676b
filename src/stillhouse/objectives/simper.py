"""Preference optimisation without a reference: likelihoods of the chosen and of the rejected response."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from stillhouse.core.host import to_device
from stillhouse.core.requirements import Requirements, RunFacts
from stillhouse.core.rows import Rows, sequence_means
from stillhouse.core.types import SOURCES
from stillhouse.errors import Fault
from stillhouse.objectives.base import Objective
from stillhouse.objectives.pairs import PREFERRED
from stillhouse.objectives.registry import register


@register
class SimPER(Objective):
    """Raise the likelihood of the preferred response and lower that of the other, each as its inverse
    perplexity; there is no reference model and no scale.

    Equation: -2 exp(mean_t log q(y_w)) on rows of the preferred response y_w (chosen, or the teacher's), and
        2 exp(mean_t log q(y_l)) on those of the other y_l (rejected, or the student's). The mean over the two
        sequences of each pair (`train.normalise: sequence`) is the authors' loss, with their factor 1.
    Gradient: -2 exp(mean_t log q(y_w)) mean_t grad log q(y_w), and with the other sign for y_l.
    Character: seeking; bounded, as both likelihoods are: a response that is improbable already is let go.
    When: preference pairs after distillation or SFT, without the memory of a reference.
    Source: SimPER (ICLR 2025; code at commit db08c97).
    """

    kind: Literal["simper"] = "simper"
    divergence: ClassVar[bool] = False
    has_token_part: ClassVar[bool] = False
    has_sequence_part: ClassVar[bool] = True

    def requirements(self) -> Requirements:
        return Requirements(rows=frozenset({"labels", "sources", "sequences", "label_logprobs"}))

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        others = sorted(facts.sources - PREFERRED.keys())
        if others:
            yield Fault(
                path,
                f"kind simper does not know whether {others[0]} text is preferred",
                got=", ".join(sorted(facts.sources)),
                allowed=", ".join(PREFERRED),
                hint="Take responses.kind: preference_pairs or pairs, and another objective for other text.",
            )

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        return student.new_zeros(student.shape[0])

    def per_sequence(self, rows: Rows) -> Tensor:
        ids, sources = rows.sequence_ids, rows.sources
        assert ids is not None
        assert sources is not None
        assert rows.student_logprobs is not None
        signs = np.array([PREFERRED.get(source, 0.0) for source in SOURCES], np.float32)[sources]
        if not signs.all():
            raise ValueError(f"simper is for responses of {', '.join(PREFERRED)}")
        likelihood = sequence_means(rows.student_logprobs, ids).exp()
        weights = to_device(-2 * signs, likelihood.device).to(likelihood.dtype)
        return weights * likelihood[to_device(ids, likelihood.device)]
