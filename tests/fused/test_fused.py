"""The fused path equals plain logits: heads of every sort, precisions, accumulation, what it must not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.objectives.problems import drawn_rows, logits
from torch import Tensor, nn

import stillhouse
from stillhouse.core.head import ModelHead
from stillhouse.core.rows import Rows
from stillhouse.core.types import SOURCES
from stillhouse.fused import FusedConfig, fused_loss, fused_rows
from stillhouse.fused import kernel as work
from stillhouse.objectives import build

COUNT, VOCAB, WIDE, THIN = 12, 23, 7, 5
SMALL = FusedConfig(chunk_rows=5)


def models(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of the student (leaves), hidden states and head of the teacher."""
    student = logits(COUNT, THIN, 1, 1.0).to(dtype).requires_grad_()
    head = logits(VOCAB, THIN, 2, 1.0).to(dtype).requires_grad_()
    return student, head, logits(COUNT, WIDE, 3, 1.0).to(dtype), logits(VOCAB, WIDE, 4, 1.0).to(dtype)


def test_is_exported_at_the_top() -> None:
    assert stillhouse.fused_loss is fused_loss
    assert stillhouse.objectives.build is build


def test_mean_over_rows_without_weights() -> None:
    student, head, teacher, teacher_head = models()
    loss = fused_loss(build("jsd"), student, head, teacher, teacher_head)
    torch.testing.assert_close(loss, build("jsd")(student @ head.t(), teacher @ teacher_head.t()).mean())


@pytest.mark.parametrize(
    "extras",
    [
        {"bias": True},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"bias": True, "scale": 0.5, "softcap": 3.0, "vocab": 19},
    ],
)
def test_bias_scale_soft_cap_and_padding_rows(extras: dict) -> None:
    student, weight, teacher, teacher_weight = models()
    bias = logits(VOCAB, 1, 5)[:, 0].requires_grad_() if extras.pop("bias", False) else None
    head = ModelHead(weight, bias, **extras)
    teacher_head = ModelHead(teacher_weight, scale=0.7, softcap=5.0)
    leaves = [student, weight] + ([bias] if bias is not None else [])
    full = head.logits(student)
    plain = build("skew_rkl")(full, teacher_head.logits(teacher)[:, : full.shape[1]])
    weights = torch.linspace(0, 1, COUNT, dtype=torch.float64)
    expected = torch.autograd.grad((plain * weights).sum(), leaves)
    loss, values = fused_rows(build("skew_rkl"), student, head, teacher, teacher_head, weights, None, SMALL)
    torch.testing.assert_close(values[1:], plain.detach()[1:])
    for got, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_heads_of_different_height_share_the_first_ids_and_renormalise() -> None:
    student, head, teacher, _ = models()
    taller = logits(VOCAB + 9, WIDE, 6)
    expected = build("forward_kl")(student @ head.t(), teacher @ taller[:VOCAB].t())
    _, values = fused_rows(build("forward_kl"), student, head, teacher, taller)
    torch.testing.assert_close(values, expected.detach())
    loss, _ = fused_rows(
        build("forward_kl"), student, ModelHead(head, vocab=20), teacher, ModelHead(taller, vocab=18)
    )
    loss.backward()
    assert (head.grad[18:] == 0).all()
    assert (head.grad[:18] != 0).all()


def test_a_bias_of_minus_infinity_leaves_entries_out() -> None:
    student, head, teacher, teacher_head = models()
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[[3, 8]] = -torch.inf
    kept = [index for index in range(VOCAB) if index not in (3, 8)]
    expected = build("csd", w1="uniform")(student @ head[kept].t(), teacher @ teacher_head[kept].t())
    loss, values = fused_rows(
        build("csd", w1="uniform"), student, head, teacher, ModelHead(teacher_head, bias), config=SMALL
    )
    torch.testing.assert_close(values, expected.detach())
    (gradient,) = torch.autograd.grad(loss, head)
    assert (gradient[[3, 8]] == 0).all()
    assert gradient.isfinite().all()


def test_rows_without_weight_reach_no_head() -> None:
    student, head, teacher, teacher_head = models()
    weight = (torch.arange(COUNT) % 4 == 1).double()
    poisoned = student.detach().clone()
    poisoned[weight == 0] = torch.nan
    poisoned.requires_grad_()
    loss, values = fused_rows(build("forward_kl"), poisoned, head, teacher, teacher_head, weight)
    loss.backward()
    assert loss.isfinite()
    assert (values[weight == 0] == 0).all()
    assert (poisoned.grad[weight == 0] == 0).all()
    assert head.grad.isfinite().all()


def test_no_rows_at_all_is_a_loss_of_zero_with_zero_gradients() -> None:
    student, head, teacher, teacher_head = models()
    loss = fused_loss(build("forward_kl"), student, head, teacher, teacher_head, torch.zeros(COUNT).double())
    loss.backward()
    assert loss == 0
    assert (head.grad == 0).all()
    assert (student.grad == 0).all()


