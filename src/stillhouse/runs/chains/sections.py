"""What a stage that makes data does: writes responses, filters them, or ranks them into pairs."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stillhouse.config import FilePath, ListOf, StrictConfig
from stillhouse.core.distributed import barrier, rank_and_size
from stillhouse.core.types import Response
from stillhouse.data import load_data
from stillhouse.data.datasets import DatasetField
from stillhouse.errors import ConfigError, Fault
from stillhouse.evaluate.best_of import best_of_files
from stillhouse.evaluate.preference_files import pairs_of_files
from stillhouse.evaluate.rankers import RankerField
from stillhouse.files import STAGE, write_jsonl
from stillhouse.models import ModelConfig, TeacherModel
from stillhouse.rollouts.offline.drafts import aggregate_drafts
from stillhouse.rollouts.offline.filter_files import check_filters, filter_files
from stillhouse.rollouts.offline.filters import FilterField
from stillhouse.rollouts.offline.filters.overlap import held_out_texts
from stillhouse.rollouts.offline.generation import CHUNK_SIZE
from stillhouse.rollouts.offline.samples import Sample
from stillhouse.rollouts.offline.stage_files import stage_header
from stillhouse.rollouts.offline.stored_samples import read_samples, samples_by_prompt
from stillhouse.runs.checks import preflight
from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import StageSize
from stillhouse.runs.generate import GenerateArguments, generate, written_result
from stillhouse.runs.size_facts import HERE, Machine
from stillhouse.runs.tokenizers import tokenizers
from stillhouse.runs.writing_size import writing_size

FilesField = Annotated[
    ListOf[FilePath], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""The annotation of a field that holds files, of which one needs no list."""
FILLER = "a"
"""A word of responses that are not there yet."""


class DataSection(StrictConfig):
    """What a stage that makes data does, with its options; the values of its section."""

    distributed: ClassVar[bool] = False
    """Whether several processes share the work."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it does, in a word or two."""

    @abstractmethod
    def check(self, config: RunConfig | None, machine: Machine = HERE) -> StageSize:
        """Refuse what can be refused before anything runs.

        Args:
            config: models, data and sampling, where it asks for them.
            machine: what its memory is estimated for.

        Returns:
            How much there is to do.
        """

    @abstractmethod
    def write(self, config: RunConfig | None, output: Path) -> dict[str, Any]:
        """Write the rows, from where an interrupted process has left off; what came of it, in numbers."""

    @abstractmethod
    def stand_in(self, config: RunConfig | None) -> list[dict[str, Any]]:
        """Rows of the kind that will be there, for what follows to be checked with."""

    def write_stand_in(self, config: RunConfig | None, output: Path) -> None:
        """Write `stand_in` as a file."""
        write_jsonl(output, [{STAGE: stage_header("stand-in")}, *self.stand_in(config)])

    def files(self) -> Sequence[Path]:
        """The files that it reads."""
        return ()

    def models(self, config: RunConfig | None) -> Mapping[str, ModelConfig | None]:
        """The models that it asks, by the path of the value."""
        return {}


class GenerateSection(DataSection):
    """Writes responses to the prompts of `data.train`, as `stillhouse generate`."""

    distributed: ClassVar[bool] = True
    by: Literal["teacher", "student"] = "teacher"
    """Which model writes."""
    samples: int = Field(1, ge=1)
    """Responses to each prompt."""
    limit: int | None = Field(None, ge=1)
    """At most so many prompts."""
    seed: int | None = Field(None, ge=0)
    """Default: train.seed."""
    label: str | None = None
    """The name of the generator in the rows; default: `by`."""
    score: bool = False
    """Also score each response with the model that wrote it."""
    chunk: int = Field(CHUNK_SIZE, ge=1)
    """Responses between two saves."""

    @property
    def summary(self) -> str:
        return f"generate by {self.by}"

    def check(self, config: RunConfig | None, machine: Machine = HERE) -> StageSize:
        assert config is not None
        preflight(config)
        if self.by == "teacher" and config.teacher is None:
            raise ConfigError(
                Fault("generate.by", "there is no teacher", hint="Set teacher, or generate.by: student.")
            )
        prompts = self._prompts(config)
        return writing_size(config, self.by, prompts, self.samples, machine)

    def write(self, config: RunConfig | None, output: Path) -> dict[str, Any]:
        assert config is not None
        rank, world = rank_and_size()
        options = self.model_dump(include={"by", "label", "samples", "seed", "limit", "chunk", "score"})
        arguments = GenerateArguments(output, shard=rank, shards=world, **options)
        found = generate(config, arguments)
        barrier(world)
        written = written_result(output, found.total, found.resumed)  # of all processes
        return {"rows": written.total, "tokens": written.tokens, "cut": written.truncated}

    def stand_in(self, config: RunConfig | None) -> list[dict[str, Any]]:
        assert config is not None
        by, length = self.label or self.by, config.data.max_response
        scores: dict[str, float] = {self.by: 0.0} if self.score else {}
        text = " ".join([FILLER] * length)
        prompts = self._prompts(config)
        places = [(index, prompt) for index in range(self.samples) for prompt in prompts]
        return [
            Sample(
                number, Response(prompt, prompt.token_ids[-1:] * length, self.by), text, by, scores, index
            ).to_row()
            for number, (index, prompt) in enumerate(places)
        ]

    def _prompts(self, config: RunConfig) -> Sequence[Any]:
        found = tokenizers(config)
        return load_data(config.data, found.student, teacher=found.reads).train[: self.limit]

    def models(self, config: RunConfig | None) -> Mapping[str, ModelConfig | None]:
        assert config is not None
        if self.by == "student":
            return {"student": config.student}
        return {"teacher": None if config.teacher is None else config.teacher.model_to_load()}


