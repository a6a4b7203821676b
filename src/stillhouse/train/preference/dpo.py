"""DPO after distillation, by TRL."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field

from stillhouse.errors import EnvironmentFault
from stillhouse.train.preference.base import REGISTRY, PreferenceStage, StageTraining


@REGISTRY.register
class DpoStage(PreferenceStage):
    """Direct preference optimisation by TRL's `DPOTrainer`; the distilled student is start and reference.
    Needs the extra [preference].

    Equation: -log sigma(beta [log q(y_w) / q_0(y_w) - log q(y_l) / q_0(y_l)]), q_0 the distilled student.
    Source: Rafailov et al. 2023 (arXiv 2305.18290); after distillation as in DistiLLM-2 (arXiv 2503.07067),
        table 6.
    """

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """How sharp the preference is: the larger, the closer the student stays to its start."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """TRL's `loss_type`."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be the wrong way round, for sigmoid and robust."""

    def options_without_effect(self) -> dict[str, str]:
        found = super().options_without_effect()
        if self.loss in ("ipo", "hinge"):
            found["label_smoothing"] = f"preference.loss is {self.loss}"
        return found

    def check_installed(self) -> None:
        if find_spec("trl") is None:
            raise EnvironmentFault(
                "preference.kind: dpo needs TRL, which is not installed. Install it: "
                "pip install 'stillhouse[preference]'; or take preference.kind: simper, which needs nothing."
            )

    def arguments_class(self) -> tuple[type, dict[str, Any]]:
        from trl import DPOConfig

        options = {
            "beta": self.beta,
            "loss_type": [self.loss],
            "label_smoothing": self.label_smoothing,
            "max_length": None,  # data.max_prompt and data.max_response have cut already
            "disable_dropout": True,
            "gradient_checkpointing": False,  # the student has its own setting
            "router_aux_loss_coef": 0.0,
        }
        return DPOConfig, options

    def trainer(self, training: StageTraining) -> Any:
        from stillhouse.train.dpo_trainer import dpo_trainer

        return dpo_trainer(training)