def test_a_frozen_head_gets_no_gradient_and_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    student, head, teacher, teacher_head = models()
    head.requires_grad_(False)
    shapes: list[tuple[int, ...]] = []
    multiply = torch.mm

    def watched(a: Tensor, b: Tensor, **options: object) -> Tensor:
        shapes.append((a.shape[0], b.shape[1]))
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "mm", watched)
    fused_loss(build("reverse_kl"), student, head, teacher, teacher_head, config=SMALL).backward()
    assert head.grad is None
    assert student.grad is not None
    assert (VOCAB, THIN) not in shapes
    assert shapes.count((5, VOCAB)) == 4, "two chunks of five rows, each projected once per model"


def test_without_gradients_nothing_but_the_value_is_computed() -> None:
    student, head, teacher, teacher_head = models()
    with torch.no_grad():
        loss = fused_loss(build("jsd"), student, head, teacher, teacher_head)
    assert not loss.requires_grad
    student.requires_grad_(False)
    head.requires_grad_(False)
    assert not fused_loss(build("jsd"), student, head, teacher, teacher_head).requires_grad


def test_a_source_without_a_teacher_does_not_multiply_by_its_head() -> None:
    student, head, teacher, teacher_head = models()
    rows = replace(drawn_rows(COUNT, VOCAB), sources=torch.arange(COUNT) % 2 * SOURCES.index("text"))
    teacher[1::2] = torch.nan
    objective = build("by_source", fixed={"kind": "forward_kl"}, text={"kind": "cross_entropy"})
    _, values = fused_rows(objective, student, head, teacher, teacher_head, rows=rows, config=SMALL)
    assert values.isfinite().all()
    plain = build("cross_entropy")(student @ head.t(), None, rows)
    torch.testing.assert_close(values[1::2], plain.detach()[1::2])


def test_an_unmapped_source_is_named_with_those_that_are_mapped() -> None:
    student, head, teacher, teacher_head = models()
    objective = build("by_source", teacher={"kind": "forward_kl"})
    with pytest.raises(ValueError, match="'student' came, but the objective maps teacher"):
        fused_loss(objective, student, head, teacher, teacher_head, None, drawn_rows(COUNT, VOCAB))


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch() -> None:
    student, head, teacher, teacher_head = models()
    weight = torch.linspace(0.1, 1, COUNT, dtype=torch.float64)
    whole = torch.autograd.grad(
        fused_loss(build("skew_kl"), student, head, teacher, teacher_head, weight), [student, head]
    )
    for part in (slice(0, 3), slice(3, 10), slice(10, COUNT)):
        loss = fused_loss(build("skew_kl"), student[part], head, teacher[part], teacher_head, weight[part])
        (loss / 4).backward()
    torch.testing.assert_close(4 * student.grad, whole[0])
    torch.testing.assert_close(4 * head.grad, whole[1])


def test_several_losses_in_one_backward() -> None:
    student, head, teacher, teacher_head = models()
    kinds = ("forward_kl", "tvd")
    sum(fused_loss(build(kind), student, head, teacher, teacher_head) for kind in kinds).backward()
    found = head.grad.clone()
    head.grad = None
    plain = sum(build(kind)(student @ head.t(), teacher @ teacher_head.t()).mean() for kind in kinds)
    plain.backward()
    torch.testing.assert_close(found, head.grad)


def test_a_tied_head_adds_to_the_gradient_of_the_embedding() -> None:
    embedding = nn.Embedding(VOCAB, THIN, dtype=torch.float64)
    ids = torch.arange(COUNT)
    _, _, teacher, teacher_head = models()
    fused_loss(build("forward_kl"), embedding(ids), embedding.weight, teacher, teacher_head).backward()
    found = embedding.weight.grad.clone()
    embedding.weight.grad = None
    build("forward_kl")(embedding(ids) @ embedding.weight.t(), teacher @ teacher_head.t()).mean().backward()
    torch.testing.assert_close(found, embedding.weight.grad)


def test_a_second_backward_is_refused_with_the_way_out() -> None:
    student, head, teacher, teacher_head = models()
    loss = fused_loss(build("forward_kl"), student, head, teacher, teacher_head)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call it again"):
        loss.backward()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "skew_kl", "skew_rkl", "jsd", "csd", "tvd"])
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_half_precision_operands(kind: str, chunk_rows: int | None) -> None:
    tensors = [tensor.detach().bfloat16() for tensor in models(torch.float32)]
    exact = [tensor.double() for tensor in tensors]
    results = []
    for student, head, teacher, teacher_head in (tensors, exact):
        leaves = [student.requires_grad_(), head.requires_grad_()]
        config = FusedConfig(chunk_rows=chunk_rows)
        loss, values = fused_rows(build(kind), student, head, teacher, teacher_head, config=config)
        results.append((values, *torch.autograd.grad(loss, leaves)))
    (values, *slopes), (wanted, *wanted_slopes) = results
    assert values.dtype == torch.float32
    assert slopes[1].dtype == torch.bfloat16
    torch.testing.assert_close(values.double(), wanted, rtol=0.03, atol=0.02)
    for slope, expected in zip(slopes, wanted_slopes, strict=True):
        assert (slope.double() - expected).norm() < 0.02 * expected.norm(), "a bf16 logit carries 8 bits"