class CurateSection(DataSection):
    """Filters responses, or keeps the best to each prompt, or makes prompts of several, as `stillhouse
    curate`."""

    of: FilesField
    """`stage:NAME` of stages that wrote responses, or files with them."""
    filters: ListOf[FilterField] = ()
    """Filters, applied in order."""
    held_out: ListOf[DatasetField] = ()
    """Sets that must not overlap."""
    teacher: str | None = None
    """The model that scores the likelihood of responses."""
    best: RankerField | None = None
    """Instead of filtering: keep the response to each prompt that this ranker puts first."""
    drafts: int | None = Field(None, ge=2)
    """Instead of filtering: prompts that ask for the best answer, given so many responses."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("filters", "best", "drafts") if getattr(self, name)]
        if len(given) != 1:
            told = ", ".join(given) or "none"
            raise ValueError(f"needs exactly one of filters, best and drafts, got {told}")
        idle = [name for name in ("held_out", "teacher") if getattr(self, name) and not self.filters]
        if idle:
            raise ValueError(f"{idle[0]} has no effect with {given[0]}")
        return self

    @property
    def summary(self) -> str:
        if self.best is not None:
            return f"curate, best by {self.best.kind}"
        return "curate into drafts" if self.drafts else "curate"

    def check(self, config: RunConfig | None, machine: Machine = HERE) -> StageSize:
        by_source = read_samples(self.of)
        if self.filters:
            with _as_values():
                check_filters(by_source, self.filters, held_out_texts(self.held_out), self._teacher)
        return _read(sum(map(len, by_source.values())))

    def write(self, config: RunConfig | None, output: Path) -> dict[str, Any]:
        if self.best is not None:
            best = best_of_files(self.of, self.best, output)
            return {"rows": best.kept, "prompts": best.prompts, "left out": dict(best.left_out)}
        if self.drafts is not None:
            made = aggregate_drafts(self.of, self.drafts, output)
            return {"rows": made.rows, "left out": dict(made.left_out)}
        found = filter_files(
            self.of, self.filters, output, held_out=held_out_texts(self.held_out), teacher=self._teacher
        )
        dropped = {f"{source}, {one}: {reason}": count for source, one, reason, count in found.counts}
        return {"rows": found.kept, "prompts": found.prompts, "dropped": dropped}

    def stand_in(self, config: RunConfig | None) -> list[dict[str, Any]]:
        found = (one for samples in read_samples(self.of).values() for one in samples)
        return [replace(one, number=number).to_row() for number, one in enumerate(found)]

    def files(self) -> Sequence[Path]:
        return self.of

    @property
    def _teacher(self) -> TeacherModel | None:
        return None if self.teacher is None else TeacherModel(path=self.teacher)

    def models(self, config: RunConfig | None) -> Mapping[str, ModelConfig | None]:
        return {"curate.teacher": self._teacher}


class PairsSection(DataSection):
    """Ranks the responses to each prompt; best and worst are a preference pair, as `stillhouse pairs`."""

    of: FilesField
    """`stage:NAME` of stages that wrote responses, or files with them."""
    rank: RankerField
    """What makes one response better."""
    min_margin: float = Field(0.0, ge=0)
    """A pair needs a greater difference of scores."""

    @property
    def summary(self) -> str:
        return f"pairs by {self.rank.kind}"

    def check(self, config: RunConfig | None, machine: Machine = HERE) -> StageSize:
        return _read(sum(map(len, read_samples(self.of).values())))

    def write(self, config: RunConfig | None, output: Path) -> dict[str, Any]:
        found = pairs_of_files(self.of, self.rank, output, min_margin=self.min_margin)
        return {"rows": found.pairs, "mean margin": found.mean_margin, "left out": dict(found.left_out)}

    def stand_in(self, config: RunConfig | None) -> list[dict[str, Any]]:
        _, groups = samples_by_prompt(self.of)
        return [
            {
                "number": number,
                **group[0].response.prompt.as_fields(),
                "chosen": group[0].text or FILLER,
                "rejected": f"not {group[0].text}",
            }
            for number, group in enumerate(groups)
        ]

    def files(self) -> Sequence[Path]:
        return self.of


def _read(responses: int) -> StageSize:
    """The size of a stage that reads responses. What its memory is depends on filters and rankers."""
    return StageSize({"responses to read": responses}, {"responses_to_read": responses})


@contextlib.contextmanager
def _as_values() -> Iterator[None]:
    """Name the options of `stillhouse curate` in a fault as the values of the section."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            *(
                replace(fault, path=WORDS[word], hint=f"Set {WORDS[word]}.")
                if isinstance(fault, Fault) and (word := fault.path.split()[0]) in WORDS
                else fault
                for fault in error.faults
            )
        ) from error


WORDS = {"--filter": "curate.held_out", "--teacher": "curate.teacher"}
"""Options of `stillhouse curate` in faults, and the values that are missing then."""
SECTIONS: Mapping[str, type[DataSection]] = {
    "generate": GenerateSection,
    "curate": CurateSection,
    "pairs": PairsSection,
}
"""By the key in the stage that asks for it."""
