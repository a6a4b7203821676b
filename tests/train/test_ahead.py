"""What runs beside or ahead of the student's pass changes no number: teachers, copies, casts of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tests import tiny
from tests.train.test_step import NOW, Given, groups_of, step_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.core.batch import TokenBatch
from stillhouse.core.host import Staging
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig
from stillhouse.runs.make_step import head_dtype
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.driver import StepDriver
from stillhouse.train.step import Method, Step


def gradient_of(student: nn.Module) -> dict[str, Tensor]:
    found = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
    student.zero_grad()
    return found


def test_asking_the_teachers_ahead_changes_no_bit() -> None:
    student = tiny.model(1)
    results = []
    for ahead in (False, True):
        step = step_of(build("jsd"), groups_of(paired=False))
        micro = step.prepare([], NOW, 3).micro_batches
        later = (*micro[1:], None) if ahead else (None,) * 3
        losses = [step.loss(student, *pair) for pair in zip(micro, later, strict=True)]
        sum(one.loss for one in losses).backward()
        teacher = step.teachers["main"]
        assert isinstance(teacher, LiveTeacher)
        assert teacher.tokens == sum(one.batch.num_tokens for one in micro), "each sequence once"
        results.append(([one.value for one in losses], gradient_of(student)))
    (values, slopes), (values_ahead, slopes_ahead) = results
    assert values == values_ahead
    assert all(torch.equal(slopes[name], slopes_ahead[name]) for name in slopes)


def test_the_driver_has_the_teachers_one_micro_batch_ahead() -> None:
    order: list[str] = []

    class Noted(LiveTeacher):
        def hidden(self, batch: TokenBatch) -> Tensor:
            order.append(f"teacher {len(batch)}")
            return super().hidden(batch)

    student = tiny.model(1)
    student.register_forward_pre_hook(lambda *_: order.append("student"))
    policy = Given([[one] for one in tiny.responses(6)])
    teachers = {"main": Noted(tiny.model(7, width=24), tiny.VOCAB)}
    method = Method(FixedConfig(), build("forward_kl"), "token")
    driver = StepDriver(Step(method, policy, teachers, tiny.PAD, tiny.VOCAB))
    for _ in range(2):
        for micro in driver.begin(student, [], NOW, 3, nullcontext()):
            driver.loss(student, micro).backward()
        driver.on_pre_optimizer_step(None, None, None)
    assert order == 2 * ["teacher 2", "teacher 2", "student", "teacher 2", "student", "student"]


@pytest.fixture
def mixed() -> Iterator[Accelerator]:
    """Accelerate with bfloat16 for mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


