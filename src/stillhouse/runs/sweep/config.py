"""What a sweep's YAML file says: a run, the values over its fields, and how they are searched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from stillhouse.config import FilePath, ListOf, Registry, StrictConfig, because

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class RangeConfig(StrictConfig):
    """Every number between two, for a search that draws.

    Example: `train.lr: {low: 1.0e-4, high: 3.0e-3, log: true}`
    """

    low: int | float
    """The least; with `high` also whole, only whole numbers are drawn."""
    high: int | float
    """The greatest."""
    log: bool = False
    """Draw the logarithm evenly."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, got {self.low:g}")
        return self


class SearchConfig(StrictConfig):
    """How the runs of a sweep are chosen."""

    kind: str


SEARCHES: Registry[SearchConfig] = Registry("search", SearchConfig, "grid")


@SEARCHES.register
class GridConfig(SearchConfig):
    """Every combination of the values, in their order; the last value listed changes fastest."""

    kind: Literal["grid"] = "grid"


@SEARCHES.register
class OptunaConfig(SearchConfig):
    """Trials whose values Optuna suggests from the results so far; needs the extra `sweep`.

    Source: Akiba et al. (2019), "Optuna: a next-generation hyperparameter optimization framework"; `tpe` is
    Bergstra et al. (2011), "Algorithms for hyper-parameter optimization".
    """

    kind: Literal["optuna"] = "optuna"
    trials: int = Field(ge=1)
    """How many runs."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe follows what was good so far; random does not look."""
    random_trials: int = Field(8, ge=1)
    """How many of the first trials `tpe` draws at random."""
    seed: int = Field(0, ge=0)
    """Decides what is drawn."""

    def options_without_effect(self) -> dict[str, str]:
        return because("search.sampler is random", "random_trials") if self.sampler == "random" else {}


class StopEarlyConfig(StrictConfig):
    """A run whose best validation so far is worse than that of others at the same step is stopped; needs the
    extra `sweep`.

    Source: the median rule of Golovin et al. (2017), "Google Vizier: a service for black-box optimization".
    """

    worse_than: float = Field(0.5, gt=0, lt=1)
    """Of the finished runs this share, the best ones, must be better: 0.5 is the median."""
    runs: int = Field(3, ge=1)
    """How many runs come to their end before any is stopped."""
    steps: int = Field(1, ge=1)
    """The optimiser step before which none is stopped."""


class ShareConfig(StrictConfig):
    """What the runs of a sweep take from each other instead of asking the teacher again."""

    text: bool = True
    """Texts of the teacher, of runs that ask it the same prompts with the same sampling and the same seed;
    and evaluations of the teacher and of a student before its training on the same questions."""
    signal: bool = True
    """What a live teacher says of texts that are known before training: its last hidden states, exact, are
    computed once and kept in the sweep's folder. Runs that train on the student's own text ask it live."""


class SweepConfig(StrictConfig):
    """Runs that differ in some of their values."""

    name: str = Field("sweep", pattern=NAME)
    """The name of the sweep and of its folder."""
    run: FilePath | dict[str, Any]
    """What all runs have in common: the YAML file of a run, or its content."""
    values: dict[str, ListOf[Any] | RangeConfig] = Field(default_factory=dict)
    """Dotted name of a field -> its values (`train.seed: [1, 2, 3]`), or the range to draw from."""
    variants: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """A word of one's own -> names -> several fields that change together:
    `method: {KD: {recipe: kd}, SKL: {recipe: skl, objective.alpha: 0.2}}`."""
    search: Annotated[SerializeAsAny[SearchConfig], BeforeValidator(SEARCHES.parse)] = GridConfig()
    """grid, or {kind: optuna, trials: 20}."""
    metric: Literal["rouge_l", "loss"] | None = None
    """What runs are judged by on data.valid, for `optuna` and `stop_early`; default: `train.best_by`, or loss
    where `train.validate_rouge` is false."""
    stop_early: StopEarlyConfig | None = None
    """Stop runs that validation shows to be worse than others."""
    skip_refused: bool = False
    """Leave out combinations that the checks refuse, and count them; otherwise one refuses the sweep."""
    share: ShareConfig = ShareConfig()
    """What the teacher says once for all runs."""
    folder: FilePath | None = None
    """Where everything goes; default: runs/NAME."""

    @property
    def place(self) -> Path:
        """The folder of the sweep."""
        return self.folder or Path("runs") / self.name

    @property
    def judged(self) -> bool:
        """Whether runs are judged by their validation."""
        return self.search.kind == "optuna" or self.stop_early is not None

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.judged else because("a grid without stop_early judges no run", "metric")

    @model_validator(mode="after")
    def _something_varies(self) -> Self:
        if not self.values and not self.variants:
            raise ValueError("values or variants must say what differs, such as values: {train.seed: [1, 2]}")
        for path, given in self.values.items():
            if isinstance(given, RangeConfig) and self.search.kind == "grid":
                raise ValueError(f"values.{path}: a grid takes a list; a range is for search: optuna")
            if given == ():
                raise ValueError(f"values.{path}: is an empty list")
        for word, named in self.variants.items():
            if not named:
                raise ValueError(f"variants.{word}: has no names")
        return self
