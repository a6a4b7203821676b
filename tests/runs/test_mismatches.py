"""What one part asks for and no other gives is refused before anything loads, with the way out."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.errors import ConfigError
from stillhouse.runs.resolve import resolve

TEACHER = {"kind": "live", "path": "teacher"}


def tree(**changes: Any) -> dict[str, Any]:
    data = {"train": "train.jsonl", "valid": "valid.jsonl"}
    return {"student": {"path": "student"}, "teacher": TEACHER, "data": data, **changes}


@pytest.mark.parametrize(
    "changes",
    [{"data": {"train": "train.jsonl"}}, {"train": {"validate_every": "never"}}],
    ids=["no data", "never"],
)
@pytest.mark.parametrize("recipe", ["distillm", "distillm_released"])
def test_a_share_that_follows_validation_needs_validation(recipe: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"student_share.*follows the loss on data.valid"):
        resolve(tree(recipe=recipe, **changes))


@pytest.mark.parametrize("recipe", ["distillm", "distillm_released", "minillm", "skd", "taid"])
def test_recipes_are_whole(recipe: str) -> None:
    assert resolve(tree(recipe=recipe)).config.recipe == recipe


def test_a_fixed_share_needs_no_validation() -> None:
    resolve(
        tree(
            recipe="distillm",
            responses={"student_share": 0.5},
            data={"train": "t.jsonl"},
            train={"keep": "last"},
        )
    )


def test_a_buffer_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"responses.capacity.*at least train.batch_size \(32\)"):
        resolve(tree(recipe="distillm", responses={"capacity": 31}))


def test_policy_gradient_has_to_know_how_the_text_was_sampled() -> None:
    with pytest.raises(ConfigError, match=r"objective.sampling_teacher_share.*teacher's share"):
        resolve(tree(recipe="minillm", responses={"teacher_share": 0.3}))
    with pytest.raises(ConfigError, match=r"responses.sampling.logprobs"):
        resolve(tree(recipe="minillm", objective={"ratio_clip": 0.2}))
    resolve(tree(recipe="minillm", objective={"ratio_clip": 0.2}, responses={"sampling": {"logprobs": True}}))


def test_policy_gradient_is_for_the_students_text_alone() -> None:
    gradient = {"kind": "policy_gradient"}
    for responses in ({"kind": "fixed"}, {"kind": "mixed"}, {"kind": "adaptive", "student_share": 0.5}):
        with pytest.raises(ConfigError, match=r"objective.*text that the student has sampled.*got.*fixed"):
            resolve(tree(objective=gradient, responses=responses))
        with pytest.raises(ConfigError, match=r"objective\.fixed.*text that the student has sampled"):
            resolve(tree(objective={"student": "forward_kl", "fixed": gradient}, responses={"kind": "mixed"}))
    data = {"train": "train.jsonl", "valid": "valid.jsonl", "text": "text.txt"}
    with pytest.raises(ConfigError, match=r"got.*text"):
        resolve(tree(objective=gradient, responses={"kind": "on_policy"}, data=data))
    resolve(tree(objective={"student": gradient, "fixed": "forward_kl"}, responses={"kind": "mixed"}))
    resolve(tree(objective=gradient, responses={"kind": "on_policy"}))


def test_a_rule_that_would_begin_after_the_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective.rule_after.*begin after the end.*of 1 epochs"):
        resolve(tree(recipe="distillm2", train={"epochs": 1.0}))
    resolve(tree(recipe="distillm2", train={"epochs": 1.0}, objective={"alpha_rule": "fixed"}))
    resolve(tree(recipe="distillm2", train={"max_steps": 5}))


def test_layers_are_compared_with_a_live_teacher_only() -> None:
    objective = {"kind": "transport", "layers": [1.0]}
    resolve(tree(objective=objective))
    with pytest.raises(ConfigError, match="needs hidden states of layers from teacher"):
        resolve(tree(objective=objective, teacher={"kind": "cache", "of": "teacher"}))


def test_a_second_model_has_to_be_there() -> None:
    with pytest.raises(
        ConfigError, match=r"kind advantage needs whole distributions or .* from teachers.reference"
    ):
        resolve(tree(objective="advantage"))
    resolve(tree(objective="advantage", teachers={"reference": TEACHER}))
    named = {"kind": "aligned_teacher", "reference_model": "reversed"}
    resolve(tree(objective=named, teachers={"reversed": TEACHER}))


def test_teachers_main_is_the_long_form_of_teacher() -> None:
    config = resolve({**tree(objective="forward_kl", teachers={"main": TEACHER}), "teacher": None}).config
    assert config == resolve(tree(objective="forward_kl")).config
    with pytest.raises(ConfigError, match="are the same model"):
        resolve(tree(objective="forward_kl", teachers={"main": TEACHER}))


def test_a_teacher_that_nothing_asks_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teachers.code.*no objective asks for it"):
        resolve(tree(objective="forward_kl", teachers={"code": TEACHER}))
    both = [{"kind": "forward_kl"}, {"kind": "forward_kl", "teacher_model": "code"}]
    resolve(tree(objective={"kind": "sum", "terms": both}, teachers={"code": TEACHER}))


def test_pairs_are_asked_of_the_responses() -> None:
    with pytest.raises(ConfigError, match=r"kind dpkd needs two responses to each prompt to compare"):
        resolve(tree(objective="dpkd", responses={"kind": "on_policy"}))
    resolve(tree(objective="dpkd", responses={"kind": "pairs"}))
    with pytest.raises(ConfigError, match=r"kind simper does not know whether fixed text is preferred"):
        resolve(tree(objective="simper", responses={"kind": "fixed"}))


def test_a_draft_model_needs_a_teacher_in_this_process() -> None:
    tasks = {"tasks": ["cost", "speculative"]}
    resolve(tree(objective="cross_entropy", evaluate=tasks))
    with pytest.raises(
        ConfigError, match=r"evaluate.tasks\[1\].*kind speculative needs a model in this process from teacher"
    ):
        resolve(tree(objective="cross_entropy", evaluate=tasks, teacher=None))


def test_a_further_teacher_may_be_sparse_where_its_objective_allows_it() -> None:
    second = {"kind": "cache", "of": TEACHER, "store": "topk"}
    resolve(tree(objective={"kind": "jsd", "teacher_model": "second"}, teachers={"second": second}))
    objective = {"kind": "csd", "teacher_model": "second"}
    with pytest.raises(ConfigError, match=r"all that teachers.second.kind=cache gives.*allowed.*forward_kl"):
        resolve(tree(objective=objective, teachers={"second": second}))
    resolve(tree(objective=objective, teachers={"second": {**second, "store": "hidden"}}))


@pytest.mark.parametrize("by_row", [False, True])
def test_a_gap_against_a_further_teacher_is_refused(by_row: bool) -> None:
    gap: dict[str, Any] = {"kind": "contrastive", "alpha_rule": "gap", "alpha": 0.5}
    named = {**gap, "teacher_model": "second"}
    objective = {"kind": "by_teacher", "objectives": {"second": gap}} if by_row else named
    changes = {"responses": "pairs", "teachers": {"second": TEACHER}}
    with pytest.raises(ConfigError, match="gap is measured against the main teacher only"):
        resolve(tree(objective=objective, **changes))
