"""The spellings of an objective in a configuration, and what they mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tests.objectives.problems import drawn_rows, logits

from stillhouse.config import StrictConfig
from stillhouse.core.requirements import Requirements
from stillhouse.core.types import SOURCES, Progress
from stillhouse.errors import ConfigError
from stillhouse.objectives import ObjectiveField, build
from stillhouse.schedules import ScheduleTracker


class Run(StrictConfig):
    """A configuration with an objective in it."""

    objective: ObjectiveField


def parsed(value: object):
    return Run.model_validate({"objective": value}).objective


def test_a_kind_with_options_a_bare_name_a_map_and_a_sum_are_accepted() -> None:
    assert parsed({"kind": "skew_kl", "alpha": 0.2}) == build("skew_kl", alpha=0.2)
    assert parsed("reverse_kl") == build("reverse_kl")
    assert parsed({"teacher": {"kind": "skew_kl"}, "student": "jsd"}) == build(
        "by_source", teacher={"kind": "skew_kl"}, student={"kind": "jsd"}
    )
    assert [term.kind for term in parsed({"kind": "sum", "terms": ["forward_kl", "tvd"]}).terms] == [
        "forward_kl",
        "tvd",
    ]


@pytest.mark.parametrize(
    ("value", "path", "message"),
    [
        ({"kind": "forward_lk"}, ("objective",), "did you mean 'forward_kl'"),
        ({"teachr": {"kind": "skew_kl"}, "student": "jsd"}, ("objective",), "did you mean 'teacher'"),
        ({"teacher": {"kind": "skew_kl", "alpha": 2.0}}, ("objective", "teacher", "alpha"), "between 0 and"),
        ({"kind": "skew_kl", "alfa": 0.1}, ("objective", "alfa"), "Extra inputs"),
        ({"kind": "sum", "terms": []}, ("objective", "terms"), "at least 1"),
        ({"kind": "jsd", "teacher_weight": 1.0}, ("objective", "teacher_weight"), "must stay between"),
        ({"kind": "csd", "w1": "pupil"}, ("objective", "w1"), "'student', 'teacher', 'uniform' or 'mix'"),
    ],
)
def test_mistakes_are_reported_where_they_are(value: object, path: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parsed(value)
    (error,) = caught.value.errors()
    assert error["loc"] == path
    assert message in error["msg"]


def test_weights_multiply_terms_and_sources_but_not_a_lone_objective() -> None:
    student, teacher, rows = logits(8, 6, 1), logits(8, 6, 2), drawn_rows(8, 6)
    heavy = {"kind": "forward_kl", "loss_weight": 3.0}
    plain = build("forward_kl")(student, teacher)
    torch.testing.assert_close(build(**heavy)(student, teacher), plain)
    torch.testing.assert_close(build("sum", terms=[heavy])(student, teacher), 3 * plain)
    mapped = build("by_source", teacher=heavy, student={"kind": "forward_kl"})(student, teacher, rows)
    factor = torch.from_numpy(rows.sources == SOURCES.index("teacher")) * 2.0 + 1.0
    torch.testing.assert_close(mapped, factor * plain)


def test_schedules_inside_maps_and_sums_become_numbers() -> None:
    ramp = {"kind": "linear", "start": 0.0, "end": 0.4}
    objective = parsed(
        {
            "teacher": {"kind": "skew_kl", "alpha": ramp},
            "student": {"kind": "sum", "terms": [{"kind": "jsd", "loss_weight": ramp}]},
        }
    )
    now = ScheduleTracker(objective).resolve(objective, Progress(step=5, max_steps=10, epoch=0.5, epochs=1.0))
    assert now.teacher.alpha == 0.2
    assert now.student.terms[0].loss_weight == 0.2


def test_what_an_objective_needs_is_known_before_it_runs() -> None:
    assert build("forward_kl").requirements() == replace(
        Requirements.of("main", "distribution", "topk", "sampled"), same_tokenizer=frozenset({"main"})
    )
    assert build("policy_gradient").forms == {"distribution", "topk", "sampled", "labels"}
    assert build("policy_gradient", importance="token").requirements().rows >= {"sampled_logprobs"}
    assert build("uld").requirements().same_tokenizer == frozenset()
    assert build("contrastive").requirements().rows == {"sources"}
    gap = build("contrastive", alpha_rule="gap").requirements()
    assert gap.rows == {"sources", "labels", "sequences", "label_logprobs"}
    assert gap.batch_statistics == {"likelihood_gaps", "mean_likelihood_gaps"}
    both = build("by_source", text={"kind": "cross_entropy"}, student={"kind": "policy_gradient"})
    assert both.requirements().rows == {"sources", "labels", "sequences", "label_logprobs"}
    assert both.needs_teacher


def test_the_forms_of_a_sum_are_those_from_which_all_of_its_terms_can_be_computed() -> None:
    terms = [{"kind": "forward_kl"}, {"kind": "skew_kl"}]
    assert build("sum", terms=terms).forms == {"distribution", "topk", "sampled"}
    assert build("sum", terms=[*terms, {"kind": "skew_rkl"}]).forms == {"distribution", "topk"}
    assert build("sum", terms=[*terms, {"kind": "csd"}]).forms == {"distribution"}


def test_a_teacher_named_where_nobody_asks_one_is_refused() -> None:
    assert build("forward_kl", teacher_model="code").requirements().model_names == {"code"}
    for options in ({"kind": "cross_entropy"}, {"kind": "sum", "terms": [{"kind": "forward_kl"}]}):
        with pytest.raises(ConfigError, match="teacher_model has no effect"):
            build(**options, teacher_model="code")
