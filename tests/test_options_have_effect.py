"""Every option of every part changes something, or is said to have no effect: what is set is never ignored.

Objectives, schedules and sampling are computed with each option changed; the options of all other parts must
be read somewhere in the package.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

import stillhouse
from stillhouse.config import StrictConfig
from stillhouse.config.trees import variants
from stillhouse.core.types import Progress
from stillhouse.engines.base import Sampling
from stillhouse.engines.sampling import Sampler
from stillhouse.objectives import Objective, build
from stillhouse.runs.config import RunConfig
from stillhouse.runs.inert import without_effect
from stillhouse.runs.resolve import resolve
from stillhouse.schedules import REGISTRY as SCHEDULES
from stillhouse.schedules import Schedule
from tests.objectives.problems import cases, drawn_rows, gradient, logits

SOURCE = Path(stillhouse.__file__).parent
NAMES_OF_MODELS = {"kind", "teacher_model", "reference_model", "wrong_model", "contexts"}
ELSEWHERE = {"loss_weight", "order", "rest_weight", "layers"}
"""Weights of terms, and what needs two tokenizers or hidden states: test_span.py, test_transport.py."""
HELD = {"terms", "objectives", "objective", "fixed", "teacher", "student", "text"}
"""Objectives inside others, which are cases of their own."""
COMBINED = {"sum", "by_source", "by_teacher", "teacher_mixture", "hidden_states"}
MORE_CASES = [
    (
        "contrastive gap",
        {"kind": "contrastive", "alpha_rule": "gap", "teacher_gap": 0.05, "student_gap": 0.05},
    ),
    ("csd mix", {"kind": "csd", "w1": "mix", "w2": "teacher"}),
    ("csd uniform", {"kind": "csd", "w1": "uniform", "w2": "uniform"}),
    ("dpkd of tokens", {"kind": "dpkd", "level": "token"}),
    ("dpo", {"kind": "dpo", "teacher_model": "main"}),
    ("dpo ipo", {"kind": "dpo", "loss": "ipo", "teacher_model": "main"}),
    ("policy gradient, whitened", {"kind": "policy_gradient", "whiten": True, "include_current": True}),
    ("policy gradient, exact", {"kind": "policy_gradient", "single_step": True}),
    ("span of forward KL", {"kind": "span", "compare": "forward_kl"}),
]
CASES = [
    *(case for case in cases() if case[1].teacher_model == "main" and case[1].name not in COMBINED),
    *((name, build(**options)) for name, options in MORE_CASES),
]


def others(part: StrictConfig, name: str) -> Iterator[StrictConfig]:
    """The part with other values of one option."""
    value, annotation = getattr(part, name), str(type(part).model_fields[name].annotation)
    candidates: list[Any] = [0.3, 0.9, 0.02, 2.0, 3, 1, 0.0, 1.0, 7]
    if isinstance(value, bool):
        candidates = [not value]
    elif isinstance(value, tuple) or "tuple[" in annotation:
        candidates = [(0.3, 0.9), (0.8, 0.1)]
    elif "Literal" in annotation:
        candidates = [*literals(type(part).model_fields[name].annotation), 0.2]
    for candidate in candidates:
        if candidate == value:
            continue
        try:
            yield type(part).model_validate({**dict(part), name: candidate})
        except (ValidationError, ValueError):
            continue


def literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [found for one in typing.get_args(annotation) for found in literals(one)]


def outcome(objective: Objective) -> list[torch.Tensor]:
    """Value and gradient early and late in the training, with the gap of the batch."""
    found: list[torch.Tensor] = []
    for epoch, seed in ((0.5, 0), (1.5, 1), (1.5, 2), (1.5, 3)):
        now = objective.at(Progress(5, 100, epoch, 10.0))
        now = now.with_batch_statistics({"teacher_gap": 0.04, "student_gap": 0.04})
        found += gradient(now, logits(16, 11, seed), logits(16, 11, seed + 9), drawn_rows(16, 11, seed))
    return found


def same(one: Any, other: Any) -> bool:
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("objective", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_each_option_of_an_objective(objective: Objective) -> None:
    before, inert = outcome(objective), objective.options_without_effect()
    for name in sorted(set(type(objective).model_fields) - NAMES_OF_MODELS - HELD - ELSEWHERE):
        changes = islice(others(objective, name), 2 if name in inert else None)
        changed = any(not same(before, outcome(one)) for one in changes)
        assert changed != (name in inert), f"{objective.name}.{name}: changes the loss: {changed}; {inert}"
    weighed = {**dict(objective), "loss_weight": 3.0}
    assert same(before, outcome(type(objective).model_validate(weighed))), "told by runs.inert"


STARTS: dict[str, dict[str, Any]] = {
    "constant": {"at": 0.5},
    "linear": {"start": 0.1, "end": 0.9},
    "cosine": {"start": 0.1, "end": 0.9},
    "previous_round": {"of": "teacher_gap"},
    "momentum": {"rate": 0.5},
}
STILL = [
    {"kind": "linear", "start": 0.4, "end": 0.4},
    {"kind": "gradual_beta", "start": 1.0},
    {"kind": "dev_loss", "start": 1.0},
    {"kind": "momentum", "rate": 0.0},
    {"kind": "momentum", "start": 1.0},
]


def course(schedule: Schedule) -> list[torch.Tensor]:
    """Its values over a training in which every metric is measured."""
    state, values = schedule.initial(), []
    losses = [3.0, 2.5, 2.9, 2.2, 2.6, 2.3, 2.9, 2.8, 3.1, 3.0]
    for step in range(40):
        progress = Progress(step, 40, step / 20, 2.0)
        values.append(schedule.value(progress, state))
        for name in ("train_loss", "dev_loss"):
            state = schedule.observe(state, name, losses[step % 10], progress)
        state = schedule.observe(state, "teacher_gap", 0.1, progress)
        state = schedule.observe(state, "student_gap", 0.2, progress)
    return [torch.tensor(values, dtype=torch.float64)]


@pytest.mark.parametrize(
    "options",
    [*({"kind": kind, **STARTS.get(kind, {})} for kind in SCHEDULES.kinds()), *STILL],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_each_option_of_a_schedule(options: dict[str, Any]) -> None:
    schedule = SCHEDULES.parse(options)
    inert = schedule.options_without_effect()
    for name in sorted(set(type(schedule).model_fields) - {"kind"}):
        changed = any(not same(course(schedule), course(one)) for one in others(schedule, name))
        assert changed != (name in inert), f"{options}: {name} changes the course: {changed}; {inert}"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 1}], ids=str)
def test_each_option_of_sampling(options: dict[str, Any]) -> None:
    """On one distribution over 11 tokens; max_tokens and logprobs are the engines', whose tests have them."""
    sampling = Sampling(**options)
    inert = sampling.options_without_effect()
    for name in sorted(set(Sampling.model_fields) - {"max_tokens", "logprobs"}):
        changed = any(drawn(sampling) != drawn(one) for one in others(sampling, name))  # type: ignore[arg-type]
        assert changed != (name in inert), f"{options}: {name}: {changed}; {inert}"


