"""How objectives are computed inside of a Triton kernel.

An objective states a `KernelTerm`: which functions, with which numbers. The functions stand in the modules
beside this file, a few lines each, and are imported only where Triton is; the passes over the logits are the
template's (`stillhouse.fused.triton.template`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from stillhouse.core.requirements import MAIN

Mean = Literal["student", "teacher", "uniform"]


@dataclass(frozen=True, slots=True, eq=False)
class KernelTerm:
    """One comparison with one teacher, or none, as the template computes it.

    Example: `KernelTerm("divergences.skew_kl", (0.1,), sums=1)`
    """

    function: str | None = None
    """The value of a token and its gradient for the student's logits: `MODULE.NAME` below this package, a
    function of (token, means, sums, numbers). None: zero."""
    numbers: tuple[float | Tensor, ...] = ()
    """What the functions take, at most six; only the first may be a tensor [n], one for each row."""
    sums: int = 0
    """How many sums over the vocabulary the gradient needs, at most four: `MODULE.NAME_sums` gives their
    terms from (token, numbers)."""
    means: frozenset[Mean] = frozenset()
    """Under which distributions it needs the mean residual z - z_teacher; these cost no pass."""
    target: str | None = None
    """A function of (z, z_teacher, numbers): the logits to compare with instead of the teacher's."""
    mixture: str | None = None
    """A function of (log_q, log_p, numbers): a third distribution before it is normalised, under which a
    token has `log_m`."""
    temperature: float = 1.0
    """Divides both logits before the softmax."""
    label_weight: float = 0.0
    """How much -log q(y) of the row's label y counts."""
    weight: float = 1.0
    """Multiplies the value and the gradient of the function and of the label."""
    teacher_model: str | None = MAIN
    """The teacher; None if it asks none."""

    def times(self, weight: float) -> KernelTerm:
        """The same, weighted."""
        return replace(self, weight=self.weight * weight)

    @property
    def passes(self) -> int:
        """How often the logits are read."""
        return 2 + (self.mixture is not None) + (self.sums > 0)


def function(name: str) -> Any:
    """The Triton function called `MODULE.NAME` in this package.

    Raises:
        ImportError: triton is not installed.
    """
    module, _, attribute = name.partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
