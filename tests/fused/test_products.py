"""The products of a GPU: fp32 results and sums, filled-up heads, the budget.

The two operators that only a GPU has are registered for the CPU here, with the same signature and meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests import tiny
from tests.no_sync import NoHostSync
from tests.objectives.problems import logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.core.head import ModelHead
from stillhouse.core.rows import Rows
from stillhouse.data.collate import collate
from stillhouse.fused import FusedConfig, fused_loss
from stillhouse.fused.config import LARGEST_BUDGET, SMALLEST_BUDGET
from stillhouse.fused.kernel import FusedHeadLoss, RowBlock
from stillhouse.fused.products import GPU_MULTIPLE, DeviceProducts, ModelOutput, free_memory, offered
from stillhouse.models import head_of, hidden_rows
from stillhouse.models.adapters import add_lora
from stillhouse.models.config import LoraConfig
from stillhouse.objectives import build

COUNT, VOCAB, THIN, WIDE = 40, 999, 16, 24
GPU = DeviceProducts(fp32_results=True, fp32_sums=True, multiple=GPU_MULTIPLE)


def _mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(left.to(dtype), right.to(dtype))


def _addmm(
    total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, beta: int, alpha: int = 1, out: Tensor
) -> Tensor:
    assert total.dtype == dtype == out.dtype
    product = _mm(left, right, dtype)
    return out.copy_(alpha * product if beta == 0 else beta * total + alpha * product)


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """aten::mm.dtype and aten::addmm.dtype_out as cuBLAS has them."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype", _mm, "CPU")
        library.impl("addmm.dtype_out", lambda *a, beta=1, **o: _addmm(*a, beta=beta, **o), "CPU")
        yield


