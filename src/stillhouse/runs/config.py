"""The whole configuration of a run: one tree, checked before anything loads."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from stillhouse.config import FilePath, StrictConfig, walk
from stillhouse.data import DataConfig
from stillhouse.engines import EngineField, TransformersConfig
from stillhouse.errors import Fault
from stillhouse.evaluate import EvaluateConfig
from stillhouse.models import StudentConfig
from stillhouse.objectives import REGISTRY as OBJECTIVES
from stillhouse.objectives import Objective, ObjectiveField
from stillhouse.objectives.combined import BySource
from stillhouse.objectives.contrastive import Contrastive
from stillhouse.objectives.policy_gradient import PolicyGradient
from stillhouse.rollouts import ResponsesField
from stillhouse.rollouts.fixed import Fixed
from stillhouse.schedules import DevLoss
from stillhouse.teachers import TeacherField
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
    report: bool = True
    """Write report.html at the end."""
    licence: LicenceConfig = LicenceConfig()
    """Licences that the student's card names, where they are not found in the cards beside the files."""


class RunConfig(StrictConfig):
    """One distillation run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of the run, of its folder and its row in tables."""
    recipe: str | None = None
    """The recipe that was the starting point; its values lie beneath those of the file."""
    student: StudentConfig
    """The model to train."""
    teacher: TeacherField | None = None
    """The model to learn from; none for supervised fine-tuning."""
    data: DataConfig
    """Prompts and responses."""
    engine: EngineField = TransformersConfig()
    """What writes text, and how it samples by default."""
    responses: ResponsesField = Fixed()
    """Whose responses the student is trained on."""
    objective: ObjectiveField
    """What is compared, for all responses or by source; a recipe sets it."""
    train: TrainConfig = TrainConfig()
    """How the student is optimised."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How teacher and student are compared at the end."""
    output: OutputConfig = OutputConfig()
    """Where the files go."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        faults = list(mismatches(self))
        if faults:
            raise Mismatch(faults)
        return self


class Mismatch(ValueError):
    """Parts that are right by themselves do not fit together."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("; ".join(map(str, faults)))


def mismatches(config: RunConfig) -> list[Fault]:
    """What one part of the configuration asks for and no other gives."""
    faults: list[Fault] = []
    objective: Objective = config.objective
    sources = set(config.responses.sources()) | ({"text"} if config.data.text is not None else set())
    mapped = list(objective.mapped()) if isinstance(objective, BySource) else None
    if isinstance(objective, Contrastive):
        mapped = ["teacher", "student"]
    if mapped is not None:
        faults += [
            Fault(
                "objective",
                f"says nothing about {source}-written responses, "
                f"which responses.kind={config.responses.kind} gives",
                got=", ".join(mapped),
                hint=f"Add objective.{source}.",
            )
            for source in sorted(sources - set(mapped))
        ]
        unused = sorted(set(mapped) - sources)
        faults += [
            Fault(
                f"objective.{source}",
                f"never applies: responses.kind={config.responses.kind} gives no {source}-written responses",
                allowed=", ".join(sorted(sources)),
            )
            for source in unused
        ]
    provided: frozenset[str] = config.teacher.provides if config.teacher is not None else frozenset()
    if "teacher" in objective.required and not objective.forms & provided:
        faults.append(_no_signal(config, provided))
    if objective.depths and "layers" not in provided:
        faults.append(_no_teacher(config, f"objective={objective.name} compares hidden states of layers"))
    if "teacher" in config.responses.writers() and "text" not in provided:
        faults.append(
            _no_teacher(
                config, f"responses.kind={config.responses.kind} trains on text that the teacher writes"
            )
        )
    if "teacher_logprob" in config.responses.needs() and "distribution" not in provided:
        faults.append(
            _no_teacher(config, "responses.filters and scores ask how likely the teacher finds a text")
        )
    model = config.teacher.model_to_load() if config.teacher is not None else None
    if config.student.from_teacher is not None and model is None:
        faults.append(_no_teacher(config, "student.from_teacher starts from the teacher's layers"))
    if config.responses.together() and model is None and "text" in provided:
        faults.append(
            _no_teacher(
                config,
                f"responses.kind={config.responses.kind} draws from student and teacher together, which "
                "takes both in this process",
            )
        )
    faults += _without_validation(config) + _sampled_otherwise(config) + _never_begins(config)
    capacity = getattr(config.responses, "capacity", None)
    if capacity is not None and capacity < config.train.batch_size:
        faults.append(
            Fault(
                "responses.capacity",
                "a batch cannot be drawn from a buffer that is smaller than it",
                got=str(capacity),
                allowed=f"at least train.batch_size ({config.train.batch_size})",
            )
        )
    if config.train.keep == "best" and (config.data.valid is None or config.train.validate_every == "never"):
        faults.append(
            Fault(
                "train.keep",
                "best needs validation",
                hint="Set data.valid and train.validate_every, or keep: last.",
            )
        )
    return faults


