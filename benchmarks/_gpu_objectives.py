"""Stage of gpu.py: time, memory and error of the fused objectives against the four bare products."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _gpu_models import Place, attempt
from _peers import FULL, peer
from torch import Tensor

from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.rows import Rows
from stillhouse.fused import FusedConfig, fused_loss
from stillhouse.objectives import Objective, build

SHAPES = ((151_936, 896, 2048), (128_256, 2048, 4096), (50_257, 768, 1600))
"""Vocabulary, widths of student and teacher: Qwen2.5 0.5B and 3B, Llama 3, GPT-2 and GPT-2 XL."""
ROWS = 8192
FIRST = ("forward_kl", "skew_rkl", "jsd", "csd", "cross_entropy")
REST = (
    "reverse_kl", "skew_kl", "symmetric_kl", "jeffreys", "tvd", "dld", "ab", "alpha_mixture", "taid",
    "contrastive", "by_source",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "by_source": {"teacher": {"kind": "skew_kl"}, "student": {"kind": "skew_rkl"}}
}
CHECKED = 256
"""Rows on which gradients are compared with float64."""


class Setting:
    """The tensors of one shape: bfloat16 on a GPU, float32 on a CPU."""

    def __init__(self, place: Place, vocab: int, width: int, teacher_width: int, rows: int) -> None:
        self.place, self.vocab, self.count = place, vocab, rows
        dtype = torch.bfloat16 if place.cuda else torch.float32
        generator = torch.Generator(place.device).manual_seed(0)

        def drawn(*shape: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(*shape, generator=generator, device=place.device, dtype=torch.float32)
            return (made * scale).to(dtype)

        self.head = drawn(vocab, width, scale=3 / width**0.5).requires_grad_()
        self.hidden = drawn(rows, width).requires_grad_()
        self.teacher_head = drawn(vocab, teacher_width, scale=3 / teacher_width**0.5)
        self.teacher = drawn(rows, teacher_width)
        self.labels = torch.randint(vocab, (rows,), generator=generator, device=place.device)
        self.facts = {"vocab": vocab, "student_width": width, "teacher_width": teacher_width, "rows": rows}

    def rows(self, count: int) -> Rows:
        """Facts on the first rows: sequences of 16 tokens, written by teacher and student in turn."""
        sequence = torch.arange(count) // 16
        return Rows(
            labels=self.labels[:count],
            sources=sequence % 2 + 1,
            sequence_ids=sequence,
            pair_ids=sequence // 2,
        )

    def floor(self) -> Callable[[], Any]:
        """The four products: both models' logits, the gradients of hidden states and head."""
        hidden, head = self.hidden.detach(), self.head.detach()
        gradient = torch.randn(self.count, self.vocab, device=self.place.device, dtype=hidden.dtype)

        def run() -> None:
            _ = hidden @ head.t()
            _ = self.teacher @ self.teacher_head.t()
            _ = gradient @ head
            _ = gradient.t() @ hidden

        return run

    def ours(self, objective: Objective, config: FusedConfig) -> Callable[[], Any]:
        """The fused path."""
        rows = self.rows(self.count)
        teachers = {"main": ModelSignal(self.teacher, ModelHead(self.teacher_head))}

        def run() -> Any:
            loss = fused_loss(objective, self.hidden, self.head, teachers, rows=rows, config=config)
            return torch.autograd.grad(loss, (self.hidden, self.head))

        return run

    def full(self, kind: str) -> Callable[[], Any]:
        """Logits of all rows, and the loss as released code forms it."""

        def run() -> Any:
            student, teacher = self.hidden @ self.head.t(), self.teacher @ self.teacher_head.t()
            loss = FULL[kind](student, teacher, torch.isinf(student)).mean()
            return torch.autograd.grad(loss, (self.hidden, self.head))

        return run

    def peer(self, name: str, kind: str, compiled: bool = False) -> Callable[[], Any] | None:
        """TRL's or Liger's; None where it is missing."""
        loss = peer(name, kind, self.labels, compiled)
        if loss is None:
            return None
        operands = (self.hidden, self.head, self.teacher, self.teacher_head)
        return lambda: torch.autograd.grad(loss(*operands), (self.hidden, self.head))

    def error(self, objective: Objective, config: FusedConfig) -> float:
        """Of the gradients on some rows, relative to float64 over the same operands."""
        count, found = min(CHECKED, self.count), []
        for dtype in (self.hidden.dtype, torch.float64):
            hidden, head = (
                one.detach().to(dtype).requires_grad_() for one in (self.hidden[:count], self.head)
            )
            teachers = {
                "main": ModelSignal(self.teacher[:count].to(dtype), ModelHead(self.teacher_head.to(dtype)))
            }
            chosen = config if dtype != torch.float64 else FusedConfig()
            loss = fused_loss(objective, hidden, head, teachers, rows=self.rows(count), config=chosen)
            found.append([one.double() for one in torch.autograd.grad(loss, (hidden, head))])
        parts = [float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]
        return float(f"{max(parts):.2g}")

    def timed(self, run: Callable[[], Any]) -> float:
        """Milliseconds, the median of some calls after a first one."""
        run()
        spent = []
        for _ in range(1 if self.place.small else 5):
            start = self.place.now()
            run()
            spent.append((self.place.now() - start) * 1e3)
        return statistics.median(spent)


