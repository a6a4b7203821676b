"""The whole configuration of a run: one tree, checked before anything loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

from pydantic import Field, model_validator

from stillhouse.config import FilePath, StrictConfig
from stillhouse.core.requirements import (
    EVERY_ROW,
    MAIN,
    SIGNALS,
    STUDENT,
    Provisions,
    Requirements,
    RunFacts,
    teacher_path,
)
from stillhouse.data import DataConfig, DatasetConfig
from stillhouse.engines import EngineField, TransformersConfig
from stillhouse.errors import Fault
from stillhouse.evaluate import EvaluateConfig
from stillhouse.models import Dtype, StudentConfig
from stillhouse.objectives import ObjectiveField
from stillhouse.rollouts import DEFAULT_RESPONSES, ResponsesField
from stillhouse.runs.compatibility import (
    unfit_for_other_texts,
    unfit_sources,
    unknown_teachers,
    unmet,
    unskippable,
    unused_teachers,
)
from stillhouse.teachers import TeacherConfig, TeacherField
from stillhouse.train.config import TrainConfig


class LicenceConfig(StrictConfig):
    """Licences by their identifier on the Hugging Face hub, such as apache-2.0, or in words."""

    student: str | None = None
    """Under which the student is passed on."""
    teacher: str | None = None
    """Of the teacher; default: what its card says."""
    data: str | None = None
    """Of the data; default: what the card beside the file says."""


class OutputConfig(StrictConfig):
    """Where a run leaves its files."""

    folder: FilePath | None = None
    """The run folder; default: runs/NAME. An existing one is refused unless the run is resumed."""
    shared: FilePath | None = None
    """A folder in which several runs keep what does not differ between them: the teacher's texts, and the
    evaluations of the teacher and of the student before. Whichever run needs one first makes it."""
    report: bool = True
    """Write report.html at the end."""
    dtype: Dtype = "auto"
    """The dtype of the exported weights; "auto": that of the training, `student.dtype`. The student that is
    evaluated has the weights that are exported, rounded alike."""
    draft: bool = False
    """Export the student as a draft model of the teacher, for speculative decoding: with as many rows in its
    vocabulary as the teacher has, padding included, as vLLM and transformers ask."""
    licence: LicenceConfig = LicenceConfig()
    """Licences that the student's card names, where they are not found in the cards beside the files."""

    def requirements(self) -> Requirements:
        """Of a draft model: the teacher's weights, and its tokenizer."""
        if not self.draft:
            return Requirements()
        return replace(Requirements.of(MAIN, "weights"), same_tokenizer=frozenset({MAIN}))