def drawn(sampling: Sampling) -> list[int]:
    """Tokens sampled after a prompt, the most likely of which is the end."""
    sampler = Sampler(sampling, torch.tensor([3]))
    found = []
    for seed in range(40):
        logit = 0.3 * logits(1, 11, 5).float()
        logit[0, 3], logit[0, 2] = 3.0, 2.8
        tokens = torch.tensor([[1, 3, 2, 3, 2, 3]])
        uniform = torch.tensor([(seed + 0.5) / 40])
        token, _ = sampler.sample(logit, tokens, torch.tensor([2]), uniform)
        found.append(int(token))
    return found


def parts() -> list[type[StrictConfig]]:
    return [
        cls
        for cls in variants(StrictConfig)
        if cls.__module__.startswith("stillhouse.") and not issubclass(cls, Objective | Schedule)
    ]


def test_each_option_of_any_other_part_is_read_somewhere() -> None:
    read: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    unread = sorted(
        f"{cls.__name__}.{name}" for cls in parts() for name in cls.model_fields if name not in read
    )
    assert unread == []


TREE: dict[str, Any] = {
    "student": {"path": "student"},
    "teacher": {"kind": "live", "path": "teacher"},
    "data": {"train": "train.jsonl", "valid": "valid.jsonl"},
    "recipe": "kd",
}
IN_VAIN = {
    "train.epochs=3": ["train.max_steps=5"],
    "train.best_by=loss": [],
    "train.validate_rouge=false": ["train.validate_every=never"],
    "train.keep_checkpoints=5": ["train.save_every=never"],
    "train.fused.memory_budget=1GiB": ["train.fused.chunk_rows=3"],
    "train.fused.backend=triton": ["objective.kind=adaptive_kl"],
    "train.validate_every=5": ["data.valid="],
    "evaluate.valid_limit=5": ["data.valid="],
    "evaluate.before=false": ["data.valid="],
    "evaluate.seeds=[1, 2]": [],
    "evaluate.teacher=false": ["recipe=sft", "teacher="],
    "engine.batch_size=3": ["data.valid="],
    "engine.sampling.top_p=0.5": [],
    "engine.sampling.top_k=5": ["responses={kind: on_policy, sampling: {top_p: 0.9}}"],
    "objective.loss_weight=2.0": [],
    "data.text_block=9": [],
    "responses.base={kind: generated, by: teacher}": ["responses={kind: mixed, student_share: 1.0}"],
    "responses.sampling.top_p=0.9": ["responses={kind: mixed, student_share: 0.0}"],
    "responses.capacity=50": ["responses={kind: adaptive, student_share: 0.0}"],
    "responses.resample=2": ["responses={kind: generated, by: teacher}"],
    "responses.chunk_size=2": ["responses={kind: generated, by: student, refresh: step}"],
    "responses.teacher_sampling.top_p=0.9": ["responses={kind: pairs, teacher_responses: fixed}",
        "objective={teacher: {kind: skew_kl}, student: {kind: skew_rkl}}"],
    "teacher.identity=x": ["teacher={kind: server, url: 'http://a/v1', model: m, cache: null}"],
    "teacher.limit=1GB": ["teacher={kind: cache, of: t, on_miss: error}"],
}  # fmt: skip


@pytest.mark.parametrize("option", IN_VAIN)
def test_what_has_no_effect_in_this_run_is_told(option: str) -> None:
    found = resolve(TREE, [*IN_VAIN[option], option])
    path = option.partition("=")[0]
    assert any(note.startswith(path) and "has no effect: " in note for note in found.notes), found.notes
    again = resolve({**TREE, "train": {"lr": 1e-3}})
    assert again.notes == ()


def test_no_recipe_has_an_option_without_effect() -> None:
    from stillhouse import recipes
    from stillhouse.runs import inert

    for recipe in recipes.all_recipes():
        teachers = {name: TREE["teacher"] for name in recipe.teachers if name != "main"}
        found = resolve({**TREE, "recipe": recipe.name, "teachers": teachers})
        assert list(inert.notes(found.config, found.provenance, "nobody's")) == [], recipe.name


def test_a_resolved_file_tells_nothing_again() -> None:
    import yaml

    first = resolve({**TREE, "recipe": "distillm2"})
    assert resolve(yaml.safe_load(first.yaml)).notes == ()
    assert isinstance(first.config, RunConfig)
    assert "engine.sampling" not in without_effect(first.config)
    assert replace(first, notes=()).notes == ()
