"""A model with less of another one's weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.models.pruning.choose import Kept
from stillhouse.models.pruning.layout import HIDDEN, Layout
from stillhouse.models.pruning.sizes import FIELD, Sizes, pruned_config, text_config
from stillhouse.models.pruning.vocabulary import renumber_special_tokens

CHECKED_LAYERS = 2
"""How many layers the check of a layout runs."""


@torch.no_grad()
def cut(teacher: nn.Module, layout: Layout, kept: Kept) -> nn.Module:
    """A new model of the teacher's class with what is kept, in the teacher's dtype and on the CPU.

    Without some channels of the residual stream it computes what the teacher would if these were zero
    wherever they are written: the weights of RMS norms are scaled by sqrt(D / D'), because the mean of the
    squares is now over fewer channels. A LayerNorm also subtracts a mean, which has no such equivalent; there
    the student norms over what it has.

    Raises:
        ModelError: a weight of this family would not fit.
    """
    config = pruned_config(teacher.config, kept.layers, kept.sizes if kept.narrows else None)
    generation = copy.deepcopy(teacher.generation_config)
    if kept.vocabulary is not None:
        renumber_special_tokens((config, text_config(config), generation), kept.vocabulary)
    student: nn.Module = type(teacher)(config)
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    new_number = {old: new for new, old in enumerate(kept.layers)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        number = layout.layer_of(name)
        if number is None:
            target = name
        elif number in new_number:
            number = new_number[number]
            rest = name.removeprefix(layout.layers).partition(".")[2]
            target = f"{layout.layers}{number}.{rest}"
        else:
            continue
        found = _sliced(name, tensor, layout, kept, number) if kept.narrows else tensor
        if target not in shapes or found.shape != shapes[target]:
            raise ModelError(
                f"{FIELD}: {layout.family} cannot be cut to {kept.sizes.describe()}: {target} would be "
                f"{tuple(found.shape)}, and the family has {tuple(shapes.get(target, ()))}. Its layers can "
                f"be cut: {FIELD}.layers."
            )
        state[target] = found
    student.load_state_dict(state)
    student.generation_config = generation
    for parameter in student.parameters():
        parameter.data = parameter.data.to(next(teacher.parameters()).dtype)
    if kept.hidden_size is not None:
        _rescale(teacher, student, layout, kept)
    return student


def _sliced(name: str, tensor: Tensor, layout: Layout, kept: Kept, layer: int | None) -> Tensor:
    """What is kept of one weight."""
    for axis, parts in enumerate(layout.axes.get(name, ())):
        chosen: list[Tensor] = []
        start = 0
        for part in parts:
            unit, count = layout.unit(name, axis, part), int(getattr(layout.sizes, part))
            numbers = kept.numbers(part, layer)
            of_part = torch.arange(count) if numbers is None else torch.tensor(numbers)
            chosen.append(start + (of_part[:, None] * unit + torch.arange(unit)).flatten())
            start += count * unit
        if parts and start <= tensor.shape[axis]:
            rest = torch.arange(start, tensor.shape[axis])  # rows of padding behind the vocabulary
            if "vocabulary" in parts and kept.vocabulary is not None:
                rest = rest[:0]
            index = torch.cat([*chosen, rest]).to(tensor.device)
            tensor = tensor.index_select(axis, index)
    return tensor


def _rescale(teacher: Any, student: Any, layout: Layout, kept: Kept) -> None:
    """RMS norms over fewer channels as if the others were zero, embeddings as large as in the teacher."""
    assert kept.hidden_size is not None
    wide = (layout.sizes.hidden_size / len(kept.hidden_size)) ** 0.5
    larger = _embedding_scale(teacher, layout) / _embedding_scale(student, layout)
    if larger != 1.0:  # Gemma multiplies by the root of its hidden size
        student.get_input_embeddings().weight.mul_(larger)
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    for name, module in student.named_modules():
        weight: Any = getattr(module, "weight", None)
        if layout.axes.get(f"{name}.weight") != (HIDDEN,) or isinstance(module, nn.LayerNorm):
            continue
        factor = wide / larger if tied and layout.layer_of(name) is None else wide
        offset = _offset(module)
        weight.copy_((weight + offset) * factor - offset)


def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 1 in Gemma."""
    bare = copy.deepcopy(norm)
    weight: Tensor = bare.weight  # type: ignore[assignment]
    weight.zero_()
    return float(bare(torch.ones(1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)).any())


def _embedding_scale(model: Any, layout: Layout) -> float:
    """What embeddings are multiplied by before the first layer; 1 where more than that is done to them."""
    seen: list[Tensor] = []
    layer = model.get_submodule(f"{layout.layers}0")
    handle = layer.register_forward_pre_hook(
        lambda _layer, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    device = next(model.parameters()).device
    ids = torch.arange(min(4, layout.sizes.vocabulary), device=device)[None]
    training = model.training
    model.eval()
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        model.train(training)
    rows = model.get_input_embeddings().weight[ids[0]].float()
    states = seen[0][0].float()
    scale = float((states * rows).sum() / rows.square().sum())
    pure = torch.allclose(states, rows * scale, rtol=0.02, atol=1e-6 * float(states.abs().max() + 1))
    return scale if pure and abs(scale - 1) > 1e-3 else 1.0


@torch.no_grad()
def check_layout(teacher: nn.Module, layout: Layout, kept: Kept) -> None:
    """Make sure that what is to be cut stands where the layout says.

    Two layers with all channels and heads in reverse order must compute what they did in theirs: an
    architecture that mixes them in a way that is not known would otherwise be cut wrongly.

    Raises:
        ModelError: it does not.
    """
    sizes = layout.sizes
    layers = tuple(range(min(CHECKED_LAYERS, sizes.layers)))
    short = replace(sizes, layers=len(layers))
    turned = Kept(
        short,
        layers,
        _reversed(sizes.hidden_size) if kept.hidden_size is not None else None,
        _every(layers, sizes.intermediate_size) if kept.intermediate_size is not None else None,
        _every(layers, sizes.num_attention_heads) if kept.num_attention_heads is not None else None,
        _every(layers, sizes.num_key_value_heads) if kept.num_attention_heads is not None else None,
    )
    if not turned.narrows:
        return
    plain, other = (_logits(cut(teacher, layout, one), sizes) for one in (Kept(short, layers), turned))
    if (plain - other).abs().max() > 1e-3 * plain.abs().max():
        parts = [
            name
            for name in ("hidden_size", "intermediate_size", "num_attention_heads")
            if getattr(kept, name)
        ]
        raise ModelError(
            f"{FIELD}: {layout.family} does more with its {' or '.join(parts)} than Stillhouse knows, so "
            f"they cannot be cut. Its layers can be: {FIELD}.layers."
        )


def _logits(model: nn.Module, sizes: Sizes) -> Tensor:
    ids = (torch.arange(1, 9) * 7 % sizes.vocabulary)[None]
    found: Tensor = model.float().eval()(input_ids=ids, use_cache=False).logits
    return found


def _reversed(count: int) -> tuple[int, ...]:
    return tuple(range(count - 1, -1, -1))


def _every(layers: tuple[int, ...], count: int) -> tuple[tuple[int, ...], ...]:
    return (_reversed(count),) * len(layers)
