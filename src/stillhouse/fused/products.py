"""The matrix products of the loss over the head: hidden states to logits, and gradients back.

A CPU rounds the result of half-precision operands to their precision. A GPU sums such a product in fp32 and
can leave the result so, and can add it to an fp32 matrix at the same time (torch 2.8 has the one, 2.9 the
other); what a device offers is found by asking it for a small product, once per process.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stillhouse.core.head import ModelHead, gathered
from stillhouse.core.host import RowIndex

HALF = (torch.float16, torch.bfloat16)
TILE = 8192
"""Head rows of which the gradient is summed at a time where a product cannot add to an fp32 sum itself."""
GPU_MULTIPLE = 64
"""Heads are filled up to a multiple of so many rows on a GPU, whose products are slow at odd heights: GPT-2's
50,257 rows took over twice the time of 50,304 on an H100."""


@dataclass(frozen=True, slots=True)
class DeviceProducts:
    """What a device offers for products of half-precision operands.

    Example: `DeviceProducts.of(hidden.device)`
    """

    fp32_results: bool = False
    """Whether a product gives its fp32 sums as they are."""
    fp32_sums: bool = False
    """Whether a product adds itself to an fp32 matrix."""
    multiple: int = 1
    """Heads are filled up with zeros to a multiple of so many rows."""

    @classmethod
    def of(cls, device: torch.device) -> DeviceProducts:
        """Of this device. A GPU is waited for once per process."""
        if device.type != "cuda":
            return cls()
        return _found_on(device)

    def multiply(self, hidden: Tensor, weight: Tensor, fp32: bool) -> Tensor:
        """hidden weight^T, [n, V]; of half-precision operands in fp32 or rounded once to their precision."""
        if fp32 and weight.dtype in HALF:
            if self.fp32_results:
                return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
            return torch.mm(hidden.float(), weight.t().float())
        return torch.mm(hidden, weight.t())

    def add_product(self, total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
        """total += gradient^T hidden, [V, D]; `first` overwrites what is in `total`."""
        left = gradient.t()
        if total.dtype == gradient.dtype:
            _ = torch.mm(left, hidden, out=total) if first else total.addmm_(left, hidden)
        elif self.fp32_sums:
            beta = 0 if first else 1
            torch.addmm(total, left, hidden, out_dtype=total.dtype, beta=beta, out=total)
        else:
            if first:
                total.zero_()
            for start in range(0, left.shape[0], TILE):
                tile = slice(start, start + TILE)
                total[tile] += torch.mm(left[tile], hidden)


@functools.lru_cache(maxsize=32)
def _found_on(device: torch.device) -> DeviceProducts:
    return DeviceProducts(*offered(device), multiple=GPU_MULTIPLE)


def offered(device: torch.device) -> tuple[bool, bool]:
    """Whether products of half-precision operands come in fp32, and whether they add up in fp32, by trying.

    torch 2.8 takes no fp32 matrix to add to, and earlier ones know no dtype of a result.
    """
    half = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    total = torch.full((64, 64), 2**-9, dtype=torch.float32, device=device)
    results = sums = False
    try:
        results = torch.mm(half, half, out_dtype=torch.float32).dtype == torch.float32
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
        sums = bool((total == 64 + 2**-9).all())  # in half precision the small part would be lost
    except (TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
        pass
    return results, sums


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU can still give to tensors of this process; None on a CPU. Waits for nothing."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """One model of a call: hidden states, and the head over the ids that are compared, ready to multiply."""

    hidden: Tensor
    head: ModelHead
    weight: Tensor
    """[height or more, D]: rows beyond `height` are zeros that fill it up for the product."""
    bias: Tensor | None
    height: int
    """V, the number of ids that are compared."""

    @classmethod
    def of(cls, hidden: Tensor, head: ModelHead, operand: torch.dtype | None = None) -> ModelOutput:
        """Detached and gathered, in the given precision or that of its own operands."""
        weight = gathered(head.weight).detach()
        bias = None if head.bias is None else gathered(head.bias).detach()[: head.height]
        operand = operand or operand_dtype(hidden, weight)
        weight = weight[: head.height].to(operand)
        return cls(hidden.detach().to(operand), head, weight, bias, head.height)

    def cut(self, height: int) -> ModelOutput:
        """Over the first `height` ids only: softmax over them renormalises the mass."""
        bias = None if self.bias is None else self.bias[:height]
        return replace(self, weight=self.weight[:height], bias=bias, height=height)

    def aligned(self, multiple: int) -> ModelOutput:
        """With the head filled up to a multiple of so many rows: a copy of it, where it is not that high."""
        missing = -self.height % multiple
        if not missing:
            return self
        return replace(self, weight=nn.functional.pad(self.weight[: self.height], (0, 0, 0, missing)))

    def at(self, index: RowIndex) -> ModelOutput:
        """For some of the rows."""
        return replace(self, hidden=index.pick(self.hidden))

    def product(self, products: DeviceProducts, fp32: bool) -> Tensor:
        """hidden weight^T, [n, V], of half-precision operands in fp32 or rounded to their precision."""
        return products.multiply(self.hidden, self.weight, fp32)[:, : self.height]

    def logits(self, product: Tensor) -> Tensor:
        """Logits in fp32 or fp64 from some rows of `product`."""
        return self.head.finish(product, self.bias)


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of the matrix products: that of autocast where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


@dataclass(frozen=True, slots=True)
class ChunkLogits:
    """The student's products of one chunk, before bias, scale and cap, and room for their gradient."""

    product: Tensor
    """[n, V]"""
    gradient: Tensor | None
    """[n, V] in the precision of the operands: over `product` where that has it too; None: not wanted."""
    filled: Tensor | None
    """`gradient` with a zero for each row that the head was filled up with."""

    @classmethod
    def of(cls, student: ModelOutput, products: DeviceProducts, fp32: bool, needs_grad: bool) -> ChunkLogits:
        """The product of a chunk."""
        whole = products.multiply(student.hidden, student.weight, fp32)
        product, operand = whole[:, : student.height], student.weight.dtype
        if not needs_grad:
            return cls(product, None, None)
        filled = whole
        if whole.dtype != operand:
            filled = torch.empty_like(whole, dtype=operand)
            filled[:, student.height :].zero_()
        return cls(product, filled[:, : student.height], filled)


