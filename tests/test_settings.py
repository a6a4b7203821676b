"""The whole tree of a run: what ships is valid, and what does not fit together is refused in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import stillhouse
from stillhouse.config import Layer, Layered, commented_yaml, validate
from stillhouse.config.strict_yaml import parse
from stillhouse.errors import ConfigError
from stillhouse.runs.chains.resolve import resolve_chain
from stillhouse.runs.config import RunConfig
from stillhouse.runs.resolve import STAGES, resolve
from stillhouse.train.config import TrainConfig
from tests.conftest import ROOT


def example() -> dict[str, Any]:
    """The smallest tree that is valid."""
    return {
        "student": {"path": "student"},
        "data": {"train": "train.jsonl"},
        "objective": {"kind": "cross_entropy"},
    }


TEACHER = {"kind": "live", "path": "teacher"}
SHIPPED = sorted(
    path
    for path in [*Path(stillhouse.__file__).parent.glob("demo/*.yaml"), *ROOT.glob("examples/**/*.yaml")]
    if path.parent.name != "scale"  # also of other programs; test_scale_examples reads each
)


def tree(**changes: Any) -> dict[str, Any]:
    return {**example(), **changes}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(tree(**changes))
    return str(caught.value)


def test_the_smallest_tree_is_valid() -> None:
    config = resolve(example()).config
    assert config.teacher is None
    assert config.responses.kind == "fixed"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_file_is_valid(path: Path) -> None:
    if STAGES in yaml.safe_load(path.read_text(encoding="utf-8")):
        assert resolve_chain(path).stages
    else:
        assert resolve(path).config.name


def test_the_commented_form_reads_back_as_what_was_given() -> None:
    values, _ = parse(commented_yaml(RunConfig, tree(teacher=TEACHER)), "text")
    assert values == tree(teacher=TEACHER)


def test_every_option_of_the_commented_form_is_its_default() -> None:
    """With all `#` taken away, each option says what holds without it."""
    text = commented_yaml(RunConfig, tree(teacher=TEACHER))
    lines = [line.replace("#", "", 1) if line.lstrip().startswith("#") and "# " not in line[:40] else line
             for line in text.splitlines()]  # fmt: skip
    values, origins = parse("\n".join(lines), "text")
    assert set(values["train"]) == set(TrainConfig.model_fields)
    spelled, _ = validate(RunConfig, Layered.merged(Layer(values, origins)))
    plain, _ = validate(RunConfig, Layered.merged(Layer.of(tree(teacher=TEACHER), "given")))
    assert spelled == plain


def test_two_misfits_are_two_faults() -> None:
    message = refusal(
        objective={"kind": "forward_kl"},
        responses={"kind": "generated", "by": "teacher"},
        train={"keep": "best"},
    )
    assert message.count("\n- ") + message.startswith("- ") == 3
    assert "kind forward_kl needs whole distributions" in message
    assert "kind generated needs generated text from teacher" in message
    assert "train.keep" in message


def test_a_student_from_the_teacher_needs_one() -> None:
    assert "needs a model in this process from teacher" in refusal(student={"from_teacher": {"layers": [0]}})


@pytest.mark.parametrize("train", [{"validate_every": "never"}, {}])
def test_best_needs_something_to_be_measured_on(train: dict[str, Any]) -> None:
    data = {"train": "a.jsonl", **({"valid": "b.jsonl"} if train else {})}
    assert "best needs validation" in refusal(train={"keep": "best", **train}, data=data)


def test_a_map_must_cover_the_sources_and_no_others() -> None:
    mapped = {"teacher": {"kind": "skew_kl"}, "text": {"kind": "cross_entropy"}}
    message = refusal(teacher=TEACHER, responses={"kind": "pairs"}, objective=mapped)
    assert "Add objective.student." in message
    assert "objective.text" in message
    both = {"teacher": {"kind": "skew_kl"}, "student": {"kind": "skew_rkl"}}
    resolve(tree(teacher=TEACHER, responses={"kind": "pairs"}, objective=both))
    resolve(
        tree(
            teacher=TEACHER,
            responses={"kind": "pairs"},
            objective={**both, "text": {"kind": "cross_entropy"}},
            data={"train": "a.jsonl", "text": "b.txt"},
        )
    )


def test_plain_text_without_an_objective_for_it() -> None:
    data = {"train": "a.jsonl", "text": "b.txt"}
    message = refusal(objective={"fixed": {"kind": "cross_entropy"}}, data=data)
    assert "Add objective.text." in message


def test_a_schedule_that_follows_a_loss_that_nobody_measures() -> None:
    follows = {"kind": "adaptive", "student_share": {"kind": "dev_loss", "start": 0.0}}
    message = refusal(teacher=TEACHER, objective={"kind": "skew_rkl"}, responses=follows)
    assert "responses.student_share" in message
    assert "never measured" in message


def test_names_of_runs_are_names_of_folders() -> None:
    for name in ("a/b", "..", "", "a b", "-x"):
        assert "name" in refusal(name=name)
