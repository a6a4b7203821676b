"""The interface of every teacher signal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from stillhouse.config import Part, Registry
from stillhouse.models import TeacherModel
from stillhouse.objectives.head import Head


class Teacher(Protocol):
    """The teacher's last hidden states for a batch; with `head` they are its exact distribution."""

    @property
    def head(self) -> Head:
        """The teacher's output embedding, which turns its hidden states into logits."""
        ...

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """[N, Dt]: a row for each true entry of `batch["response_mask"]`, row-major, without gradient."""
        ...


class TeacherConfig(Part):
    """Where the teacher's signal comes from."""

    kind: str
    provides: ClassVar[frozenset[str]] = frozenset()
    """Of "distribution" (all log-probabilities) and "text" (it can write responses)."""

    def model_to_load(self) -> TeacherModel | None:
        """The model that has to be loaded for it; None if there is none."""
        return None

    @abstractmethod
    def build(self, model: nn.Module | None, vocab: int) -> Teacher:
        """The running teacher; `model` is loaded where the kind has one, `vocab` counts shared ids."""


REGISTRY: Registry[TeacherConfig] = Registry("teacher", TeacherConfig)  # type: ignore[type-abstract]
TeacherField = Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a teacher."""
