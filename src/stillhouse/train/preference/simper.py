"""SimPER after distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillhouse.train.preference.base import REGISTRY, PreferenceStage


@REGISTRY.register
class SimperStage(PreferenceStage):
    """The loss of the recipe `simper`: inverse perplexities of both responses, without a reference."""

    kind: Literal["simper"] = "simper"
    lr: float = Field(6e-7, gt=0)
    """Peak learning rate; 5e-7 in the paper for a student after instruction tuning."""

    @property
    def recipe(self) -> str:
        """Its own."""
        return self.kind