class RunConfig(StrictConfig):
    """One distillation run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of the run, of its folder and its row in tables."""
    recipe: str | None = None
    """The recipe that was the starting point; its values lie beneath those of the file."""
    student: StudentConfig
    """The model to train."""
    teacher: TeacherField | None = None
    """The model to learn from, short for `teachers: {main: ...}`; none for supervised fine-tuning."""
    teachers: dict[str, TeacherField] = Field(default_factory=dict)
    """Further models by name: a `reference`, or teachers of one domain each. Objectives name them."""
    data: DataConfig
    """Prompts and responses."""
    engine: EngineField = TransformersConfig()
    """What writes text, and how it samples by default."""
    responses: ResponsesField = DEFAULT_RESPONSES
    """Whose responses the student is trained on."""
    objective: ObjectiveField
    """What is compared, for all responses or by source. A `recipe` (a name of `stillhouse methods`) sets
    it."""
    train: TrainConfig = TrainConfig()
    """How the student is optimised."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How teacher and student are compared at the end."""
    output: OutputConfig = OutputConfig()
    """Where the files go."""

    @model_validator(mode="before")
    @classmethod
    def _main_teacher(cls, value: Any) -> Any:
        """`teachers: {main: ...}` is `teacher: ...`."""
        teachers = value.get("teachers") if isinstance(value, dict) else None
        if not isinstance(teachers, dict) or MAIN not in teachers:
            return value
        if value.get("teacher") is not None:
            raise ValueError("teacher and teachers.main are the same model; give one of them")
        others = {name: one for name, one in teachers.items() if name != MAIN}
        return {**value, "teacher": teachers[MAIN], "teachers": others}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        faults = [*self._incompatible(), *self._without_validation()]
        if faults:
            raise Mismatch(faults)
        return self

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """Every teacher by its name; `teacher` is `main`."""
        main = {} if self.teacher is None else {MAIN: self.teacher}
        return {**main, **self.teachers}

    @property
    def stating_parts(self) -> dict[str, Any]:
        """The parts that state requirements, by their path."""
        parts = {"responses": self.responses, "objective": self.objective, "output.draft": self.output}
        if self.student.from_teacher is not None:
            parts["student.from_teacher"] = self.student.from_teacher
        return parts | {f"evaluate.tasks[{i}]": task for i, task in enumerate(self.evaluate.tasks)}

    @property
    def requirements(self) -> Requirements:
        """What all parts together ask."""
        return Requirements.union(part.requirements() for part in self.stating_parts.values())

    @property
    def provisions(self) -> Provisions:
        """What teachers, data, responses and training give."""
        measured = {"train_loss"}
        if self.data.valid is not None and self.train.validate_every != "never":
            measured.add("dev_loss")
        if self.objective.sources is not None:  # only where sources are told apart can a gap be asked for
            measured |= {"teacher_gap", "student_gap"}
        return Provisions(
            models={
                STUDENT: frozenset(SIGNALS),
                **{name: teacher.signals for name, teacher in self.all_teachers.items()},
            },
            rows=EVERY_ROW | self.responses.row_facts(self.engine.sampling),
            data=frozenset(
                {"responses", "rejected", "reasoning", "evaluation_texts"}
            ),  # found out when rows are read
            measured=frozenset(measured),
        )

    @property
    def facts(self) -> RunFacts:
        """What parts may ask about the run."""
        text = {"text"} if self.data.text is not None else set()
        return RunFacts(
            sources=frozenset(self.responses.sources() | text),
            responses=self.responses.kind,
            epochs=self.train.epochs,
            batch_size=self.train.batch_size,
            max_steps=self.train.max_steps,
            sampling_teacher_share=self.responses.sampling_teacher_share(),
            altered_sampling=(getattr(self.responses, "sampling", None) or self.engine.sampling).altered,
        )

    def _incompatible(self) -> Iterator[Fault]:
        """What one part of the configuration asks for and no other gives."""
        parts, facts = self.stating_parts, self.facts
        kinds = {name: teacher.kind for name, teacher in self.all_teachers.items()}
        yield from unfit_sources(self.objective, facts.sources, self.responses.kind)
        yield from unfit_for_other_texts(self.objective, facts.sources)
        yield from unmet(parts, self.provisions, kinds)
        yield from unused_teachers(frozenset(self.teachers), parts)
        skipping = [name for name, teacher in self.all_teachers.items() if teacher.skips_rows]
        yield from unskippable(self.objective, facts.sources, skipping, self.responses.kind)
        if self.data.row_teacher is not None:
            yield from unknown_teachers(self.data.row_teacher.names, kinds)
        yield from self.objective.check_in_run("objective", facts)
        yield from self.responses.check_in_run("responses", facts)
        yield from self._unfit_contexts()
        yield from self._unfit_for_quantised_weights()
        yield from self._unfit_for_a_draft()

    def _unfit_for_a_draft(self) -> Iterator[Fault]:
        """What leaves a student that cannot draft for its teacher."""
        student = self.student
        if not self.output.draft:
            return
        if student.lora is not None and not student.lora.merge:
            yield Fault(
                "output.draft",
                "a draft model is one whole model, and adapters are to leave apart",
                got="student.lora.merge=false",
                hint="Set student.lora.merge: true"
                + (", without student.quantise." if student.quantise else "."),
            )
        if student.from_teacher is not None and student.from_teacher.vocabulary != "all":
            yield Fault(
                "output.draft",
                "a draft model needs all tokens of its target",
                got=f"student.from_teacher.vocabulary={student.from_teacher.vocabulary}",
                hint="Set student.from_teacher.vocabulary: all.",
            )

    def _unfit_for_quantised_weights(self) -> Iterator[Fault]:
        """What reads or writes weights otherwise than a quantised student has them."""
        quantise = self.student.quantise
        if quantise is None:
            return
        why = f"cannot be combined with student.quantise ({quantise.weights})"
        if self.train.compile_models:
            yield Fault("train.compile_models", f"{why}: the compiler was not tried with such layers")
        for name in ("fsdp", "deepspeed"):
            if self.train.hf.get(name):
                yield Fault(f"train.hf.{name}", f"{why}: integers and their scales cannot be cut into shards")
        if quantise.qat:
            return
        if self.engine.casts_weights:
            yield Fault("engine.dtype", f"{why}: it casts a copy of the weights", hint="Set student.dtype.")
        if self.output.dtype not in ("auto", self.student.dtype):
            yield Fault("output.dtype", f"{why}: scales keep their dtype", hint="Set student.dtype.")

    def _unfit_contexts(self) -> Iterator[Fault]:
        """Prompts of teachers that there are not, or that write together with the student."""
        contexts, path = self.data.teacher_context, "data.teacher_context"
        for name in contexts:
            if name not in self.all_teachers:
                yield Fault(
                    path, f"no teacher is called {name!r}", allowed=", ".join(self.all_teachers) or "none"
                )
        if MAIN in contexts and MAIN in self.responses.requirements().same_tokenizer:
            yield Fault(
                path,
                "student and teacher write a text together, so they read one prompt",
                got=f"responses.kind={self.responses.kind}",
                hint="Remove it, or choose responses that each model writes alone.",
            )
        for name, teacher in self.all_teachers.items():
            own = name in contexts or (name == MAIN and self.data.teacher_template is not None)
            yield from teacher.check_in_run(teacher_path(name), own)

    def _without_validation(self) -> Iterator[Fault]:
        if self.train.keep == "best" and (self.data.valid is None or self.train.validate_every == "never"):
            yield Fault(
                "train.keep",
                "best needs validation",
                hint="Set data.valid and train.validate_every, or keep: last.",
            )

        if self.train.keep == "best" and self.train.best_by == "rouge_l" and not self.train.validate_rouge:
            yield Fault(
                "train.best_by",
                "rouge_l is not measured with train.validate_rouge: false",
                got="rouge_l",
                hint="Set train.best_by: loss, or train.validate_rouge: true.",
            )

    def evaluation_sets(self) -> tuple[DatasetConfig, ...]:
        """Every set of rows that a student of this run is evaluated on."""
        tasks = [source for task in self.evaluate.expanded_tasks() for source in task.datasets().values()]
        named = (self.data.valid, self.evaluate.data, *tasks)
        return tuple(source for source in named if source is not None)


class Mismatch(ValueError):
    """Parts that are right by themselves do not fit together."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("; ".join(map(str, faults)))
