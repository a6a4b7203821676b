"""What the functions of a kernel form are given, in Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from stillhouse.core import sparse

EXCLUDED = tl.constexpr(sparse.EXCLUDED)
TINY = tl.constexpr(2e-38)
"""Little more than the least normal fp32 number, below which a literal would be fp64."""


class Token(NamedTuple):
    """Both models at one token."""

    log_q: Any
    """The student's log-probability, at the temperature of the form."""
    q: Any
    log_p: Any
    """The teacher's."""
    p: Any
    residual: Any
    """z - z_teacher, at temperature 1."""
    log_m: Any
    """The log-probability under the form's mixture, where it has one."""


class Means(NamedTuple):
    """Means of the residual over a row."""

    student: Any
    """Under the student's distribution, at the temperature of the form."""
    teacher: Any
    uniform: Any
    share: Any
    """The uniform probability: one over how many tokens take part."""