def _without_validation(config: RunConfig) -> list[Fault]:
    """A schedule that follows the validation loss, and nothing that measures it."""
    if config.data.valid is not None and config.train.validate_every != "never":
        return []
    found: list[str] = []

    def visit(path: str, value: Any) -> Any:
        if isinstance(value, DevLoss):
            found.append(path)
        return value

    walk({"responses": config.responses, "objective": config.objective}, visit)
    return [
        Fault(
            path,
            "kind dev_loss follows the loss on data.valid, which is never measured",
            got="no data.valid" if config.data.valid is None else "train.validate_every=never",
            hint=f"Set data.valid and train.validate_every, or {path} to a number or a linear schedule.",
        )
        for path in found
    ]


def _never_begins(config: RunConfig) -> list[Fault]:
    """A rule for alpha that begins after the last epoch; where max_steps decides, the length is not known."""
    faults: list[Fault] = []

    def visit(path: str, value: Any) -> Any:
        gap = isinstance(value, Contrastive) and value.alpha_rule == "gap"
        if gap and config.train.max_steps is None and value.rule_after >= config.train.epochs:
            faults.append(
                Fault(
                    f"{path}.rule_after",
                    "alpha_rule: gap would begin after the end of the training",
                    got=f"{value.rule_after:g}, with train.epochs={config.train.epochs:g}",
                    allowed=f"less than {config.train.epochs:g}",
                    hint=f"Train for more epochs, or set {path}.alpha_rule: fixed.",
                )
            )
        return value

    walk({"objective": config.objective}, visit)
    return faults


def _sampled_otherwise(config: RunConfig) -> list[Fault]:
    """Policy gradients that assume another sampling than the responses come from; they would be biased."""
    faults: list[Fault] = []
    share = float(getattr(config.responses, "teacher_share", 0.0))
    sampling = getattr(config.responses, "sampling", None) or config.engine.sampling
    text = {"text"} if config.data.text is not None else set()

    def visit(path: str, value: Any) -> Any:
        if isinstance(value, PolicyGradient) and value.sampling_teacher_share != share:
            faults.append(
                Fault(
                    f"{path}.sampling_teacher_share",
                    "must be the teacher's share in the text that is trained on",
                    got=str(value.sampling_teacher_share),
                    allowed=f"{share:g}, as responses.kind={config.responses.kind} writes",
                    hint="Set both to the same number (on_policy and batched responses have teacher_share).",
                )
            )
        of = path.split(".")[1] if isinstance(config.objective, BySource) and "." in path else None
        others = (config.responses.sources() | text if of is None else {of}) - {"student"}
        if isinstance(value, PolicyGradient) and others:
            faults.append(
                Fault(
                    path,
                    "policy_gradient is for text that the student has sampled; on other text it is biased",
                    got=", ".join(sorted(others)),
                    hint="Map it to the student's text alone, objective: {student: {kind: policy_gradient}, "
                    f"{min(others)}: ...}}, or set responses.kind to on_policy or batched.",
                )
            )
        return value

    walk({"objective": config.objective}, visit)
    if "sampled_logprobs" in config.objective.required and not sampling.logprobs:
        faults.append(
            Fault(
                "responses.sampling.logprobs",
                f"objective={config.objective.name} needs the log-probabilities of the tokens when sampled",
                got="false",
                hint="Set it to true.",
            )
        )
    return faults


def _no_signal(config: RunConfig, provided: frozenset[str]) -> Fault:
    """An objective that the teacher's signal is not enough for, with the parts of it that ask for more."""
    compact = sorted(provided & {"topk", "sampled"})
    if not compact or config.teacher is None:
        return _no_teacher(
            config, f"objective={config.objective.name} compares with the teacher's distribution"
        )
    asking: dict[str, str] = {}

    def visit(path: str, value: Any) -> Any:
        if isinstance(value, Objective) and not value.forms & provided and path not in asking:
            asking[path] = value.name
        return value

    walk({"objective": config.objective}, visit)
    innermost = [path for path in asking if not any(o.startswith(path + ".") for o in asking)]
    enough = [kind for kind in OBJECTIVES.kinds() if OBJECTIVES[kind].teacher_forms & provided]
    return Fault(
        innermost[0] if innermost else "objective",
        f"{asking[innermost[0]] if innermost else config.objective.name} cannot be computed from "
        f"{SIGNALS[compact[0]]}, which is all that teacher.kind={config.teacher.kind} gives",
        allowed=", ".join(sorted({*enough, "forward_kl"})),
        hint="Take a teacher that gives whole distributions (kind: live, or kind: cache with store: hidden), "
        "or another objective.",
    )


SIGNALS = {
    "topk": "the most probable tokens and the mass of the rest",
    "sampled": "weighted random draws",
}
"""What the compact forms are, for people."""


def _no_teacher(config: RunConfig, why: str) -> Fault:
    got = "no teacher" if config.teacher is None else f"teacher.kind={config.teacher.kind}"
    return Fault("teacher", f"{why}", got=got, hint="Set teacher: {kind: live, path: FOLDER}.")
