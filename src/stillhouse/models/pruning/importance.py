"""How much layers, channels and heads matter on data: what pruning by importance goes by.

Layers by block influence (Men et al. 2024, ShortGPT, arXiv 2403.03853): for the states x before and y after
a layer, BI = 1 - E[x.y / (|x| |y|)] over tokens. Width by activations (Muralidharan et al. 2024, Minitron,
arXiv 2407.14679, section 2.2): a channel of the MLP by its activation, a head by the norm of its output, a
channel of the residual stream by the outputs of the norms; mean of absolute values over the tokens of a row,
L2 norm over rows.

Differences from Minitron: a channel of a gated MLP is measured where the projection down reads it, behind the
gate; the norms' outputs are read where attention and MLP take them in, so that the final norm does not count;
the residual stream's scores are summed over layers; what pruned heads held is not added to those that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.batch import TokenBatch
from stillhouse.models.hidden import hidden_rows
from stillhouse.models.pruning.layout import Layout


@dataclass(frozen=True)
class Importance:
    """Scores on the CPU in float64; higher matters more.

    Example: `importance.layers.argmin()  # the layer that changes its input least`
    """

    layers: Tensor
    """[L] block influence, 0 to 2."""
    intermediate_size: Tensor | None
    """[L, I]; None where the MLP of the architecture is not known."""
    num_attention_heads: Tensor | None
    """[L, H]; None where its attention is not known."""
    hidden_size: Tensor | None
    """[L, D]"""
    rows: int
    tokens: int


class _Sums:
    """Running sums over batches of what the hooks see."""

    def __init__(self, depth: int) -> None:
        self.cosine = torch.zeros(depth, dtype=torch.float64)
        self.squares: dict[tuple[str, int], Tensor] = {}
        self.mask = torch.ones(0)
        """[B, T] of the batch that is read: 1 on tokens."""

    def add_layer(self, number: int, before: Tensor, after: Tensor) -> None:
        similarity = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self.cosine[number] += (similarity * self.mask).sum().double().cpu()

    def add(self, name: str, number: int, activations: Tensor) -> None:
        """[B, T, C]: the squares of the rows' mean absolute values."""
        means = (activations.float().abs() * self.mask[..., None]).sum(1) / self.mask.sum(1, keepdim=True)
        found = means.square().sum(0).double().cpu()
        known = self.squares.get((name, number))
        self.squares[name, number] = found if known is None else known + found

    def scores(self, name: str, depth: int) -> Tensor | None:
        """[L, C]"""
        rows = [self.squares.get((name, number)) for number in range(depth)]
        return None if any(row is None for row in rows) else torch.stack(rows).sqrt()  # type: ignore[arg-type]


@torch.no_grad()
def measure(model: nn.Module, layout: Layout, batches: Iterable[TokenBatch]) -> Importance:
    """Read batches and score layers, channels and heads.

    Args:
        model: the teacher, in evaluation mode.
        layout: of the model.
        batches: on its device; the same batches in the same order give the same scores.
    """
    depth = layout.sizes.layers
    sums, rows, tokens = _Sums(depth), 0, 0
    with _hooks(model, layout, sums):
        for batch in batches:
            sums.mask = batch.attention_mask.float()
            hidden_rows(model, batch)
            rows, tokens = rows + len(batch), tokens + batch.num_tokens
    streams = [
        scores
        for block in ("attention", "mlp")
        if (scores := sums.scores(f"into {block}", depth)) is not None
    ]
    return Importance(
        1 - sums.cosine / max(1, tokens),
        sums.scores("mlp", depth),
        sums.scores("attention", depth),
        torch.stack(streams).sum(0) if streams else None,
        rows,
        tokens,
    )


@contextmanager
def _hooks(model: nn.Module, layout: Layout, sums: _Sums) -> Iterator[None]:
    handles = []
    for number in range(layout.sizes.layers):
        layer = model.get_submodule(f"{layout.layers}{number}")
        handles.append(layer.register_forward_hook(_layer_hook(sums, number), with_kwargs=True))
        sites = [(f"into {block}", name) for block, name in layout.into.items()]
        for name, relative in (*sites, *layout.back.items()):
            module = dict(layer.named_modules()).get(relative)
            if module is not None:
                heads = layout.sizes.num_attention_heads if name == "attention" else None
                handles.append(module.register_forward_pre_hook(_input_hook(sums, name, number, heads)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hook(sums: _Sums, number: int) -> Callable[..., None]:
    def hook(_layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        sums.add_layer(number, before, output[0] if isinstance(output, tuple) else output)

    return hook


def _input_hook(sums: _Sums, name: str, number: int, heads: int | None) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any) -> None:
        states = args[0].reshape(*sums.mask.shape, -1)  # OPT's MLP reads [B T, D]
        if heads is not None:
            states = states.unflatten(-1, (heads, -1)).float().norm(dim=-1)
        sums.add(name, number, states)

    return hook