class GradAccumulator:
    """The gradients of a call while they grow, over the ids that are compared."""

    def __init__(
        self,
        student: ModelOutput,
        needs_grad: tuple[bool, bool, bool],
        chunks: int,
        products: DeviceProducts,
    ) -> None:
        weight, exact = student.weight, torch.promote_types(student.weight.dtype, torch.float32)
        # One chunk is one product, rounded once; several are summed in fp32 so that late ones are not lost.
        # Where the product itself gives fp32, a parameter in fp32 gets it unrounded at no cost.
        unrounded = products.fp32_sums and student.head.weight.dtype == exact
        dtype = exact if weight.dtype in HALF and (chunks > 1 or unrounded) else weight.dtype
        self._products, self._height = products, student.height
        self.hidden = torch.zeros_like(student.hidden) if needs_grad[0] else None
        # Not filled with zeros: the first chunk writes, the others add.
        self.weight = torch.empty_like(weight, dtype=dtype) if needs_grad[1] else None
        self.bias = weight.new_zeros(student.height, dtype=exact) if needs_grad[2] else None
        self._empty = True

    def add(self, gradient: Tensor, student: ModelOutput, rows: Tensor | slice) -> None:
        """Add a chunk: its filled-up gradient for the products, and the rows of the call that it covers."""
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(gradient, student.weight)
        if self.weight is not None:
            self._products.add_product(self.weight, gradient, student.hidden, self._empty)
        self._empty = False

    def finish(self) -> None:
        """Make sure that a gradient to which no chunk came is zero, and leave out what the head was filled up
        with."""
        if self.weight is not None:
            if self._empty:
                self.weight.zero_()
            self.weight = self.weight[: self._height]
