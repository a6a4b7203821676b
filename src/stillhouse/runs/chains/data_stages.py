"""Stages that make data for later ones: responses written by a model, filtered, or ranked into pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from stillhouse import console
from stillhouse.config import Layer, Layered, StrictConfig, to_yaml
from stillhouse.data.datasets import dataset_at
from stillhouse.files import ROWS_FILE
from stillhouse.report.chains import rows_text
from stillhouse.runs.chains.layers import checked, only, refuse_idle
from stillhouse.runs.chains.references import References, with_stand_ins
from stillhouse.runs.chains.sections import (
    SECTIONS,
    CurateSection,
    DataSection,
    GenerateSection,
    PairsSection,
)
from stillhouse.runs.chains.stages import SectionStage, model_digests
from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import StageSize
from stillhouse.runs.resolve import Resolved, resolve_layers
from stillhouse.runs.result import Result
from stillhouse.runs.size_facts import HERE, Machine

READ = ("teacher", "student", "data", "engine")
"""What writing responses takes of a run."""


class DataStageConfig(StrictConfig):
    """A stage that makes data. Exactly one of its sections is given."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of the stage in tables; default: that under `stages`."""
    generate: GenerateSection | None = None
    """Responses of a model, as `stillhouse generate`."""
    curate: CurateSection | None = None
    """Of responses those that filters keep, or the best, as `stillhouse curate`."""
    pairs: PairsSection | None = None
    """Preference pairs of several responses to each prompt, as `stillhouse pairs`."""


@dataclass(frozen=True)
class DataStage(SectionStage):
    """Writes rows into its folder; for later stages `stage:NAME` is the file with them."""

    reads = (*READ, "train.seed")
    values: DataStageConfig = field(kw_only=True)

    @property
    def options(self) -> DataSection:
        """What it does."""
        found: DataSection = super().options
        return found

    @property
    def leaves_rows(self) -> bool:
        return True

    @property
    def distributed(self) -> bool:
        return self.options.distributed

    @property
    def what(self) -> str:
        return self.options.summary

    @property
    def notes(self) -> Sequence[str]:
        return ()

    def check(
        self, config: RunConfig | None, stand_ins: Mapping[str, str], machine: Machine = HERE
    ) -> StageSize:
        return with_stand_ins(self.options, stand_ins).check(config, machine)

    def write_stand_in(self, config: RunConfig | None, stand_ins: Mapping[str, str], folder: Path) -> None:
        with_stand_ins(self.options, stand_ins).write_stand_in(config, folder / ROWS_FILE)

    def outside(self, chain: Path) -> dict[str, str]:
        found = model_digests(self.options.models(self.config), chain)
        for path in self.options.files():
            if not path.is_relative_to(chain):
                found[f"{self.section}.of: {path}"] = dataset_at(path).fingerprint()
        if self.config is not None:
            found["data.train"] = self.config.data.train.fingerprint()
        return found

    def run(self, resume: bool) -> Result:
        with self.working(resume) as folder:
            folder.write_text("resolved.yaml", to_yaml(self.values))
            found = self.options.write(self.config, folder.path / ROWS_FILE)
            folder.note(rows=found)
            if folder.main:
                console.note(f"{self.name}: {rows_text(found)}")
        return Result(folder.path, "done", {})


def data_stage(
    section: str, layers: Sequence[Layer], own: Sequence[Layer], name: str, references: References
) -> DataStage:
    """The stage that its layers describe.

    Args:
        section: what it does.
        layers: all layers, the shared ones among them; the first has the lowest precedence.
        own: the layers of the stage alone.
        name: of the stage.
        references: puts paths in the place of `stage:NAME`.

    Raises:
        ConfigError: everything that is wrong with its values.
    """
    asks = issubclass(SECTIONS[section], GenerateSection)
    refuse_idle(own, {"name", section, *(READ if asks else ())}, section)
    layered = Layered.merged(
        Layer.of({"name": name}, "default"), *(only(layer, ("name", section)) for layer in own)
    )
    references.put(layered)
    values, origins = checked(DataStageConfig, layered)
    return DataStage(
        name,
        references.chain / name,
        tuple(references.found),
        section=section,
        values=values,
        origins=origins,
        resolved=_resolved(layers, references) if asks else None,
    )


def _resolved(layers: Sequence[Layer], references: References) -> Resolved:
    """Models, data and sampling; without a student the rows are in the tokens of the teacher."""
    merged = Layered.merged(*layers).values
    teacher, train = merged.get("teacher"), merged.get("train")
    beneath: dict[str, Any] = {"objective": "cross_entropy"}
    if isinstance(train, Mapping) and "seed" in train:
        beneath["train"] = {"seed": train["seed"]}
    if "student" not in merged and isinstance(teacher, Mapping):
        beneath["student"] = {"path": teacher.get("path"), "dtype": "auto"}
    read = (only(layer, READ) for layer in layers)
    return resolve_layers([Layer.of(beneath, "default"), *read], references.put)
