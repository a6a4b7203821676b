"""Options that were set and change nothing in this run: each part says so of its own, the run of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stillhouse.config import StrictConfig, because, dotted, walk
from stillhouse.config.trees import leaves, plain
from stillhouse.core.requirements import teacher_path
from stillhouse.engines import Sampling
from stillhouse.files import locate
from stillhouse.objectives import Objective
from stillhouse.runs.config import RunConfig

DERIVED = ("default", "engine.sampling.max_tokens", "data.max_response")
"""Origins of values that nobody has set."""


def without_effect(config: RunConfig) -> dict[str, str]:
    """The options that change nothing in this run, by path, each with the reason. What stands for a section
    stands for everything in it."""
    found: dict[str, str] = {}

    def visit(path: str, value: Any) -> Any:
        if isinstance(value, StrictConfig):
            own = value.options_without_effect().items()
            found.update({f"{path}.{name}" if path else name: reason for name, reason in own})
        return value

    walk(config, visit)
    for rule in (_of_generation, _of_validation, _of_evaluation, _of_the_rest):
        found |= rule(config)
    return found


def notes(config: RunConfig, provenance: Mapping[str, Mapping[str, Any]], recipe: str) -> Iterator[str]:
    """A sentence for each option that a user has set to another value than its default, in vain.

    Args:
        config: the run.
        provenance: value and origin of each option.
        recipe: how the origin of a recipe's values begins; these a user has not set.
    """
    inert, defaults = without_effect(config), _defaults(config)
    for path, fact in provenance.items():
        origin = str(fact["origin"])
        reason = next((why for name, why in inert.items() if _within(path, name)), None)
        set_by_user = origin not in DERIVED and not origin.startswith(recipe)
        if reason is not None and set_by_user and defaults.get(path, _NONE) != fact["value"]:
            yield f"{path}={fact['value']} ({origin}) has no effect: {reason}"


def same_models(config: RunConfig) -> Iterator[str]:
    """A teacher that is the student's own start: a loss of zero, unless the two read different prompts.

    A student that is quantised is another model than what it starts from.
    """
    if config.student.path is None or config.student.quantise is not None:
        return
    start, compared = locate(config.student.path).resolve(), _compared_teachers(config)
    for name, teacher in config.all_teachers.items():
        model = teacher.model_to_load()
        if (
            name in compared
            and model is not None
            and model.adapter is None
            and locate(model.path).resolve() == start
        ):
            yield (
                f"student and {teacher_path(name)} are the same model, {config.student.path}: where both "
                "read the same prompt there is nothing to learn"
            )


def _compared_teachers(config: RunConfig) -> set[str]:
    """The teachers that a loss pulls the student to; not those that only play the reference."""
    found: set[str] = set()

    def visit(_: str, value: Any) -> Any:
        if isinstance(value, Objective) and not hasattr(value, "held"):
            judged = value.requirements().rows & {"rewards", "pairs"}  # there the teacher only holds it back
            found.update(() if judged else (value.teacher_model,))
        return value

    walk(config.objective, visit)
    return found


_NONE = object()


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith((f"{name}.", f"{name}["))


def _defaults(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(path: str, value: Any) -> Any:
        if isinstance(value, StrictConfig):
            for name, info in type(value).model_fields.items():
                where = f"{path}.{name}" if path else name
                if info.is_required() or (name == "kind" and where in found):
                    continue
                default = plain(info.get_default(call_default_factory=True))
                found[where] = default
                if isinstance(default, dict):  # of a section: its kind, and values that its class has not
                    found.update({f"{where}.{dotted(inner)}": leaf for inner, leaf in leaves(default)})
        return value

    walk(config, visit)
    return found


def _generates(config: RunConfig) -> bool:
    """Whether a model of this run writes text to train on."""
    return any("text" in need.signals for need in config.responses.requirements().models)


def _of_generation(config: RunConfig) -> dict[str, str]:
    validates = config.data.valid is not None and config.train.validate_every != "never"
    scored = validates and config.train.validate_rouge
    if not (_generates(config) or config.evaluation_sets() or config.evaluate.tasks or scored):
        return because("nothing in this run generates text", "engine")
    if not _generates(config):
        return because("no text is generated to train on; the evaluation has its own", "engine.sampling")
    own, open_to_default = _samplings(config)
    if own and not open_to_default:
        return because(f"{own[0]} holds for what is generated", "engine.sampling")
    return {}


def _samplings(config: RunConfig) -> tuple[list[str], list[str]]:
    """The samplings of the responses, by path: those that are set, and those that follow the engine's."""
    own: list[str] = []
    follow: list[str] = []

    def visit(path: str, value: Any) -> Any:
        inert = value.options_without_effect() if isinstance(value, StrictConfig) else {}
        for name in type(value).model_fields if isinstance(value, StrictConfig) else ():
            if name.endswith("sampling") and name not in inert:
                where = own if isinstance(getattr(value, name), Sampling) else follow
                where.append(f"{path}.{name}")
        return value

    walk(config.responses, visit, "responses")
    return own, follow


def _of_validation(config: RunConfig) -> dict[str, str]:
    if config.data.valid is None:
        names = ("train.validate_every", "train.validate_rouge", "evaluate.valid_limit")
        return because("there is no data.valid", *names)
    if config.train.validate_every == "never":
        return because("train.validate_every is never", "evaluate.valid_limit")
    return {}


def _of_evaluation(config: RunConfig) -> dict[str, str]:
    found, one = {}, config.evaluate
    if not config.evaluation_sets() and not one.tasks:
        names = ("sampling", "seeds", "limit", "before", "teacher", "batch_size")
        found = because("there is nothing to evaluate on", *(f"evaluate.{name}" for name in names))
    elif one.sampling.temperature == 0 and not one.tasks and len(one.seeds) > 1:
        found = because("every seed gives the same greedy text", "evaluate.seeds")
    if config.teacher is None:
        found |= because("there is no teacher", "evaluate.teacher")
    return found


def _of_the_rest(config: RunConfig) -> dict[str, str]:
    found = because("it weighs terms of a sum or sources, and stands alone", "objective.loss_weight")
    asked = config.objective.requirements().rows
    if "teachers" not in asked:
        found |= because("the objective does not go by the teacher of a row", "data.row_teacher")
    if "rewards" not in asked:
        found |= because("no objective has a weight for rewards", "responses.reward_model")
    if config.data.text is None:
        found |= because("there is no data.text", "data.text_block")
    if config.train.fused.backend == "triton" and not config.objective.has_kernel:
        found |= because("no part of the objective has a Triton kernel", "train.fused.backend")
    return found
