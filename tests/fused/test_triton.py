"""The Triton template against the definitions in fp64: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.objectives.problems import cases, drawn_rows, logits, named
from torch import Tensor

from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.rows import Rows
from stillhouse.core.types import SOURCES
from stillhouse.errors import EnvironmentFault
from stillhouse.fused import FusedConfig, backend, fused_rows
from stillhouse.fused.triton.launch import HeadProduct, RowWeights, values_and_gradient
from stillhouse.objectives import Objective, build
from stillhouse.objectives.kernels import KernelTerm
from stillhouse.objectives.mixtures import AB

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = 4
PLAIN = ModelHead(torch.empty(1, 1))
NAMES = ("main", "reference", "code")
ROUNDED_ONCE = 3e-3 if DEVICE == "cuda" else 1.2e-2
"""Of bf16 gradients. The interpreter cuts digits off where a GPU rounds."""


def written_by(source: str, count: int = COUNT, vocab: int = 37) -> Rows:
    rows = drawn_rows(count, vocab, reference=False)
    return replace(rows, sources=np.full(count, SOURCES.index(source)))  # type: ignore[arg-type]


LIMITS: list[dict[str, Any]] = [
    {"kind": "ab", "alpha": 0.0, "beta": 0.0},
    {"kind": "ab", "alpha": 1.0, "beta": 1.0},
    {"kind": "ab", "alpha": 0.5, "beta": -0.5},
    {"kind": "ab", "alpha": 0.01, "beta": 0.02},
    {"kind": "alpha_mixture", "alpha": 1.002, "teacher_share": 0.7, "direction": "reverse"},
    {"kind": "alpha_mixture", "alpha": 3.0, "direction": "reverse", "ab": (0.2, 0.7)},
]
"""What the functions take other branches for."""


def kernel_cases() -> list[Any]:
    """Every objective of single rows that has a kernel form."""
    return [
        pytest.param(objective, id=name)
        for name, objective in (*cases(), *((named(options), build(**options)) for options in LIMITS))
        if not objective.sequence_level and objective.kernel_terms(written_by("teacher")) is not None
    ]


every = pytest.mark.parametrize("objective", kernel_cases())


def defined(
    objective: Objective, student: Tensor, teacher: Tensor, rows: Rows, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of their weighted sum, in fp64."""
    leaf = student.double().requires_grad_()
    exact = rows.with_signals(dict.fromkeys(NAMES, teacher.double()))
    value = objective(leaf, None, exact)
    return value.detach(), torch.autograd.grad((value * weight.double()).sum(), leaf)[0]


