"""What of the teacher a student starts with."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import Count, ListOf, StrictConfig, because
from stillhouse.core.requirements import MAIN, Requirements

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""The sizes of a model's width, as configurations of transformers name them."""


class Prune(StrictConfig):
    """Start the student as the teacher with less of it: layers, width, tokens. What is not named stays."""

    layers: ListOf[int] | int | None = None
    """The teacher's layers to keep: their numbers from 0 in ascending order, such as [0, 1, 2, 5, 8], or how
    many."""
    hidden_size: int | None = Field(None, ge=1)
    """Channels of the residual stream to keep."""
    intermediate_size: int | None = Field(None, ge=1)
    """Channels of each layer's MLP to keep."""
    num_attention_heads: int | None = Field(None, ge=1)
    """Query heads of each layer to keep. Whole groups go, with their key-value head, unless
    `num_key_value_heads` says how many of these stay."""
    num_key_value_heads: int | None = Field(None, ge=1)
    """Key-value heads of each layer to keep, with the query heads that read them."""
    parameters: Count | None = None
    """At most so many parameters, such as 60M: layers and width that are not given shrink until it holds."""
    vocabulary: Literal["all", "data"] = "all"
    """data: only the tokens that the training data use, and those that these are merged from, in embeddings
    and tokenizer. The teacher's distribution is then taken over these tokens too."""
    choose: Literal["importance", "even"] = "importance"
    """What stays where only a number is given: what is most important on the training data (layers by block
    influence, width by activations), or evenly spaced."""
    rows: int = Field(64, ge=1)
    """Rows of `data.train`, evenly spaced, that importance is measured on."""

    def requirements(self) -> Requirements:
        """The teacher's weights, and its tokenizer."""
        return replace(Requirements.of(MAIN, "weights"), same_tokenizer=frozenset({MAIN}))

    @property
    def given_layers(self) -> tuple[int, ...] | None:
        """The layers to keep, where they are named."""
        return self.layers if isinstance(self.layers, tuple) else None

    @property
    def chooses(self) -> bool:
        """Whether it is left open what stays."""
        sizes = (self.parameters, *(getattr(self, name) for name in WIDTHS))
        return isinstance(self.layers, int) or any(size is not None for size in sizes)

    @property
    def measures(self) -> bool:
        """Whether importance has to be measured."""
        return self.chooses and self.choose == "importance"

    def options_without_effect(self) -> dict[str, str]:
        """How to choose and measure where nothing is to be chosen or measured."""
        if not self.chooses:
            return because("the layers are named, and nothing else is to be chosen", "choose", "rows")
        return {} if self.measures else because("nothing is measured with choose: even", "rows")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.layers is None and not self.chooses and self.vocabulary == "all":
            raise ValueError(
                "needs what to keep: layers, a width (" + ", ".join(WIDTHS) + "), parameters or "
                "vocabulary: data"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if isinstance(self.layers, int):
            if self.layers < 1:
                raise ValueError("needs at least one layer")
            return self
        if self.layers is None:
            return self
        if not self.layers:
            raise ValueError("needs at least one layer")
        if (
            any(late <= early for early, late in zip(self.layers, self.layers[1:], strict=False))
            or self.layers[0] < 0
        ):
            raise ValueError("layers must be different, not negative and in ascending order")
        return self
