"""The gradient of a step is that of its tokens: not of how they are split, padded, accumulated or spread."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests import tiny
from tests.train.steps import taken
from torch import Tensor, nn

from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.errors import TrainingError
from stillhouse.models import choose_packing
from stillhouse.objectives import Objective, build
from stillhouse.objectives.registry import parse_objective
from stillhouse.rollouts.base import StatelessPolicy
from stillhouse.rollouts.fixed import FixedConfig
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step

PAIRED = {
    "teacher": {"kind": "skew_kl", "alpha": 0.1, "loss_weight": {"kind": "linear", "start": 1.0, "end": 0.5}},
    "student": {"kind": "skew_rkl", "alpha": 0.1},
}
NOW = Progress(step=3, max_steps=10, epoch=0.3, epochs=1.0)


class Given(StatelessPolicy):
    """Hands out given responses, whatever the prompts."""

    def __init__(self, groups: list[list[Response]]) -> None:
        self.groups = groups

    def draw(self, now: object, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        return self.groups


class Other:
    """A second rank with known counts."""

    def __init__(self, size: int, counts: Tensor) -> None:
        self.size = size
        self.counts = counts

    def add(self, counts: Tensor) -> Tensor:
        return self.counts


def step_of(
    objective: Objective,
    groups: list[list[Response]],
    normalise: str = "token",
    teacher_seed: int = 7,
    dtype: torch.dtype = torch.float32,
) -> Step:
    method = Method(FixedConfig(), objective, normalise)  # type: ignore[arg-type]
    teacher = LiveTeacher(tiny.model(teacher_seed, width=24, dtype=dtype), tiny.VOCAB)
    return Step(method, Given(groups), {"main": teacher}, tiny.PAD, tiny.VOCAB)


def gradient(step: Step, student: nn.Module, num_micro: int, padding: int = 0) -> tuple[float, Tensor]:
    return taken(step, student, num_micro, NOW, padding)


def groups_of(paired: bool) -> list[list[Response]]:
    if not paired:
        return [[response] for response in tiny.responses(8)]
    teacher = tiny.responses(4, seed=1, sources=("teacher",))
    student = tiny.responses(4, seed=2, sources=("student",))
    return [
        [t, Response(t.prompt, s.token_ids, "student", True, 0)]
        for t, s in zip(teacher, student, strict=True)
    ]


@pytest.mark.parametrize("normalise", ["token", "sequence"])
@pytest.mark.parametrize("paired", [False, True])
def test_the_gradient_does_not_depend_on_micro_batches_padding_or_packing(
    normalise: str, paired: bool
) -> None:
    objective = parse_objective(PAIRED) if paired else build("forward_kl")
    student = tiny.model(1, dtype=torch.float64)
    step = step_of(objective, groups_of(paired), normalise, dtype=torch.float64)
    splits = (1, 2, 4) if paired else (1, 2, 4, 8)
    value, whole = gradient(step, student, 1)
    for num_micro in splits:
        for padding in (0, 5):
            other_value, other = gradient(step, student, num_micro, padding)
            assert other_value == pytest.approx(value, rel=1e-6)
            assert (other - whole).norm() <= 1e-6 * whole.norm()
    [teacher] = step.teachers.values()
    assert isinstance(teacher, LiveTeacher)
    for model in (student, teacher.model):
        assert choose_packing(model, "on") is None
    for num_micro in splits:
        other_value, other = gradient(step, student, num_micro)
        assert other_value == pytest.approx(value, rel=1e-6)
        assert (other - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("num_micro", [1, 2, 5])
def test_a_prompt_that_comes_twice_in_a_step_makes_two_pairs(num_micro: int) -> None:
    """Filters let kept prompts stand in for dropped ones, the same one several times if need be."""
    groups = groups_of(paired=True)
    again = [*groups, groups[0]]
    other = [Response(r.prompt, (*r.token_ids[:-1], 9, tiny.END), r.source, True, 0) for r in groups[0]]
    student = tiny.model(1, dtype=torch.float64)

    def value_of(drawn: list[list[Response]]) -> float:
        step = step_of(build("dpkd"), drawn, "sequence", dtype=torch.float64)
        assert len(step.prepare([], NOW, num_micro).micro_batches) == min(num_micro, len(drawn))
        return gradient(step, student, num_micro)[0]

    alone = [value_of([group]) for group in (*groups, other)]
    assert value_of(again) == pytest.approx(sum([*alone[:4], alone[0]]) / 5, rel=1e-6)
    assert value_of([*groups, other]) == pytest.approx(sum(alone) / 5, rel=1e-6)


def test_token_mean_and_sequence_mean_are_what_they_say() -> None:
    groups = groups_of(paired=False)
    student, teacher = tiny.model(1), tiny.model(7, width=24)
    per_sequence = []
    for (response,) in groups:
        ids = torch.tensor([(*response.prompt.token_ids, *response.token_ids)])
        start = len(response.prompt.token_ids) - 1
        rows = slice(start, start + len(response.token_ids))
        with torch.no_grad():
            s, t = student(input_ids=ids).logits[0, rows], teacher(input_ids=ids).logits[0, rows]
        per_sequence.append((t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1))
    token_mean = torch.cat(per_sequence).mean().item()
    sequence_mean = torch.stack([values.mean() for values in per_sequence]).mean().item()
    assert abs(token_mean - sequence_mean) > 1e-3
    for normalise, expected in (("token", token_mean), ("sequence", sequence_mean)):
        value, _ = gradient(step_of(build("forward_kl"), groups, normalise), student, 2)
        assert value == pytest.approx(expected, rel=1e-5)


def test_two_ranks_together_give_the_gradient_of_one() -> None:
    groups = groups_of(paired=False)
    student = tiny.model(1, dtype=torch.float64)
    _, whole = gradient(step_of(build("forward_kl"), groups, dtype=torch.float64), student, 1)
    tokens = torch.tensor([sum(len(r.token_ids) for g in groups for r in g)], dtype=torch.float64)
    parts = []
    for part in (groups[:5], groups[5:]):
        step = step_of(build("forward_kl"), part, dtype=torch.float64)
        step.world = Other(2, tokens)
        parts.append(gradient(step, student, 2)[1])
    averaged = (parts[0] + parts[1]) / 2
    assert (averaged - whole).norm() <= 1e-9 * whole.norm()


def test_another_teacher_gives_another_loss() -> None:
    groups = groups_of(paired=False)
    student = tiny.model(1)
    one, g1 = gradient(step_of(build("forward_kl"), groups, teacher_seed=7), student, 1)
    two, g2 = gradient(step_of(build("forward_kl"), groups, teacher_seed=8), student, 1)
    assert abs(one - two) > 1e-3
    assert (g1 - g2).norm() > 1e-2 * g1.norm()


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    groups = groups_of(paired=False)
    step = step_of(build("forward_kl"), groups)
    student = tiny.model(7, width=24)
    value, grads = gradient(step, student, 2)
    assert abs(value) < 1e-6
    assert grads.norm() < 1e-5


def test_schedules_reach_the_loss() -> None:
    groups = groups_of(paired=True)
    student = tiny.model(1)
    step = step_of(parse_objective(PAIRED), groups)
    values = []
    for progress in (Progress(0, 10, 0.0, 1.0), Progress(10, 10, 1.0, 1.0)):
        [micro] = step.prepare([], progress, 1).micro_batches
        values.append(step.loss(student, micro).loss.item())
    row = step.metrics.row()
    assert row["schedule/objective.teacher.loss_weight"] == pytest.approx(0.75)
    assert values[1] < values[0]


def test_a_loss_that_is_not_finite_stops_the_run_with_a_way_out() -> None:
    student = tiny.model(1)
    with torch.no_grad():
        next(iter(student.parameters())).fill_(float("nan"))
    step = step_of(build("forward_kl"), groups_of(paired=False))
    prepared = step.prepare([], NOW, 1)
    losses = [step.loss(student, micro) for micro in prepared.micro_batches]
    with pytest.raises(TrainingError, match=r"train\.lr"):
        step.check_finite(prepared, losses)


def test_the_log_shows_true_divergences_by_source() -> None:
    groups = groups_of(paired=True)
    step = step_of(parse_objective(PAIRED), groups)
    student = tiny.model(1)
    total, _ = gradient(step, student, 2)
    row = step.metrics.row()
    assert row["responses/teacher"] == row["responses/student"] == 0.5
    assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert row["loss/teacher"] > 0
    assert row["loss/student"] > 0
    assert row["responses/student_age"] == 3


def test_the_state_of_another_version_is_refused_by_name() -> None:
    step = step_of(build("skew_kl"), [])
    state = {name: part for name, part in step.state_dict().items() if name != "schedules"}
    with pytest.raises(TrainingError, match=r"lacks schedules\. Resume with the version"):
        step.load_state_dict(state)