def by_kernel(
    objective: Objective,
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    weight: Tensor,
    block: int = 32,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    terms = objective.kernel_terms(rows)
    assert terms is not None
    student, teacher, weight = student.to(DEVICE), teacher.to(DEVICE), weight.to(DEVICE)
    out = torch.full_like(student, torch.nan) if out is None else out
    theirs = HeadProduct(teacher, PLAIN, None)
    labels = None if rows.labels is None else rows.labels.to(DEVICE)
    values = values_and_gradient(
        terms,
        HeadProduct(student, PLAIN, None),
        dict.fromkeys(NAMES, theirs),
        RowWeights(weight, 1.0, labels),
        out,
        block,
    )
    return values.cpu().double(), out.cpu().double()


def problem(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.linspace(0, 1, COUNT, dtype=torch.promote_types(dtype, torch.float32))
    return logits(COUNT, vocab, 1).to(dtype), logits(COUNT, vocab, 2).to(dtype), weight


def close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert (got[1] - wanted[1]).norm() <= tolerance * wanted[1].norm() + 1e-12


@every
def test_value_and_gradient_are_those_of_the_definition(objective: Objective) -> None:
    student, teacher, weight = problem(37, torch.float64)
    rows = written_by("teacher")
    got = by_kernel(objective, student, teacher, rows, weight)
    # Numbers such as alpha reach the kernel in fp32.
    close(got, defined(objective, student, teacher, rows, weight), 2e-7)


def test_other_functions_where_the_student_wrote_the_text() -> None:
    objective, rows = build("contrastive", student_weight=1.2), written_by("student")
    student, teacher, weight = problem(37, torch.float64)
    got = by_kernel(objective, student, teacher, rows, weight)
    close(got, defined(objective, student, teacher, rows, weight), 2e-7)


@every
def test_fp32_with_logit_gaps_of_ten_thousand_and_entries_left_out(objective: Objective) -> None:
    student, teacher, weight = problem(15, torch.float32)
    student[0, 3] += 1e4
    teacher[0, 5] += 1e4
    student[1, 2] -= 1e4
    teacher[2, 2] -= 1e4
    student[3, 3] += 200
    student[:, 11] = teacher[:, 12] = student[:, 13] = teacher[:, 13] = -torch.inf
    teacher = teacher if objective.needs_teacher else student
    rows = written_by("teacher", vocab=11)
    if isinstance(objective, AB) and min(objective.alpha, objective.beta) < 0:
        return  # infinite by definition
    got = by_kernel(objective, student, teacher, rows, weight)
    wanted = defined(objective, student, teacher, rows, weight)
    torch.testing.assert_close(got[0], wanted[0], rtol=5e-5, atol=5e-3)  # 1e4 has steps of 1e-3 in fp32
    assert (got[1] - wanted[1]).norm() < 1e-5 * wanted[1].norm()
    assert (got[1][:, 11] == 0).all()


@every
def test_bf16_logits_and_a_gradient_over_them(objective: Objective) -> None:
    student, teacher, weight = problem(15, torch.bfloat16)
    rows = written_by("teacher", vocab=15)
    wanted = defined(objective, student, teacher, rows, weight)
    room = student.to(DEVICE)
    got = by_kernel(objective, room, teacher, rows, weight, out=room)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert (got[1] - wanted[1]).norm() < ROUNDED_ONCE * wanted[1].norm()


@pytest.mark.parametrize("rows", [0, 1])
def test_one_row_and_no_row(rows: int) -> None:
    student, teacher, weight = (x[:rows] for x in problem(37, torch.float32))
    value, gradient = by_kernel(build("jsd"), student, teacher, Rows(), weight)
    assert value.shape == (rows,)
    assert gradient.isfinite().all()


def test_rows_that_are_filled_up_are_read_in_wide_transfers_and_their_gradient_is_zero_there() -> None:
    student, teacher, weight = problem(37, torch.float32)
    room = torch.full((COUNT, 64), torch.nan)
    room[:, :37] = student
    out = torch.full((COUNT, 64), torch.nan, device=DEVICE)
    theirs = torch.zeros(COUNT, 64)
    theirs[:, :37] = teacher
    got = by_kernel(build("skew_kl"), room[:, :37], theirs[:, :37], Rows(), weight, out=out[:, :37])
    assert room.to(DEVICE)[:, :37].stride(0) == 64
    close(got, defined(build("skew_kl"), student, teacher, Rows(), weight), 3e-6)
    assert (out[:, 37:48] == 0).all()
    assert out[:, 48:].isnan().all()


def test_terms_without_a_common_temperature_are_added_up() -> None:
    terms = [{"kind": "forward_kl", "temperature": 2.0}, {"kind": "reverse_kl", "temperature": 0.5}]
    objective = build("sum", terms=[*terms, {"kind": "cross_entropy", "loss_weight": 0.3}])
    student, teacher, weight = problem(37, torch.float64)
    rows = written_by("teacher")
    got = by_kernel(objective, student, teacher, rows, weight, out=student)
    fresh = problem(37, torch.float64)[0]
    close(got, defined(objective, fresh, teacher, rows, weight), 2e-7)


def test_a_term_without_weight_gives_nothing_but_the_labels() -> None:
    terms = [{"kind": "jsd", "loss_weight": 0.0}, {"kind": "cross_entropy"}]
    student, teacher, weight = problem(37, torch.float64)
    rows = written_by("teacher")
    got = by_kernel(build("sum", terms=terms), student, teacher, rows, weight)
    close(got, defined(build("cross_entropy"), student, teacher, rows, weight), 1e-9)


def fused(objective: Objective, config: FusedConfig, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Values and gradients with every extra of a head, heads of different heights and three teachers."""
    count, vocab = 12, 21
    hidden, weight = logits(count, 5, 1), logits(vocab + 3, 5, 2, 0.7)
    bias, theirs = logits(vocab + 3, 1, 3)[:, 0], logits(vocab, 1, 9)[:, 0]
    leaves = [one.to(DEVICE, dtype).requires_grad_() for one in (hidden, weight, bias)]
    excluding = theirs.clone()
    excluding[4] = -torch.inf
    heads = [ModelHead(logits(vocab + n, 4, n + 20).to(DEVICE, dtype), scale=0.7) for n in range(3)]
    heads[0] = replace(heads[0], bias=excluding.to(DEVICE, dtype), softcap=None)
    signals = {
        name: ModelSignal(logits(count, 4, n).to(DEVICE, dtype), heads[n]) for n, name in enumerate(NAMES)
    }
    rows = drawn_rows(count, vocab, reference=False)
    rows = replace(rows, labels=rows.labels % 4)  # type: ignore[operator]
    token_weight = torch.linspace(0.1, 1, count, dtype=torch.promote_types(dtype, torch.float32))
    if not (objective.sequence_level or objective.granularity == "sequence"):
        token_weight = token_weight * (torch.arange(count) % 4 > 0)
    head = ModelHead(leaves[1], leaves[2], scale=0.5, softcap=4.0)
    loss, values = fused_rows(
        objective, leaves[0], head, signals, None, token_weight.to(DEVICE), rows.to(DEVICE), config
    )
    return values, *torch.autograd.grad(2 * loss, leaves)


@pytest.mark.parametrize(("name", "objective"), cases(), ids=[name for name, _ in cases()])
def test_a_whole_call_gives_what_the_closed_forms_give(name: str, objective: Objective) -> None:
    plain = fused(objective, FusedConfig(chunk_rows=5, backend="closed_form"), torch.float64)
    kernels = fused(objective, FusedConfig(chunk_rows=5, backend="triton"), torch.float64)
    for got, wanted in zip(kernels, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_a_cpu_takes_the_closed_forms_unless_told_otherwise() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not backend.uses_triton("auto", cpu)
    assert backend.uses_triton("auto", gpu)
    assert not backend.uses_triton("closed_form", gpu)
    assert not backend.uses_triton("compile", gpu)


def test_triton_without_a_gpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EnvironmentFault, match=r"train\.fused\.backend: triton needs a CUDA GPU.*auto"):
        backend.uses_triton("triton", torch.device("cpu"))


def test_triton_that_is_not_installed_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    backend.without_triton.cache_clear()
    try:
        with pytest.raises(EnvironmentFault, match=r"not installed.*pip install 'stillhouse\[triton\]'"):
            FusedConfig(backend="triton").check_installed()
        assert not backend.uses_triton("auto", torch.device("cuda"))
    finally:
        backend.without_triton.cache_clear()


def test_an_objective_states_at_most_what_the_template_takes() -> None:
    for parameter in kernel_cases():
        for term in parameter.values[0].kernel_terms(written_by("student")):
            assert isinstance(term, KernelTerm)
            assert len(term.numbers) <= 6
            assert term.sums <= 4
