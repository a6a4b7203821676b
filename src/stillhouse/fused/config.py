"""How the loss over the language-model head is computed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stillhouse.config import Bytes, StrictConfig, because


class FusedConfig(StrictConfig):
    """How the loss over the language-model head is cut into chunks. It does not depend on that, up to
    rounding.

    Example: `train: {fused: {memory_budget: 1GiB}}`
    """

    memory_budget: Bytes = 192 * 2**20
    """Memory for the student's logits of one chunk, such as 192MiB; each teacher's take at most the same, a
    CPU less."""
    chunk_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a chunk; default: as many as the budget allows, evenly."""
    fp32_logits: bool = False
    """Keep fp32 logits of half-precision operands on a CPU too, where only a product of fp32 copies gives
    them: slower. Without it a CPU rounds each logit once to the precision of the operands, as the model's
    own head does."""
    compile: bool = False
    """Run the definition of the objective through `torch.compile` instead of its closed form. On the CPUs
    tried the closed forms were faster."""

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.chunk_rows is None else because("chunk_rows decides", "memory_budget")

    def chunk_size(self, count: int, bytes_per_row: int) -> int:
        """How many of `count` rows make a chunk: the fewest chunks that fit the budget, of even size."""
        if self.chunk_rows is not None:
            return self.chunk_rows
        fit = max(1, self.memory_budget // max(1, bytes_per_row))
        chunks = max(1, -(-count // fit))
        return max(1, -(-count // chunks))
