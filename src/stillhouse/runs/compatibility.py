"""Whether the parts of a run fit together: what each requires against what the others provide.

Knows no objective, policy or teacher by name. Each fault names the innermost part that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from stillhouse.config import walk
from stillhouse.core.requirements import (
    LOGPROBS,
    SIGNALS,
    ModelNeed,
    Provisions,
    Requirements,
    teacher_path,
)
from stillhouse.errors import ConfigError, Fault
from stillhouse.objectives import Objective, build, kinds

MEASURED = {
    "dev_loss": ("the loss on data.valid", "Set data.valid and train.validate_every"),
    "teacher_gap": ("the likelihood gap of teacher-written text", "Set the objective's alpha_rule: gap"),
    "student_gap": ("the likelihood gap of student-written text", "Set the objective's alpha_rule: gap"),
}
"""What a schedule may follow, in words, and what makes it measured."""
ROWS = {
    "pairs": (
        "two responses to each prompt to compare",
        "Take responses.kind: pairs (of the teacher and the student) or preference_pairs (of the data).",
    ),
    "rewards": (
        "the reward of each response",
        "Set responses.reward_model to a reward model, with responses.kind on_policy or batched.",
    ),
    "sampled_logprobs": (
        "the log-probabilities of the tokens when sampled",
        "Set responses.sampling.logprobs: true.",
    ),
}
"""Facts on rows that not every run has, in words, and the way out."""


def unmet(parts: Mapping[str, Any], given: Provisions, teachers: Mapping[str, str]) -> Iterator[Fault]:
    """A fault for everything that a part requires and nothing provides.

    Args:
        parts: the parts of a run that state `requirements`, by path.
        given: what the run provides.
        teachers: the kind of each teacher that there is, by its name.
    """
    for path, part in parts.items():
        missing = part.requirements().missing(given)
        for need in sorted(missing.models, key=lambda need: need.model):
            where, asking = _innermost(path, part, partial(_asks_model, need))
            yield _without_signal(where, asking, need, given, teachers)
        for fact in sorted(missing.rows):
            where, asking = _innermost(path, part, partial(_asks_rows, fact))
            words, hint = ROWS[fact]
            yield Fault(where, f"{_name(asking)} needs {words}, which the responses do not bring", hint=hint)
        for where, inner in _stating(path, part):
            for metric in sorted(inner.requirements().measured - given.measured):
                words, hint = MEASURED[metric]
                yield Fault(
                    where,
                    f"{_name(inner)} follows {words}, which is never measured",
                    hint=f"{hint}, or {where} to a number or a linear schedule.",
                )


def innermost_asking(
    parts: Mapping[str, Any], asks: Callable[[Requirements], bool]
) -> Iterator[tuple[str, Any]]:
    """Of each part whose requirements satisfy `asks`, the part deepest within it that does, with its path."""
    for path, part in parts.items():
        if asks(part.requirements()):
            yield _innermost(path, part, asks)


def unfit_sources(objective: Objective, sources: frozenset[str], responses: str) -> Iterator[Fault]:
    """Text that the objective says nothing about, and objectives for text that never comes.

    Args:
        objective: of the run.
        sources: who writes the text that is trained on.
        responses: the kind of the response policy.
    """
    told_apart = objective.sources or ()
    if objective.sources is None and "text" in sources and objective.requirements().model_names:
        yield Fault(
            "objective",
            "would compare data.text with the teacher too, in one mean with the responses",
            hint="Give one for each source, such as objective: {"
            + ", ".join(f"{one}: {{...}}" for one in sorted(sources - {"text"}))
            + ", text: {kind: cross_entropy}}.",
        )
    for source in sorted(sources):
        if objective.for_source(source) is None:
            yield Fault(
                "objective",
                f"says nothing about {source}-written responses, which responses.kind={responses} gives",
                got=", ".join(told_apart),
                hint=f"Add objective.{source}.",
            )
    for source in sorted(set(told_apart) - sources):
        yield Fault(
            f"objective.{source}",
            f"never applies: responses.kind={responses} gives no {source}-written responses",
            allowed=", ".join(sorted(sources)),
        )


def unfit_for_other_texts(objective: Objective, sources: frozenset[str]) -> Iterator[Fault]:
    """What compares token with token where the teacher reads another text beside the student's."""
    found = objective.for_source("direct") if "direct" in sources else None
    if found is None:
        return
    path = "objective" if objective.sources is None else "objective.direct"
    for where, part in _stating(path, found):
        if part.needs_teacher and part.granularity != "sequence" and not hasattr(part, "held"):
            whole = [one.name for one in _by_default() if one.needs_teacher and one.granularity == "sequence"]
            yield Fault(
                where,
                "the teacher reads the response with its chain beside these answers, so only whole texts can "
                "be compared",
                got=part.name,
                allowed=", ".join(sorted(whole)),
            )