def problem(dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of the student, and of the teacher; logits spread as those of real models."""
    sizes = ((COUNT, THIN), (VOCAB, THIN), (COUNT, WIDE), (VOCAB + 9, WIDE))
    drawn = [logits(*size, seed, 1.0).bfloat16() for seed, size in enumerate(sizes)]
    return tuple(
        (one * scale / one.shape[1] ** 0.5 if n % 2 else one).to(dtype) for n, one in enumerate(drawn)
    )


def run(
    kind: str, products: DeviceProducts, dtype: torch.dtype, config: FusedConfig, extras: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Values, and the gradients of hidden states, head weight and head bias, with a device's products."""
    student, weight, teacher, teacher_weight = problem(dtype)
    extras = dict(extras)
    bias = logits(VOCAB, 1, 7)[:, 0].bfloat16().to(dtype) if extras.pop("bias", False) else None
    vocab = extras.pop("vocab", VOCAB)
    ours = ModelOutput.of(student, ModelHead(weight, bias, vocab=vocab, **extras)).cut(vocab)
    theirs = ModelOutput.of(teacher, ModelHead(teacher_weight)).cut(vocab)
    token_weight = torch.linspace(0, 1, COUNT).to(torch.promote_types(dtype, torch.float32))
    rows = Rows(labels=torch.arange(COUNT) % vocab)
    block = RowBlock(build(kind), 1.0, ours, {"main": theirs}, rows, token_weight, None)
    wanted = (True, True, bias is not None)
    _, values, grads = FusedHeadLoss(block, config, wanted, False, products).run()
    assert grads.hidden is not None
    assert grads.weight is not None
    return values, grads.hidden, grads.weight, grads.bias


EXTRAS = ({}, {"bias": True, "scale": 0.5, "softcap": 3.0, "vocab": 987}, {"vocab": 960})


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("kind", ["forward_kl", "skew_rkl", "jsd", "csd", "tvd", "cross_entropy"])
def test_gradients_with_the_products_of_a_gpu_are_within_3e_3_of_float64(
    kind: str, extras: dict[str, Any], on_gpu: None
) -> None:
    config = FusedConfig(chunk_rows=16)
    exact = run(kind, DeviceProducts(), torch.float64, config, extras)
    found = run(kind, GPU, torch.bfloat16, config, extras)
    for got, wanted in zip(found[1:], exact[1:], strict=True):
        if wanted is not None:
            assert got.shape == wanted.shape
            assert (got.double() - wanted).norm() < 3e-3 * wanted.norm()


def test_logits_in_the_precision_of_the_operands_are_further_off_so_they_are_not_the_default(
    on_gpu: None,
) -> None:
    exact = run("skew_rkl", DeviceProducts(), torch.float64, FusedConfig(), {})
    errors = [
        float((run("skew_rkl", GPU, torch.bfloat16, config, {})[1] - exact[1]).norm() / exact[1].norm())
        for config in (FusedConfig(), FusedConfig(fp32_logits=True), FusedConfig(fp32_logits=False))
    ]
    assert errors[0] == errors[1] < 3e-3
    assert 6e-3 < errors[2] < 5e-2


def test_a_filled_up_head_changes_nothing() -> None:
    for extras in EXTRAS:
        plain = run("skew_kl", DeviceProducts(), torch.float64, FusedConfig(chunk_rows=16), extras)
        filled = run(
            "skew_kl", DeviceProducts(multiple=64), torch.float64, FusedConfig(chunk_rows=16), extras
        )
        for one, other in zip(plain, filled, strict=True):
            torch.testing.assert_close(one, other)


class Products(TorchDispatchMode):
    """The shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.shapes.append(tuple(found.shape))
        return found


def test_a_chunk_takes_four_products_of_filled_up_heads(on_gpu: None) -> None:
    with Products() as products:
        run("jsd", GPU, torch.bfloat16, FusedConfig(chunk_rows=20), {})
    assert products.shapes.count((1024, THIN)) == 2, "the head's gradient: one for each of two chunks"
    assert products.shapes.count((20, THIN)) == 2, "that of the hidden states"
    assert products.shapes.count((20, 1024)) == 4, "the logits of both models"
    assert len(products.shapes) == 8


def test_without_fp32_sums_many_chunks_are_summed_in_fp32_all_the_same(on_gpu: None) -> None:
    config = FusedConfig(chunk_rows=1, fp32_logits=True)
    exact = run("jsd", DeviceProducts(), torch.float64, config, {})
    for products in (DeviceProducts(), DeviceProducts(fp32_results=True), GPU):
        found = run("jsd", products, torch.bfloat16, config, {})
        assert found[2].dtype == torch.float32
        assert (found[2] - exact[2]).norm() < 4e-3 * exact[2].norm(), "in bf16 it would be 2e-2"


def test_what_a_device_offers_is_found_by_trying(on_gpu: None) -> None:
    assert offered(torch.device("cpu")) == (True, True)


def test_a_cpu_offers_neither_and_is_asked_nothing() -> None:
    assert offered(torch.device("cpu")) == (False, False)
    assert DeviceProducts.of(torch.device("cpu")) == DeviceProducts()
    assert free_memory(torch.device("cpu")) is None


def test_the_path_of_a_gpu_reads_nothing_from_it() -> None:
    """On tensors without numbers, whose shapes and dtypes are those of a GPU."""
    tensors = [one.to("meta") for one in problem(torch.bfloat16)]
    student, teacher = (
        ModelOutput.of(hidden, ModelHead(weight), torch.bfloat16).cut(VOCAB)
        for hidden, weight in (tensors[:2], tensors[2:])
    )
    token_weight = torch.ones(COUNT, device="meta")
    block = RowBlock(build("jsd"), 1.0, student, {"main": teacher}, Rows(), token_weight, None)
    with NoHostSync():
        call = FusedHeadLoss(block, FusedConfig(chunk_rows=16), (True, True, False), False, GPU)
        _, values, grads = call.run()
    assert call.fp32
    assert values.shape == (COUNT,)
    assert grads.weight.shape == (VOCAB, THIN)
    assert grads.weight.dtype == torch.float32


def test_the_budget_follows_free_memory_in_powers_of_two_within_bounds() -> None:
    config = FusedConfig()
    assert config.budget() == SMALLEST_BUDGET == config.budget(free=10**6)
    assert config.budget(free=9 * 2**30) == 2**30
    assert config.budget(free=15 * 2**30) == 2**30, "what else is on the card hardly ever changes it"
    assert config.budget(free=80 * 2**30) == LARGEST_BUDGET
    assert FusedConfig(memory_budget=1000).budget(free=80 * 2**30) == 1000
    entry = 4 + 2  # fp32 logits, and their bf16 gradient
    assert config.chunk_size(8192, 151_936 * entry, free=70 * 2**30) == 2048


def test_the_gradient_apart_from_fp32_logits_counts_in_the_budget() -> None:
    student, weight, _, _ = problem(torch.bfloat16)
    block = RowBlock(
        build("cross_entropy"),
        1.0,
        ModelOutput.of(student, ModelHead(weight)),
        {},
        Rows(),
        torch.ones(COUNT),
        None,
    )
    config = FusedConfig(memory_budget=10 * VOCAB * 6)

    def rows(fp32: bool, needed: bool) -> int:
        options = config.model_copy(update={"fp32_logits": fp32})
        return FusedHeadLoss(block, options, (needed, False, False), False).chunk_rows

    assert rows(fp32=True, needed=True) == 10
    assert rows(fp32=True, needed=False) == 14  # 15 fit; three even chunks
    assert rows(fp32=False, needed=True) == 20  # 30 fit; two even chunks


def test_under_lora_no_gradient_of_the_head_is_computed() -> None:
    model = add_lora(tiny.model(1, tie_word_embeddings=True), LoraConfig(rank=2))
    teacher = tiny.model(2)
    batch = collate(tiny.responses(3), tiny.PAD)
    with Products() as products:
        hidden = hidden_rows(model, batch)
        before = len(products.shapes)
        loss = fused_loss(
            build("forward_kl"),
            hidden,
            head_of(model),
            hidden_rows(teacher, batch).detach(),
            head_of(teacher),
        )
        fused = products.shapes[before:]
    loss.backward()
    assert hidden.requires_grad
    assert (tiny.VOCAB, 16) not in fused
    assert any(one.grad is not None for name, one in model.named_parameters() if "lora" in name)
