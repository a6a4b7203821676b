"""What a stage of a chain is, and the one that trains."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from stillhouse.config import StrictConfig
from stillhouse.core.requirements import teacher_path
from stillhouse.data.templates import with_template
from stillhouse.errors import ModelError
from stillhouse.models import ModelConfig, TeacherModel, fingerprint_of_files
from stillhouse.models.readers import auto_class
from stillhouse.runs.checks import check_length, data_sources, preflight
from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import StageSize, run_size
from stillhouse.runs.folder import RunFolder, environment
from stillhouse.runs.model_sizes import empty_student
from stillhouse.runs.recording import recorded
from stillhouse.runs.resolve import Resolved
from stillhouse.runs.result import Result
from stillhouse.runs.size_facts import HERE, Machine
from stillhouse.runs.tokenizers import tokenizers


@dataclass(frozen=True)
class Stage(ABC):
    """One stage: what it takes, and how it comes into its folder."""

    name: str
    """The key under `stages`, and the name of its folder."""
    folder: Path
    after: tuple[str, ...]
    """The earlier stages that it takes something from."""

    @property
    def leaves_rows(self) -> bool:
        """Whether it leaves data for later stages, and no student."""
        return False

    @property
    @abstractmethod
    def distributed(self) -> bool:
        """Whether several processes run it together; else the first one does, and the others wait."""

    @property
    @abstractmethod
    def what(self) -> str:
        """What it does in a word or two: the recipe, or the conversion."""

    @property
    @abstractmethod
    def provenance(self) -> dict[str, dict[str, Any]]:
        """Every value with its origin."""

    @property
    @abstractmethod
    def notes(self) -> Sequence[str]:
        """What a user should know of its values."""

    @property
    @abstractmethod
    def config(self) -> RunConfig | None:
        """How the student is trained, or a converted one evaluated; None for one that is only converted."""

    @abstractmethod
    def check(
        self, config: RunConfig | None, stand_ins: Mapping[str, str], machine: Machine = HERE
    ) -> StageSize:
        """Refuse what can be refused before anything runs.

        Args:
            config: that of the stage, with stand-ins for what earlier stages have not left yet.
            stand_ins: the folder of each such stage -> that of its stand-in.
            machine: what its memory is estimated for.

        Returns:
            The size of the stage.
        """

    @abstractmethod
    def write_stand_in(self, config: RunConfig | None, stand_ins: Mapping[str, str], folder: Path) -> None:
        """Write what the stage will leave but for its weights: the student's configuration and tokenizer.

        Args:
            config: as `check` has it.
            stand_ins: as `check` has them.
            folder: where to, as the folder of the stage will be.
        """

    @abstractmethod
    def run(self, resume: bool) -> Result:
        """Bring it to its end, from its newest checkpoint if it is to be resumed."""

    @abstractmethod
    def outside(self, chain: Path) -> dict[str, str]:
        """Digests of the data and models that it takes from outside of the chain, by the path of the value.

        Args:
            chain: the folder of the chain.
        """

    @contextlib.contextmanager
    def working(self, resume: bool) -> Iterator[RunFolder]:
        """The run folder of a stage that trains nothing, with its state kept true; done at the end of the
        block."""
        folder = RunFolder(self.folder)
        with folder.alone("--resume" if resume else "output.folder"):
            folder.check(resume)
            with recorded(folder, self.name):
                folder.note(stage=self.what)
                folder.write("provenance.json", self.provenance)
                folder.write("environment.json", environment())
                yield folder
                folder.end("done")


@dataclass(frozen=True)
class TrainingStage(Stage):
    """A run like any other, whose student, teachers or data may come from earlier stages."""

    resolved: Resolved = field(kw_only=True)

    @property
    def distributed(self) -> bool:
        return True

    @property
    def what(self) -> str:
        return self.resolved.config.recipe or self.resolved.config.objective.name

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        return self.resolved.provenance

    @property
    def notes(self) -> Sequence[str]:
        return self.resolved.notes

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    def check(
        self, config: RunConfig | None, stand_ins: Mapping[str, str], machine: Machine = HERE
    ) -> StageSize:
        assert config is not None
        preflight(config)
        found = run_size(config, machine.gpu, machine.devices, machine.online)
        check_length(config, found.rows["prompts"])
        return StageSize(found.rows, found.facts, found)

    def write_stand_in(self, config: RunConfig | None, stand_ins: Mapping[str, str], folder: Path) -> None:
        assert config is not None
        teacher = None if config.teacher is None else config.teacher.model_to_load()
        tokenizer = tokenizers(config).student
        model, _ = empty_student(config.student, teacher, len(tokenizer))
        write_stand_in(folder, model.config, with_template(tokenizer, config.data.template))

    def outside(self, chain: Path) -> dict[str, str]:
        data = {name: source.fingerprint() for name, source in data_sources(self.config).items()}
        teachers = {teacher_path(name): one.model_to_load() for name, one in self.config.all_teachers.items()}
        return data | model_digests({"student": self.config.student, **teachers}, chain)

    def run(self, resume: bool) -> Result:
        from stillhouse.runs.execute import execute

        return execute(self.resolved, resume=resume)


@dataclass(frozen=True)
class SectionStage(Stage):
    """One that trains nothing: a section of its values, such as `quantise` or `pairs`, says what it does."""

    reads: ClassVar[tuple[str, ...]]
    """The values of a run that it makes use of beside its section."""

    section: str = field(kw_only=True)
    values: StrictConfig = field(kw_only=True)
    origins: dict[str, dict[str, Any]] = field(kw_only=True)
    """Where each of its values comes from."""
    resolved: Resolved | None = field(kw_only=True)
    """What it takes of a run; None where it takes nothing."""

    @property
    def options(self) -> Any:
        """The values of its section."""
        return getattr(self.values, self.section)

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        found = {} if self.resolved is None else self.resolved.provenance
        return {**self.origins, **{path: fact for path, fact in found.items() if _within(path, self.reads)}}

    @property
    def config(self) -> RunConfig | None:
        return None if self.resolved is None else self.resolved.config


def _within(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith((f"{name}.", f"{name}[")) for name in names)


def model_digests(models: Mapping[str, ModelConfig | None], chain: Path) -> dict[str, str]:
    """Digests of models that are no stages of the chain, by name.

    Args:
        models: by name; None for one that is not loaded here.
        chain: the folder of the chain, which remembers the hashes.
    """
    found: dict[str, str] = {}
    for name, model in models.items():
        if model is None or model.path is None or Path(model.path).is_relative_to(chain):
            continue
        options = model.model_dump(include=TeacherModel.model_fields.keys() & type(model).model_fields.keys())
        with contextlib.suppress(ModelError):  # a name on the hub that has not been downloaded yet
            found[name] = fingerprint_of_files(TeacherModel(**options), chain)
    return found


def add_weights(folder: Path) -> None:
    """Give the student of a stand-in random weights, if there is one: with them it takes the time and the
    memory of the one that will be there."""
    from transformers import AutoConfig

    place = folder / "student"
    if place.is_dir():
        config = AutoConfig.from_pretrained(place)
        auto_class(config).from_config(config).save_pretrained(place)


def write_stand_in(folder: Path, model_config: Any, tokenizer: Any) -> None:
    """A run folder with a student that has no weights."""
    model_config.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    for name in ("state.json", "resolved.yaml"):  # what makes it a run folder
        (folder / name).write_text("{}", encoding="utf-8")