def unused_teachers(names: frozenset[str], parts: Mapping[str, Any]) -> Iterator[Fault]:
    """Further teachers that nothing asks for; the main one is compared with in the evaluation anyway."""
    asked = Requirements.union(part.requirements() for part in parts.values()).model_names
    for name in sorted(names - asked):
        yield Fault(
            f"teachers.{name}",
            "no objective asks for it",
            hint=f"Name it by teacher_model or reference_model: {name}, or remove it.",
        )


def unskippable(
    objective: Objective, sources: frozenset[str], skipping: Sequence[str], responses: str
) -> Iterator[Fault]:
    """Teachers that skip what they do not know, and are asked about text that is no row of the data set."""
    for name in skipping:
        others = sorted(one for one in sources - {"fixed"} if name in objective.teachers_of(one, name))
        if others:
            yield Fault(
                f"{teacher_path(name)}.on_miss",
                "skip leaves out rows of the data set, and it is asked about other text too",
                got=f"responses.kind={responses} with {', '.join(others)}",
                hint="Set responses: fixed, or on_miss: error.",
            )


def unknown_teachers(names: frozenset[str], teachers: Mapping[str, str]) -> Iterator[Fault]:
    """Teachers that rows are given to by `data.row_teacher` and that are not there."""
    for name in sorted(names - teachers.keys()):
        yield Fault(
            "data.row_teacher",
            f"gives rows to the teacher {name!r}, which the run does not have",
            allowed=", ".join(teachers) or "none",
            hint=f"Add {teacher_path(name)}, or name another one.",
        )


def _without_signal(
    path: str, part: Any, need: ModelNeed, given: Provisions, teachers: Mapping[str, str]
) -> Fault:
    """A model that is missing, or does not give what is asked of it."""
    where = teacher_path(need.model)
    provided = given.models.get(need.model, frozenset())
    got = f"{where}.kind={teachers[need.model]}" if need.model in teachers else f"no {where}"
    sparse = sorted(provided & LOGPROBS)
    if need.signals & LOGPROBS and sparse and isinstance(part, Objective):
        return Fault(
            path,
            f"{_name(part)} cannot be computed from {SIGNALS[sparse[0]]}, which is all that {got} gives",
            allowed=", ".join(_computable(provided)),
            hint="Take a teacher that gives whole distributions (kind: live, or kind: cache with store: "
            "hidden), or another objective.",
        )
    return Fault(
        path,
        f"{_name(part)} needs {need.words} from {where}",
        got=got,
        hint=f"Set {where}: {{kind: live, path: FOLDER}}.",
    )


def _computable(signals: frozenset[str]) -> list[str]:
    """The objectives that can be computed from these signals of a teacher, as they are by default."""
    return sorted(
        objective.name
        for objective in _by_default()
        if objective.needs_teacher and not objective.other_models and objective.forms & signals
    )


def _by_default() -> Iterator[Objective]:
    """Each objective as it is by default."""
    for kind in kinds():
        with suppress(ConfigError):  # those that hold others have no default
            yield build(kind)


def _stating(path: str, part: Any) -> Iterator[tuple[str, Any]]:
    """A part and all parts within it that state requirements, by path."""
    found: list[tuple[str, Any]] = []

    def visit(where: str, value: Any) -> Any:
        if hasattr(value, "requirements"):
            found.append((where, value))
        return value

    walk(part, visit, path)
    return iter(found)


def _asks_model(need: ModelNeed, requirements: Requirements) -> bool:
    return need in requirements.models


def _asks_rows(fact: str, requirements: Requirements) -> bool:
    return fact in requirements.rows


def _innermost(path: str, part: Any, asks: Callable[[Requirements], bool]) -> tuple[str, Any]:
    """The part deepest within `part` whose requirements satisfy `asks`, with its path."""
    asking = [(where, inner) for where, inner in _stating(path, part) if asks(inner.requirements())]
    return max(asking, key=lambda one: one[0].count(".") + one[0].count("["))


def _name(part: Any) -> str:
    kind = getattr(part, "kind", None)
    return f"kind {kind}" if kind is not None else "it"