def measured(setting: Setting, floor: float, who: str, kind: str, run: Callable[[], Any]) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {**setting.facts, "who": who, "objective": kind}
    setting.place.forget()
    held = setting.place.held()
    with attempt(row):
        spent = setting.timed(run)
        row |= {"ms": round(spent, 2), "over_floor": round(spent / floor, 2), **setting.place.peak(held)}
    return row


def ours(setting: Setting, floor: float, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The fused objectives, with fp32 logits and with those of the operands' precision."""
    for kind in kinds:
        objective = build(kind, **OPTIONS.get(kind, {}))
        for fp32 in (True, False):
            config = FusedConfig(fp32_logits=fp32)
            row = measured(setting, floor, "ours", kind, setting.ours(objective, config))
            row["logits"] = "float32" if fp32 else str(setting.hidden.dtype).removeprefix("torch.")
            with attempt(row):
                row["gradient_error"] = setting.error(objective, config)
            yield row


def peers(setting: Setting, floor: float) -> Iterator[dict[str, Any]]:
    """TRL, Liger and full logits, as far as they are there."""
    runs = {
        ("trl", "forward_kl"): setting.peer("trl", "forward_kl"),
        ("trl", "jsd"): setting.peer("trl", "jsd"),
        ("liger", "jsd"): setting.peer("liger", "jsd"),
        ("liger compiled", "jsd"): setting.peer("liger", "jsd", compiled=True)
        if setting.place.cuda
        else None,
        ("full", "forward_kl"): setting.full("forward_kl"),
        ("full", "skew_rkl"): setting.full("skew_rkl"),
    }
    for (who, kind), run in runs.items():
        if run is None:
            yield {**setting.facts, "who": who, "objective": kind, "skipped": "is not installed"}
        else:
            yield measured(setting, floor, who, kind, run)


def stage(place: Place) -> Iterator[dict[str, Any]]:
    """All shapes with the objectives of the table first, then the other objectives."""
    shapes = ((1031, 32, 48),) if place.small else SHAPES
    for number, kinds in enumerate((FIRST, REST[:1] if place.small else REST)):
        for vocab, width, teacher_width in shapes if number == 0 else shapes[:1]:
            setting = Setting(place, vocab, width, teacher_width, 128 if place.small else ROWS)
            products = setting.floor()
            floor = setting.timed(products)
            del products
            if number == 0:
                yield {**setting.facts, "who": "floor", "objective": "four products", "ms": round(floor, 2)}
            yield from ours(setting, floor, kinds)
            if number == 0:
                yield from peers(setting, floor)
