"""Stages that convert what an earlier stage has trained: quantised, or exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from stillhouse import console
from stillhouse.config import Layer, Layered, StrictConfig, to_yaml
from stillhouse.errors import ConfigError, ModelError
from stillhouse.models import QuantiseConfig, TeacherModel, fingerprint, load_tokenizer
from stillhouse.models.paths import model_files
from stillhouse.models.quantise import require_package
from stillhouse.runs.chains.layers import checked, only, refuse_idle
from stillhouse.runs.chains.references import References, stood_in
from stillhouse.runs.chains.stages import SectionStage, model_digests, write_stand_in
from stillhouse.runs.checks import preflight
from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import StageSize
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.quantised import quantise_student
from stillhouse.runs.export.targets import export_student
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.resolve import Resolved, resolve_layers
from stillhouse.runs.result import Result, headline
from stillhouse.runs.size_facts import HERE, Machine

EVALUATING = ("name", "data", "evaluate", "teacher", "engine")
"""Values of a conversion that say how its result is evaluated; shared ones are those of the trainings."""


class ConvertedStudent(StrictConfig):
    """The model that is converted."""

    path: str
    """`stage:NAME`, the student of an earlier stage; or another model's folder."""


class ConversionConfig(StrictConfig):
    """A stage that trains nothing. Exactly one of its conversions is given."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of the stage in tables; default: that under `stages`."""
    student: ConvertedStudent
    """The model to convert, such as {path: stage:distil}."""
    quantise: QuantiseConfig | None = None
    """Weights in fewer bits, as `stillhouse quantise`."""
    export: ExportConfig | None = None
    """A folder or file that others load, as `stillhouse export`."""


@dataclass(frozen=True)
class Conversion:
    """What a section of a stage stands for."""

    convert: Callable[[Path, Any, Path], Path]
    """From a source, with the section's values, to a new folder."""
    loads: bool
    """Whether the result is a model that can be evaluated here."""
    summary: Callable[[Any], str]
    """Its values in a word or two."""
    check: Callable[[Any], None] = lambda _: None
    """Refuses what is not installed."""


CONVERSIONS: Mapping[str, Conversion] = {
    "quantise": Conversion(quantise_student, True, lambda one: f"quantise {one.weights}", require_package),
    "export": Conversion(export_student, False, lambda one: f"export {one.to}"),
}
"""By the section of the stage that asks for it."""


@dataclass(frozen=True)
class ConversionStage(SectionStage):
    """Converts the student of an earlier stage, and evaluates the result where it can be loaded here."""

    reads = ("data", "evaluate", "teacher", "engine")
    values: ConversionConfig = field(kw_only=True)

    @property
    def distributed(self) -> bool:
        return False

    @property
    def conversion(self) -> Conversion:
        """What is done."""
        return CONVERSIONS[self.section]

    @property
    def what(self) -> str:
        return self.conversion.summary(self.options)

    @property
    def notes(self) -> Sequence[str]:
        inert = self.options.options_without_effect()
        set_here = {path: fact for path, fact in self.origins.items() if fact["origin"] != "default"}
        return [
            f"{path}={set_here[path]['value']} ({set_here[path]['origin']}) has no effect: {reason}"
            for name, reason in inert.items()
            if (path := f"{self.section}.{name}") in set_here
        ]

    def check(
        self, config: RunConfig | None, stand_ins: Mapping[str, str], machine: Machine = HERE
    ) -> StageSize:
        try:
            model_files(stood_in(self.values.student.path, stand_ins))
        except ModelError as error:
            raise ConfigError(f"student.path: {error}") from error
        self.conversion.check(self.options)
        if config is None:
            return StageSize({"evaluated": "no"}, {})
        started = {**stand_ins, str(self.folder): stood_in(self.values.student.path, stand_ins)}
        student = config.student.model_copy(update={"path": stood_in(str(self.folder), started)})
        preflight(config.model_copy(update={"student": student}))
        return StageSize({"evaluated": "yes"}, {})

    def write_stand_in(self, config: RunConfig | None, stand_ins: Mapping[str, str], folder: Path) -> None:
        from transformers import AutoConfig

        source = TeacherModel(path=stood_in(self.values.student.path, stand_ins))
        write_stand_in(
            folder, AutoConfig.from_pretrained(model_files(source.path).model), load_tokenizer(source)
        )

    def outside(self, chain: Path) -> dict[str, str]:
        return model_digests({"student": TeacherModel(path=self.values.student.path)}, chain)

    def run(self, resume: bool) -> Result:
        with self.working(resume) as folder:
            folder.write_text("resolved.yaml", to_yaml(self.values))
            with console.phase(f"{self.what}: {self.values.student.path}"):
                shutil.rmtree(folder.student, ignore_errors=True)
                self.conversion.convert(Path(self.values.student.path), self.options, folder.student)
            if self.config is not None:
                self._evaluate(folder, self.config)
        return Result(folder.path, "done", headline(folder))

    def _evaluate(self, folder: RunFolder, config: RunConfig) -> None:
        from stillhouse.runs.evaluate_models import load_models, scored_prompts
        from stillhouse.runs.evaluation import evaluate_system

        parts = load_models(config)
        folder.write("models.json", parts.model_facts())
        folder.write("weights.json", fingerprint(parts.student))
        evaluate_system(parts, scored_prompts(parts), folder, "student after", parts.student)


def conversion_stage(
    section: str, layers: Sequence[Layer], own: Sequence[Layer], name: str, references: References
) -> ConversionStage:
    """The stage that its layers describe.

    Args:
        section: which conversion.
        layers: all layers, the shared ones among them; the first has the lowest precedence.
        own: the layers of the stage alone.
        name: of the stage.
        references: puts folders in the place of `stage:NAME`.

    Raises:
        ConfigError: everything that is wrong with its values.
    """
    known = {*ConversionConfig.model_fields, *(EVALUATING if CONVERSIONS[section].loads else ())}
    known -= CONVERSIONS.keys() - {section}
    refuse_idle(own, known, section)
    layered = Layered.merged(
        Layer.of({"name": name}, "default"), *(only(layer, ConversionConfig.model_fields) for layer in own)
    )
    if isinstance(layered.values.get("student"), Mapping):
        references.put(layered)
    values, origins = checked(ConversionConfig, layered)
    folder = references.chain / name
    return ConversionStage(
        name,
        folder,
        tuple(references.found),
        section=section,
        values=values,
        origins=origins,
        resolved=_evaluation(section, layers, folder, references),
    )


def _evaluation(
    section: str, layers: Sequence[Layer], folder: Path, references: References
) -> Resolved | None:
    """How the result is evaluated, if it can be and there is anything to evaluate it on."""
    if not CONVERSIONS[section].loads:
        return None
    shown = [only(layer, EVALUATING) for layer in layers]
    if not any("data" in layer.values for layer in shown):
        return None
    merged = Layered.merged(*shown).values
    data = merged["data"] if isinstance(merged["data"], Mapping) else {}
    rows = data.get("train") or (merged.get("evaluate") or {}).get("data") or data.get("valid")
    values: dict[str, Any] = {
        "student": {"path": str(folder), "dtype": "auto"},
        "objective": "cross_entropy",
    }
    if rows is not None:
        values["data"] = {"train": rows}  # a run needs some, also one that trains nothing
    beneath = Layer.of(values, section)
    resolved = resolve_layers([beneath, *shown], references.put)
    config = resolved.config
    return resolved if config.evaluation_sets() or config.evaluate.tasks else None
