"""Row sums, values and gradients of divergences with a shape of their own, for the Triton template."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it


@triton.jit
def taid_target(s, t, numbers):
    """The student's logits moved towards the teacher's; the fourth number is the teacher's share."""
    return (1.0 - numbers[3]) * s + numbers[3] * t
