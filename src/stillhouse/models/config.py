"""The configs of the student and of the teacher's model."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf, StrictConfig, because
from stillhouse.models.pruning.config import Prune

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Part = Literal["language", "projector", "tower"]
"""Of a vision-language model."""


class LoraConfig(StrictConfig):
    """LoRA adapters (Hu et al. 2021) through peft: only they are trained; export merges them."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: ListOf[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules with an adapter; "all-linear": every linear layer except the head."""
    parts: ListOf[Part] | None = None
    """Of a vision-language model the parts in which targets get an adapter. Default: all that have modules of
    these names; with "all-linear" the language model."""
    merge: bool = True
    """Merge the adapters into the weights at export; false exports the adapters, with the model that they
    belong to in the folder `base` unless that is on the hub."""


class QuantiseConfig(StrictConfig):
    """Weights of linear layers in fewer bits; the head, embeddings and norms keep their dtype."""

    weights: Literal["int8", "int4", "nf4"] = "int8"
    """int8: symmetric, one scale for each row (torchao). int4: symmetric, one scale for each group (torchao).
    nf4: QLoRA's 4-bit NormalFloat in blocks of 64 (bitsandbytes)."""
    group_size: int = Field(32, ge=8, multiple_of=8)
    """Weights in a row with one scale, for int4."""

    def options_without_effect(self) -> dict[str, str]:
        """The group size of what has no such groups."""
        if self.weights == "int4":
            return {}
        return because(f"{self.weights} has no groups of a chosen size", "group_size")


class StudentQuantisation(QuantiseConfig):
    """Train a student whose weights are quantised: LoRA adapters over them, or all of them by QAT."""

    qat: bool = False
    """Quantisation-aware training: the linear layers compute with rounded weights, gradients pass the
    rounding as if it were not there, all weights are trained, and export rounds them for good. False: the
    weights are quantised at the start and frozen, and `student.lora` is trained over them (QLoRA)."""

    @model_validator(mode="after")
    def _rounded_alike(self) -> Self:
        if self.qat and self.weights == "nf4":
            raise ValueError(
                "qat rounds as torchao does, which knows no nf4; set weights: int4, or qat: false with "
                "student.lora"
            )
        return self


class ModelConfig(StrictConfig):
    """Where a causal language model is and how it is loaded."""

    path: str | None = None
    """Folder or hub name of a causal language model; `package:NAME/inner` is in an installed package."""
    gguf_file: str | None = None
    """Name of a GGUF file (llama.cpp weights) in that folder; it is dequantised. Needs the extra [gguf]."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; default: `path`."""
    processor: str | None = None
    """Folder or hub name of the image processor of a vision-language model; default: `path`."""
    dtype: Dtype = "auto"
    """The dtype of the weights; "auto": the dtype they are stored in."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """The attention implementation; "auto": the default of transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models that you trust."""


class StudentConfig(ModelConfig):
    """The model to train. Exactly one of `path`, `from_teacher` and `from_config` initialises it."""

    processor: str | None = None
    """Folder or hub name of the image processor of a vision-language model; default: `path`, or else that of
    the teacher."""
    tower: Literal["auto", "frozen", "trained"] = "auto"
    """Whether the vision tower is trained with the language model and the projector. "auto": only where it
    starts from random weights. With `lora` adapters alone are trained."""
    dtype: Dtype = "float32"
    """The dtype of the weights in training. bfloat16 halves memory; small updates may be rounded away."""
    from_teacher: Prune | None = None
    """Start as the teacher with less of it: layers, width, tokens."""
    from_config: dict[str, Any] | None = None
    """Start from random weights with this transformers config, such as {model_type: llama, hidden_size: 64};
    `vocab_size` defaults to the tokenizer's."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    quantise: StudentQuantisation | None = None
    """Train with quantised weights, which export keeps; the teacher stays as it is."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory for about a third more time."""

    @property
    def frozen_weights(self) -> QuantiseConfig | None:
        """How the weights are quantised before training, which then trains adapters over them."""
        return None if self.quantise is None or self.quantise.qat else self.quantise

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.quantise is None:
            return self
        if self.quantise.qat and self.lora is not None:
            raise ValueError(
                "quantise.qat trains all weights, and lora freezes them; set lora: null, or qat: false, "
                "which trains adapters over weights that are quantised already"
            )
        if self.quantise.qat:
            return self
        if self.lora is None:
            raise ValueError(
                "quantised weights cannot be trained; add lora: {merge: false}, or set quantise.qat: true"
            )
        if self.lora.merge:
            raise ValueError(
                "merging adapters into quantised weights would round away what they have learnt; set "
                "lora.merge: false, which exports them beside the quantised model in the folder `base`"
            )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        starts = [name for name in ("path", "from_teacher", "from_config") if getattr(self, name) is not None]
        if len(starts) != 1:
            given = " and ".join(starts) or "none of them"
            way_out = "; set the others to null" if starts else ""
            raise ValueError(f"needs exactly one of path, from_teacher and from_config; got {given}{way_out}")
        if self.from_config is not None and "model_type" not in self.from_config:
            raise ValueError("from_config needs a model_type, such as llama")
        if self.lora is not None and self.tower != "auto":
            raise ValueError("tower has no effect with lora, which trains adapters alone: set lora.parts")
        return self


class TeacherModel(ModelConfig):
    """The teacher's model: frozen, in evaluation mode."""

    path: str
    """Folder or hub name of a causal language model; `package:NAME/inner` is in an installed package."""
    adapter: str | None = None
    """Folder or hub name of a LoRA adapter, which is merged into the weights."""
