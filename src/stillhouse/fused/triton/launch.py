"""Values and gradients of some rows by the Triton template: from what an objective states to its launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillhouse.core.head import ModelHead
from stillhouse.fused.triton.template import LabelRows, LogitRows, template
from stillhouse.objectives.kernels import KernelTerm, function

BLOCK = 2048
"""Entries of a row that a program has at a time."""
ENTRIES_OF_A_THREAD = 4
"""So few that the registers of every form suffice for two programs at a time."""
NUMBERS = 6
MEANS = {"student": 1, "teacher": 2, "uniform": 4}


@dataclass(frozen=True, slots=True, eq=False)
class HeadProduct:
    """The bare products of some rows with a model's head, [n, V], and what makes logits of them."""

    product: Tensor
    head: ModelHead
    bias: Tensor | None

    def rows(self) -> LogitRows:
        """As the template takes them; what `extras` says that there is not is not read."""
        bias = self.product if self.bias is None else self.bias
        scale, cap = float(self.head.scale), float(self.head.softcap or 0.0)
        return LogitRows(self.product, self.product.stride(0), bias, scale, cap)

    @property
    def extras(self) -> int:
        """1 where there is a bias, 2 where there is a soft cap."""
        return (self.bias is not None) + 2 * (self.head.softcap is not None)


@dataclass(frozen=True, slots=True, eq=False)
class RowWeights:
    """How much each row counts, and its label."""

    token_weight: Tensor
    """[n], for the gradient."""
    loss_weight: float = 1.0
    """That of the objective in the one that holds it, for value and gradient."""
    labels: Tensor | None = None
    """[n]; None where nothing asks for labels."""
    label_slope: Tensor | None = None
    """[n]: the gradient of the loss for the log-probability of each label, from its part over sequences."""


def values_and_gradient(
    terms: Sequence[KernelTerm],
    student: HeadProduct,
    teachers: Mapping[str, HeadProduct],
    weights: RowWeights,
    out: Tensor | None,
    block: int = BLOCK,
) -> Tensor:
    """The values [n] of a sum of terms; the gradient of the weighted loss is written to `out`.

    Args:
        terms: what the objective states.
        student: its products; `out` may be they themselves.
        teachers: by name, those that terms ask.
        weights: of the rows.
        out: [n, V] for the gradient for the student's products; None: not wanted. Where rows of all these are
            filled up (their stride is larger than V), up to 15 entries beyond V are written with zeros.
        block: entries of a row at a time.
    """
    product = student.product
    exact = torch.float64 if product.dtype == torch.float64 else torch.float32
    values = torch.zeros(product.shape[0], dtype=exact, device=product.device)
    launches = _launches(terms, weights)
    overlaps = out is not None and out.untyped_storage().data_ptr() == product.untyped_storage().data_ptr()
    target = torch.empty_like(out) if out is not None and overlaps and len(launches) > 1 else out
    if not len(values):
        return values
    height = product.shape[1]
    width = _width(
        [product, *(one.product for one in teachers.values()), *([] if target is None else [target])]
    )
    if not launches and out is not None:
        out.zero_()
    with torch.cuda.device_of(product):
        for number, (term, labels) in enumerate(launches):
            teacher = None if term.teacher_model is None else teachers[term.teacher_model]
            template[(len(values),)](
                student.rows(),
                None if teacher is None else teacher.rows(),
                target,
                0 if target is None else target.stride(0),
                values,
                **_arguments(term, labels, weights, height, width),
                **constants(term, tl.float64 if exact == torch.float64 else tl.float32, block, height),
                HEADS=student.extras + (0 if teacher is None else 4 * teacher.extras),
                ADD=number > 0,
                **compile_options(block),
            )
    if out is not None and target is not None and target is not out:
        out.copy_(target)
    return values


def label_logprobs_of(model: HeadProduct, labels: Tensor) -> Tensor:
    """log softmax(logits)[label] of each row, [n] nats."""
    ones = torch.ones(labels.shape[0], device=labels.device)
    weights = RowWeights(ones, labels=labels)
    return -values_and_gradient((KernelTerm(label_weight=1.0, teacher_model=None),), model, {}, weights, None)


def _width(rows: Sequence[Tensor]) -> int:
    """How many entries of each row may be read and written: a multiple of 16, which wide transfers need,
    where all rows are filled up so far."""
    height = rows[0].shape[1]
    wide = -(-height // 16) * 16
    for one in rows:
        end = one.storage_offset() + (one.shape[0] - 1) * one.stride(0) + wide
        if one.stride(0) < wide or end * one.itemsize > one.untyped_storage().nbytes():
            return height
    return wide


Labels = tuple[Tensor, Tensor, float]
"""Ids, slope, weight of the value."""


def _launches(terms: Sequence[KernelTerm], weights: RowWeights) -> list[tuple[KernelTerm, Labels | None]]:
    """One for each term with a function; labels go with the first at temperature 1, or alone."""
    found: list[tuple[KernelTerm, Labels | None]] = [
        (term, None) for term in terms if term.function is not None
    ]
    label_weight = sum(term.weight * term.label_weight for term in terms)
    if weights.label_slope is None and label_weight == 0.0:
        return found
    assert weights.labels is not None
    slope = weights.token_weight * (-label_weight * weights.loss_weight)
    if weights.label_slope is not None:
        slope = slope + weights.label_slope
    labels = weights.labels, slope, float(label_weight * weights.loss_weight)
    for number, (term, _) in enumerate(found):
        if term.temperature == 1.0:
            found[number] = term, labels
            return found
    return [*found, (KernelTerm(teacher_model=None), labels)]


def _arguments(
    term: KernelTerm, labels: Labels | None, weights: RowWeights, height: int, width: int
) -> dict[str, Any]:
    first, numbers = None, [float(n) for n in term.numbers if not isinstance(n, Tensor)]
    if term.numbers and isinstance(term.numbers[0], Tensor):
        first, numbers = term.numbers[0].contiguous(), [0.0, *numbers]
    return {
        "token_weight": weights.token_weight.contiguous(),
        "loss_weight": float(term.weight * weights.loss_weight),
        "labels": None if labels is None else LabelRows(*labels),
        "height": height,
        "width": width,
        "inverse": 1.0 / float(term.temperature),
        "numbers": (*numbers, *[0.0] * (NUMBERS - len(numbers))),
        "first_number": first,
    }


def constants(term: KernelTerm, dtype: Any, block: int, height: int) -> dict[str, Any]:
    """What a kernel is compiled for; `HEADS` and `ADD` come on top."""
    named = {"TARGET": term.target, "MIXTURE": term.mixture, "TERMS": term.function}
    named["SUMS"] = f"{term.function}_sums" if term.sums else None
    return {
        **{key: None if name is None else function(name) for key, name in named.items()},
        "COUNT": term.sums,
        "MEANS": sum(MEANS[mean] for mean in term.means),
        "BLOCK": min(block, triton.next_power_of_2(height)),
        "E": dtype,
    }


def compile_options(block: int = BLOCK) -> dict[str, Any]:
    """How a kernel is compiled: the warps that a block is shared out over, and how many registers a thread
    may have, which is all that a multiprocessor has for one block: with fewer some would be spilled."""
    warps = max(1, block // (32 * ENTRIES_OF_A_THREAD))
    return {"num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps)), "enable_fp_fusion": True}