class Casts(TorchDispatchMode):
    """How often a weight is cast."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cast = func is torch.ops.aten._to_copy.default
        self.count += cast and args[0].data_ptr() == self.weight.data_ptr()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_cast_once_a_step_and_gradients_keep_their_bits(
    mixed: Accelerator, checkpointing: bool
) -> None:
    plain = tiny.model(1)
    if checkpointing:
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student: Any = mixed.prepare_model(plain).train()
    counts, slopes = [], []
    for keep in (False, True):
        step = step_of(build("forward_kl"), groups_of(paired=False))
        step.teachers["main"].model.requires_grad_(False)
        driver = StepDriver(step, keep_casts=keep)
        for _ in range(2):  # the second step must not use casts of the first
            with Casts(student.model.layers[0].mlp.up_proj.weight) as casts:
                for micro in driver.begin(student, [], NOW, 3, nullcontext()):
                    driver.loss(student, micro).backward()
                driver.on_pre_optimizer_step(None, None, None)
            slopes.append(gradient_of(student))
            counts.append(casts.count)
    recomputed = 3 if checkpointing else 0
    assert counts == [3 + recomputed] * 2 + [1] * 2
    assert len(slopes[0]) == len(list(student.parameters()))
    for other in slopes[1:]:
        assert all(torch.equal(slopes[0][name], other[name]) for name in slopes[0])


def test_a_step_that_was_broken_off_leaves_no_stale_casts(mixed: Accelerator) -> None:
    student: Any = mixed.prepare_model(tiny.model(1))

    def driver() -> StepDriver:
        return StepDriver(step_of(build("forward_kl"), groups_of(paired=False)))

    def whole(made: StepDriver) -> dict[str, Tensor]:
        for micro in made.begin(student, [], NOW, 3, nullcontext()):
            made.loss(student, micro).backward()
        made.on_pre_optimizer_step(None, None, None)
        return gradient_of(student)

    first = whole(driver())
    broken = driver()
    broken.loss(student, broken.begin(student, [], NOW, 3, nullcontext())[0])
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.5)
    changed = whole(driver())
    broken.release()
    again = whole(driver())
    assert not torch.equal(changed["lm_head.weight"], first["lm_head.weight"])
    assert all(torch.equal(changed[name], again[name]) for name in again)


def test_only_a_gpu_multiplies_the_head_in_the_precision_of_autocast() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert head_dtype("bfloat16", gpu) == torch.bfloat16
    assert head_dtype("bfloat16", cpu) is head_dtype("float32", gpu) is None


@pytest.mark.parametrize("kind", ["jsd", "dpkd"])  # over tokens; over sequences, whose labels come first
def test_the_heads_precision_holds_in_every_pass_over_the_head_and_nowhere_else(kind: str) -> None:
    student, groups = tiny.model(1), groups_of(paired=True)
    slopes = []
    for dtype in (None, torch.bfloat16):
        step = step_of(build(kind), groups)
        step.head_dtype = dtype
        with Operands() as operands:
            step.loss(student, step.prepare([], NOW, 1).micro_batches[0]).loss.backward()
        assert operands.of_width(tiny.VOCAB) == {dtype or torch.float32}
        assert operands.of_width(32) == {torch.float32}, "the models' own layers"
        slopes.append(gradient_of(student))
    assert all(one.dtype == torch.float32 for one in slopes[1].values())
    exact, found = (torch.cat([one.flatten() for one in slope.values()]) for slope in slopes)
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


class Operands(TorchDispatchMode):
    """The dtypes of the operands of matrix products, by the width of their result. The heads that models run
    themselves, for one position of each sequence, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "mm" and made.shape[0] > 8:
            self.found.append((made.shape[-1], args[0].dtype))
        return made

    def of_width(self, width: int) -> set[torch.dtype]:
        """Of products with so many columns."""
        return {dtype for columns, dtype in self.found if columns == width}


def test_a_teacher_that_is_the_student_leaves_every_weight_its_gradient(mixed: Accelerator) -> None:
    student: Any = mixed.prepare_model(tiny.model(1))
    teacher = LiveTeacher(student, tiny.VOCAB)
    method = Method(FixedConfig(), build("skew_rkl"), "token")
    policy = Given([[one] for one in tiny.responses(6)])
    step = Step(method, policy, {"main": teacher}, tiny.PAD, tiny.VOCAB)
    driver = StepDriver(step)
    for micro in driver.begin(student, [], NOW, 3, nullcontext()):
        driver.loss(student, micro).backward()
    driver.on_pre_optimizer_step(None, None, None)
    assert all(one.grad is not None for one in student.parameters())


def test_what_is_staged_in_one_block_comes_out_as_it_was() -> None:
    tensors = [
        torch.arange(5), torch.tensor([True, False, True]), torch.rand(3, 7), torch.tensor(2.5),
        torch.zeros(0, 4), torch.arange(9, dtype=torch.int32).view(3, 3).t(), torch.rand(2, 3).bfloat16(),
    ]  # fmt: skip
    staging = Staging.of(tensors)
    buffer = torch.full((staging.size,), 255, dtype=torch.uint8)
    staging.fill(buffer, tensors)
    found = staging.views(buffer.clone())
    assert all(start % 16 == 0 for start, _, _ in staging.places)
    for one, wanted in zip(found, tensors, strict=True):
        assert one.dtype == wanted.dtype
        assert torch.equal(one, wanted)


def test_a_micro_batch_on_another_device_is_the_same() -> None:
    step = step_of(build("forward_kl"), groups_of(paired=False))
    micro = step.prepare([], NOW, 1).micro_batches[0]
    moved = micro.to(torch.device("meta"))
    assert moved.read_by("main") is moved.batch
    assert [(one.shape, one.dtype) for one in moved.tensors()] == [
        (one.shape, one.dtype) for one in micro.tensors()
    ]
    assert all(one.is_meta for one in moved.tensors())
    assert moved.batch.token_ids == micro.batch.token_ids
    assert torch.equal(micro.to(torch.device("cpu")).token_weight, micro.token_weight)
