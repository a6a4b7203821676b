"""What `stillhouse export`, and a stage of a chain, can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillhouse.config import StrictConfig

Target = Literal["safetensors"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


class ExportConfig(StrictConfig):
    """A student as a folder that others load without Stillhouse."""

    to: Target = "safetensors"
    """`safetensors`: what transformers, vLLM and most others load, adapters merged."""
    dtype: Precision = "auto"
    """The dtype of the weights; "auto": the one they are stored in."""
    prompt: str | None = Field(None, min_length=1)
    """The question of the smoke test; default: the run's first held-out prompt."""
    max_tokens: int = Field(64, ge=1)
    """The length limit of the smoke test's answer."""
    smoke_test: bool = True
    """Run the export's own smoke test before the folder is put in its place; a failed one leaves nothing."""