def test_fp32_logits_of_half_precision_operands_leave_only_the_operands_rounding() -> None:
    tensors = [tensor.detach().bfloat16() for tensor in models(torch.float32)]
    _, exact = fused_rows(build("forward_kl"), *(tensor.double() for tensor in tensors))
    _, kept = fused_rows(build("forward_kl"), *tensors, config=FusedConfig(fp32_logits=True))
    _, rounded = fused_rows(build("forward_kl"), *tensors)
    torch.testing.assert_close(kept.double(), exact, rtol=1e-5, atol=1e-6)
    assert (rounded - exact).abs().max() > 10 * (kept - exact).abs().max()


def test_the_head_gradient_of_many_chunks_is_summed_in_fp32() -> None:
    count = 256
    hidden = torch.ones(count, 4, dtype=torch.bfloat16)
    head = logits(16, 4, 2, 0.5).bfloat16().requires_grad_()
    rows = Rows(labels=torch.arange(count) % 16)
    gradients = []
    for chunk_rows in (1, count):
        loss = fused_loss(
            build("cross_entropy"),
            hidden,
            head,
            token_weight=torch.ones(count),
            rows=rows,
            config=FusedConfig(chunk_rows=chunk_rows),
        )
        gradients.append(torch.autograd.grad(loss, head)[0].float())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


def test_autocast_multiplies_in_bf16_and_returns_fp32_gradients() -> None:
    student, head, teacher, teacher_head = models(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, values = fused_rows(build("skew_kl"), student, head, teacher, teacher_head, config=SMALL)
    loss.backward()
    assert head.grad.dtype == torch.float32
    assert values.dtype == torch.float32
    half = [tensor.detach().bfloat16() for tensor in (student, head, teacher, teacher_head)]
    _, expected = fused_rows(build("skew_kl"), *half, config=SMALL)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("kind", ["forward_kl", "skew_rkl", "jsd", "ab", "symmetric_kl"])
def test_huge_logits_stay_finite_and_right_in_the_closed_forms(kind: str) -> None:
    student, teacher = logits(6, 9, 1).float(), logits(6, 9, 2).float()
    student[0, 1] += 1e4
    teacher[0, 2] += 1e4
    student[1, 3] -= 1e4
    teacher[2, 4] += 150
    leaf = student.clone().requires_grad_()
    expected = build(kind)(leaf, teacher)
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    value, slope = build(kind).value_and_gradient(student.clone(), teacher.clone(), Rows())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-5)


def test_the_same_call_gives_the_same_bits() -> None:
    student, head, teacher, teacher_head = models(torch.float32)
    runs = []
    for _ in range(2):
        loss = fused_loss(build("jsd"), student, head, teacher, teacher_head, config=SMALL)
        runs.append(torch.autograd.grad(loss, [student, head]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_chunks_are_even_and_fit_the_budget() -> None:
    config = FusedConfig(memory_budget=1000)
    assert config.chunk_size(10, 100) == 10
    assert config.chunk_size(11, 100) == 6
    assert config.chunk_size(3, 5000) == 1
    assert FusedConfig(chunk_rows=4).chunk_size(100, 1) == 4


def test_no_tensor_of_all_rows_by_the_vocabulary_is_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == VOCAB:
                    largest = max(largest, tensor.shape[0])
            return result

    student, head, teacher, teacher_head = models()
    with Watch():
        fused_loss(
            build("skew_kl"), student, head, teacher, teacher_head, config=FusedConfig(chunk_rows=8)
        ).backward()
    assert 0 < largest <= 8


def test_what_does_not_fit_is_named() -> None:
    student, head, teacher, teacher_head = models()
    with pytest.raises(ValueError, match="forward_kl needs teacher"):
        fused_loss(build("forward_kl"), student, head)
    with pytest.raises(ValueError, match="teacher: 3 rows, but the student has 12"):
        fused_loss(build("forward_kl"), student, head, teacher[:3], teacher_head)
    with pytest.raises(ValueError, match="token_weight: 2 rows"):
        fused_loss(build("forward_kl"), student, head, teacher, teacher_head, torch.ones(2))


def test_compiled_arithmetic_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the eager backend: what is tested is our use of it, not the compiler of this machine."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiler(function, backend="eager", **options)
    )
    work._compiled.cache_clear()
    student, head, teacher, teacher_head = models()
    rows = drawn_rows(COUNT, VOCAB)
    results = []
    for backend in ("closed_form", "compile"):
        loss = fused_loss(
            build("skew_kl", alpha=0.3),
            student,
            head,
            teacher,
            teacher_head,
            None,
            rows,
            FusedConfig(backend=backend),
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, [student, head])))
    work._compiled.cache_clear()
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)
