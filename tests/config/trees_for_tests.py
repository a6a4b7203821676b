"""A small configuration with everything that a real one has: families, schedules, optional parts, lists."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import FilePath, ListOf, Registry, StrictConfig
from stillhouse.errors import ConfigError, Fault
from stillhouse.schedules import NonNegative, Share


class Shape(StrictConfig):
    kind: str


SHAPES: Registry[Shape] = Registry("shape", Shape)


@SHAPES.register
class Round(Shape):
    kind: Literal["round"] = "round"
    radius: Share = 0.5  # type: ignore[valid-type]
    """Half the width."""


@SHAPES.register
class Square(Shape):
    kind: Literal["square"] = "square"
    side: NonNegative = 1.0  # type: ignore[valid-type]
    corners: ListOf[int] = (1, 2)


ShapeField = SHAPES.field()


class Speed(StrictConfig):
    rate: Annotated[float, Field(gt=0)] = 1e-4
    """How fast, in steps of `#1` each: not a comment."""
    mode: Literal["slow", "fast"] = "slow"
    steps: Annotated[int, Field(ge=1)] | None = None


class Tree(StrictConfig):
    name: str
    """What it is called."""
    shape: ShapeField = Round()  # type: ignore[valid-type]
    """Which form."""
    shapes: ListOf[ShapeField] = ()  # type: ignore[valid-type]
    other: ShapeField | None = None  # type: ignore[valid-type]
    speed: Speed = Speed()
    """How it moves."""
    top_speed: Speed = Speed(rate=7.0, mode="fast")
    folder: FilePath | None = None
    labels: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.name == "misfit":
            raise ConfigError(Fault("speed.mode", "does not go with that name", got="slow"))
        return self
