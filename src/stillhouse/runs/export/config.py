"""What `stillhouse export`, and a stage of a chain, can be told."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from stillhouse.config import StrictConfig

Target = Literal["safetensors", "gguf", "onnx", "hub"]
PRECISIONS = ("float32", "bfloat16", "float16")


class ExportConfig(StrictConfig):
    """A student as a folder that others load without Stillhouse."""

    to: Target = "safetensors"
    """`safetensors`: what transformers, vLLM and most others load, adapters merged. `gguf`: one file for
    llama.cpp (extra [gguf]). `onnx`: a graph for ONNX Runtime (extra [onnx]). `hub`: safetensors, then
    uploaded to `repo`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto"
    """The dtype of the weights; "auto": the one they are stored in, for ONNX float32. `q8_0`: 8 bits, in
    GGUF alone."""
    repo: str | None = Field(None, pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """With `hub`: the model's name there, such as org/name."""
    private: bool = True
    """With `hub`: only who is allowed to sees a repository that is made; one that is there stays as it is."""
    dry_run: bool = False
    """With `hub`: write the folder and say what would be uploaded, and upload nothing."""
    prompt: str | None = Field(None, min_length=1)
    """The question of the smoke test; default: the run's first held-out prompt."""
    max_tokens: int = Field(64, ge=1)
    """The length limit of the smoke test's answer."""
    smoke_test: bool = True
    """Run the export's own smoke test before the folder is put in its place; a failed one leaves nothing."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _written_here(cls, value: Any) -> Any:
        """llama.cpp's own types are named with the tool that makes them."""
        if isinstance(value, str) and value != "q8_0" and re.fullmatch(r"(i?q|t?q)\d\w*", value.lower()):
            raise PydanticCustomError(
                "llama_cpp_type",
                "is made by llama.cpp's own tool: export bfloat16 or float32, then run "
                "llama-quantize FILE.gguf NEW.gguf {type}; here GGUF is written in float32, bfloat16, "
                "float16 and q8_0",
                {"type": value.upper()},
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.to == "hub") != (self.repo is not None):
            raise ValueError("repo and to: hub belong together: --to hub --repo org/name")
        if self.to == "onnx" and self.dtype not in ("auto", "float32"):
            raise ValueError(f"dtype {self.dtype} is not written to ONNX; auto and float32 are")
        if self.dtype == "q8_0" and self.to != "gguf":
            raise ValueError(f"dtype q8_0 is GGUF's; {self.to} takes {', '.join(PRECISIONS)}")
        return self
