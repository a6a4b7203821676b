"""How the loss over the language-model head is computed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stillhouse.config import Bytes, StrictConfig, because
from stillhouse.fused.backend import Backend, check_available

SMALLEST_BUDGET, LARGEST_BUDGET = 192 * 2**20, 2 * 2**30
"""Bytes of the default memory budget: that of a CPU, which holds on a GPU at least, and the most there."""


class FusedConfig(StrictConfig):
    """How the loss over the language-model head is cut into chunks. It does not depend on that, up to
    rounding.

    Example: `train: {fused: {memory_budget: 1GiB}}`
    """

    memory_budget: Bytes | None = None
    """Memory for the student's logits of one chunk, and for their gradient where it is not written over them,
    such as 192MiB; each teacher's take at most the same, a CPU less. Default: 192MiB on a CPU; on a GPU an
    eighth of its free memory, rounded down to a power of two, from 192MiB to 2GiB. Chunks of another size
    round otherwise: for the same bits on cards with other free memory set it."""
    chunk_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a chunk; default: as many as the budget allows, evenly."""
    fp32_logits: bool | None = None
    """Keep fp32 logits of half-precision operands; false rounds each logit once to the precision of the
    operands, as the model's own head does. On a GPU false is faster and smaller, and the gradient is off by 2
    to 3% (of tvd 8 to 19%) instead of 0.3%. Default: true where the product gives fp32 at no cost, which is
    a GPU; a CPU has to multiply fp32 copies."""
    backend: Backend = "auto"
    """What computes values and gradients from the logits. triton: one kernel in two to four passes, for the
    objectives that have a kernel form (docs/performance.md lists them), the closed forms for the others; on a
    GPU only. closed_form: eager torch, which suits the caches of a CPU. compile: the definition of the
    objective through `torch.compile`; on the CPUs tried the closed forms were faster. auto: triton on a GPU
    where it is installed, else closed_form."""

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.chunk_rows is None else because("chunk_rows decides", "memory_budget")

    def check_installed(self) -> None:
        """What the backend needs.

        Raises:
            EnvironmentFault: Triton is asked for and not installed, or there is no GPU.
        """
        check_available(self.backend)

    def budget(self, free: int | None = None) -> int:
        """Bytes for one chunk, with so many free on a GPU; None: on a CPU."""
        if self.memory_budget is not None:
            return self.memory_budget
        if free is None:
            return SMALLEST_BUDGET
        share = max(1, free // 8)
        return max(SMALLEST_BUDGET, min(LARGEST_BUDGET, 1 << (share.bit_length() - 1)))

    def chunk_size(self, count: int, bytes_per_row: int, free: int | None = None) -> int:
        """How many of `count` rows make a chunk: the fewest chunks that fit the budget, of even size."""
        if self.chunk_rows is not None:
            return self.chunk_rows
        fit = max(1, self.budget(free) // max(1, bytes_per_row))
        chunks = max(1, -(-count // fit))
        return max(1, -(-count // chunks))
